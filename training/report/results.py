"""The results in a report: the verdict, the curves, the held-out figures, the [MASK] examples.  No torch here."""

from dataclasses import dataclass
from html import escape

from training.curves import RunCurves
from training.report.inputs import is_number
from training.report.markup import bars, count, figures_table, heading, paragraph, percent, section, share_bar
from training.report.pictures import curve_pictures, run_colors

KINDS = (("mask_", "[MASK]"), ("kept_", "kept"), ("replaced_", "replaced"), ("", "all"))  # of predicted tokens
BAR_WORDS = 5  # words shown for a [MASK]


@dataclass(frozen=True)
class HeldOutFigures:
    """The figures of one evaluation, under the names of evaluate.py --json."""

    title: str
    figures: dict

    def get(self, key: str) -> float | None:
        value = self.figures.get(key)
        return value if is_number(value) else None


def logged_evaluations(runs: list[RunCurves]) -> list[HeldOutFigures]:
    """The last evaluation in the log of each run that has one."""
    return [HeldOutFigures(f"{run.name}, after step {count(run.evaluation['step'])}",
                           {key.removeprefix("eval_"): value for key, value in run.evaluation.items()})
            for run in runs if run.evaluation]


def verdict_section(logged: list[HeldOutFigures], files: list[HeldOutFigures]) -> str:
    """What the last evaluations show; the files count where no log has the line to compare with."""
    for evaluations in (logged, files):
        compared = [evaluation for evaluation in evaluations if evaluation.get("context_free_mlm_loss") is not None]
        if compared:
            return section("Verdict", "\n".join(map(verdict_paragraph, compared)))
    return ""


def verdict_paragraph(evaluation: HeldOutFigures) -> str:
    loss, line = evaluation.get("mlm_loss"), evaluation.get("context_free_mlm_loss")
    tokens = evaluation.get("masked_tokens")
    amount = f", over {count(tokens)} masked tokens" if tokens else ""
    found = "not a finite number" if loss is None else f"{loss:.2f} nats"
    good = is_below(loss, line)
    return (f'<p class="verdict {"good" if good else "bad"}"><strong>{escape(verdict(loss, line))}</strong> '
            f"{escape(evaluation.title)}: the MLM loss on held-out text is {found}{amount}.  The line is at {line:.2f} "
            "nats: what a model that knows the word frequencies, and no context, reaches on the same tokens.</p>")


def verdict(loss: float | None, line: float) -> str:
    """The verdict on a loss in nats, None where it was not finite."""
    if is_below(loss, line):
        return f"{line - loss:.2f} nats below the line: it has learned from context."
    return "Not below the line: nothing learned from context yet."


def is_below(loss: float | None, line: float) -> bool:
    """Whether a loss is below the line by an amount that two digits show."""
    return loss is not None and round(line - loss, 2) > 0


def curves_section(runs: list[RunCurves]) -> str:
    pictures = curve_pictures(runs)
    if not pictures:
        return ""
    legend = [f'<li><i style="background:{color}"></i>{escape(run.name)}</li>'
              for run, color in zip(runs, run_colors(runs), strict=True) if run.curves]
    notes = []
    if any("eval_context_free_mlm_loss" in run.curves for run in runs):
        notes.append("Dashed: the line, what a model without context reaches.")
    if any(run.phase2_start for run in runs):
        notes.append("Dotted: where phase 2 starts.")
    return section("Curves", f'<ul class="legend">{"".join(legend)}</ul>' if len(legend) > 1 else "",
                   f'<div class="pictures">{"".join(f"<figure>{picture}</figure>" for picture in pictures)}</div>',
                   paragraph("  ".join(notes), "note") if notes else "")


def held_out_section(evaluations: list[HeldOutFigures]) -> str:
    parts = [part for evaluation in evaluations for part in held_out_parts(evaluation)]
    kinds = any(evaluation.get(f"{prefix}loss") is not None for evaluation in evaluations for prefix, _ in KINDS[:-1])
    note = ("Of the tokens to predict, most are shown as [MASK], some are kept as they are, and some are replaced by "
            "a random word.  Without context: what the word frequencies alone reach.")
    return section("Held-out text", paragraph(note, "note") if kinds and parts else "", *parts)


