"""Draw a run's losses, learning rate, throughput and held-out accuracy over its steps, or write a report on it.

    python3 plot_training.py results/phase1.json results/phase2.json --output curves.png
    python3 plot_training.py results/phase1.json results/phase2.json --report report.html

The log of a resumed run or of its second phase (--resume_from_checkpoint, the same --output_dir) is joined to the
first into one curve.  Other logs are separate runs.
"""

from common import cli
from common.errors import UserError
from common.files import replacing
from training.curves import RunCurves, add_curves, draw_panel, panels_of

PICTURE = "training.png"  # unless --output names another

def main(argv=None) -> None:
    args = parse_arguments(argv)
    runs: list[RunCurves] = []
    for log in args.logs:
        add_curves(runs, log)
    if not any(run.curves for run in runs):
        raise UserError(f"{', '.join(args.logs)}: no training step in it")
    if args.report:
        from training.report.page import write_report

        write_report(runs, args.report, args.evaluation, args.examples)
        print(f"wrote {args.report}")
    if args.output or not args.report:
        draw_panels(runs, args.output or PICTURE)
        print(f"drew {args.output or PICTURE}")


def parse_arguments(argv):
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("logs", nargs="+", type=cli.path_or_url, metavar="LOG",
                        help="log files, paths or URLs (--json_summary of run_pretraining.py)")
    parser.add_argument("--output", metavar="FILE", help=f"the picture, PNG (default: {PICTURE}; with --report: none)")
    parser.add_argument("--report", metavar="FILE", help="write a report, one HTML file: verdict, curves, held-out "
                        "figures, data, settings, and the commands that repeat the runs")
    parser.add_argument("--evaluation", nargs="+", default=[], metavar="FILE",
                        help="outputs of evaluate.py --json, for the report's tables")
    parser.add_argument("--examples", metavar="FILE", help="words for [MASK], JSON, for the report")
    args = parser.parse_args(argv)
    for flag in ("evaluation", "examples"):
        if getattr(args, flag) and not args.report:
            parser.error(f"--{flag} needs --report")
    return args


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
