"""Draw a run's losses, learning rate, throughput and held-out accuracy over its steps.

    python3 plot_training.py results/phase1.json results/phase2.json --output curves.png

The log of a resumed run or of its second phase (--resume_from_checkpoint, the same --output_dir) is joined to the
first into one curve.  Other logs are separate runs.
"""

from common import cli
from common.errors import UserError
from common.files import replacing
from training.curves import RunCurves, add_curves, draw_panel, panels_of


def main(argv=None) -> None:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("logs", nargs="+", metavar="LOG", help="log files (--json_summary of run_pretraining.py)")
    parser.add_argument("--output", default="training.png", help="the picture, PNG")
    args = parser.parse_args(argv)
    runs: list[RunCurves] = []
    for log in args.logs:
        add_curves(runs, log)
    if not any(run.curves for run in runs):
        raise UserError(f"{', '.join(args.logs)}: no training step in it")
    draw_panels(runs, args.output)
    print(f"drew {args.output}")


def draw_panels(runs: list[RunCurves], output: str) -> None:
    """Draw a panel for each figure that a run has, two in a row, into a PNG file."""
    from matplotlib.figure import Figure

    panels = panels_of(runs)
    figure = Figure(figsize=(12, 3.2 * -(-len(panels) // 2)), layout="constrained")
    axes = figure.subplots(-(-len(panels) // 2), 2, squeeze=False).flatten()
    for axis, panel in zip(axes, panels, strict=False):
        draw_panel(axis, panel, runs, [f"C{number}" for number in range(len(runs))])
    for axis in axes[len(panels):]:
        axis.remove()
    if sum(bool(run.curves) for run in runs) > 1:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center")
    with replacing(output) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


if __name__ == "__main__":
    cli.run(main)