def held_out_parts(evaluation: HeldOutFigures) -> list[str]:
    """A heading, the table by kind of mask, and the NSP accuracy; nothing where the evaluation has no MLM figure."""
    rows = [[name, *held_out_cells(evaluation, prefix)] for prefix, name in KINDS]
    rows = [row for row in rows if any(row[1:])]
    if not rows:
        return []
    header = ["tokens", "loss (nats)", "without context", "below the line", "accuracy"]
    shown = [0, *(column for column in range(1, len(header)) if any(row[column] for row in rows))]
    table = figures_table([header[column] for column in shown], [[row[column] for column in shown] for row in rows])
    return [heading(evaluation.title), table, *(paragraph(text) for text in held_out_sentences(evaluation))]


def held_out_cells(evaluation: HeldOutFigures, prefix: str) -> list[str]:
    loss = evaluation.get(f"{prefix}loss" if prefix else "mlm_loss")
    line = evaluation.get(f"{prefix}context_free_loss" if prefix else "context_free_mlm_loss")
    accuracy = evaluation.get(f"{prefix}accuracy" if prefix else "mlm_accuracy")
    below = "" if loss is None or line is None else f"{line - loss:+.3f}".replace("-", "−")
    return [*("" if value is None else f"{value:.3f}" for value in (loss, line)), below,
            "" if accuracy is None else percent(accuracy)]


def held_out_sentences(evaluation: HeldOutFigures) -> list[str]:
    sentences = []
    if (share := evaluation.get("context_free_mlm_accuracy")) is not None:
        sentences.append(f"A model without context has {percent(share)} of all these tokens right.")
    if (accuracy := evaluation.get("nsp_accuracy")) is not None:
        larger = evaluation.get("nsp_larger_class")
        beside = f"; always naming the larger class has {percent(larger)}" if larger is not None else ""
        sentences.append(f"NSP accuracy {percent(accuracy)}{beside}.")
    counts = [f"{count(evaluation.get(key))} {name}" for key, name in
              (("masked_tokens", "masked tokens"), ("sequences", "sequences")) if evaluation.get(key)]
    return sentences + ([f"Measured on {' in '.join(counts)}."] if counts else [])


def examples_section(examples: list[dict]) -> str:
    return section("Words for [MASK]", *(example_card(example) for example in examples if example["masks"]))


def example_card(example: dict) -> str:
    sentence = escape(example["sentence"]).replace("[MASK]", "<mark>[MASK]</mark>")
    masks = [mask_columns(mask, number if len(example["masks"]) > 1 else 0)
             for number, mask in enumerate(example["masks"], 1)]
    return f'<article><p class="sentence">{sentence}</p>\n{"".join(masks)}</article>'


def mask_columns(mask: dict, number: int) -> str:
    """The words of the model beside those of the word frequencies; `number` counts a sentence's masks, 0 = only one."""
    columns = "".join(
        f"<div><h4>{title}</h4>{bars([share_bar(word, share) for word, share in mask.get(key, [])[:BAR_WORDS]])}</div>"
        for key, title in (("words", "the model"), ("frequent", "frequency alone")) if mask.get(key))
    parts = [f'<h4 class="number">[MASK] {number}</h4>' if number else "",
             f'<div class="pair">{columns}</div>' if columns else "",
             paragraph(truth, "truth") if (truth := true_word_text(mask)) else ""]
    return "".join(parts)


def true_word_text(mask: dict) -> str:
    if mask.get("true_word") is None:
        return ""
    ranks = [f"rank {count(mask[key])} {whose}" for key, whose in
             (("rank", "for the model"), ("frequency_rank", "by frequency")) if mask.get(key) is not None]
    return f"True word: “{mask['true_word']}”" + (f", {', '.join(ranks)}" if ranks else "") + "."
