"""Draws the learning rates of all schedules, for docs/training.md.

    python tools/draw_schedules.py [--output docs/lr_schedules.png]
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from common import cli  # noqa: E402
from optim.lr_schedule import SCHEDULES, learning_rate  # noqa: E402

STEPS, WARMUP = 1000, 0.1


def main(argv=None) -> None:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default=ROOT / "docs" / "lr_schedules.png", help="the picture's file")
    draw(parser.parse_args(argv).output)


def draw(path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    for name in SCHEDULES:
        axes.plot([step / STEPS for step in range(1, STEPS + 1)],
                  [learning_rate(step, 1.0, WARMUP, STEPS, name) for step in range(1, STEPS + 1)], label=name)
    axes.set(xlabel="step / --max_steps", ylabel="rate / --learning_rate", title=f"--warmup_proportion {WARMUP}")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    cli.run(main)
