"""Draws the figures of time_to_quality.py: held-out MLM loss over seconds of training."""

from common.files import replacing


def plot_curves(figures: dict, path: str) -> None:
    """A panel for each part that was measured."""
    from matplotlib.figure import Figure

    parts = [name for name in PANELS if name in figures]
    figure = Figure(figsize=(6.5 * len(parts), 4.5), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        axis.set(xlabel="seconds of training", ylabel="held-out MLM loss, nats")
        axis.grid(alpha=0.3)
        PANELS[name](axis, figures[name])
        axis.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def draw_pairs(axis, found: dict) -> None:
    """A curve for each seed of both sides, and the marks."""
    for color, side, label in (("C0", "ours", "this repository"), ("C1", "transformers", "transformers, AdamW")):
        for number, pair in enumerate(found["pairs"]):
            draw_losses(axis, pair[side]["curve"], color, label if number == 0 else None)
    line = found["pairs"][0]["ours"]["line"]
    for mark in found["marks"]:
        axis.axhline(line - mark["below"], color="gray", alpha=0.6, linestyle="-" if mark["below"] == 0 else ":")
    axis.set_title("Rows of 16 tokens; gray: the line and the marks below it")


def draw_packing(axis, found: dict) -> None:
    for color, name in (("C0", "packed"), ("C1", "unpacked")):
        draw_losses(axis, found[name]["curve"], color, f"{name}, {found[name]['sequences_per_second']:.1f} sequences/s")
    axis.axhline(found["line"], color="gray", alpha=0.6)
    axis.set_title("Rows of 512 tokens; gray: the line")


def draw_losses(axis, curve: list[dict], color: str, label: str | None) -> None:
    axis.plot([point["seconds"] for point in curve], [point["mlm_loss"] for point in curve], color=color, label=label,
              marker="o" if len(curve) < 15 else None)


PANELS = {"transformers": draw_pairs, "packing": draw_packing}
