"""Draw a run's losses, learning rate, throughput and held-out accuracy over its steps.

    python3 plot_training.py results/phase1.json results/phase2.json --output curves.png

The log of a resumed run or of its second phase (--resume_from_checkpoint, the same --output_dir) is joined to the
first into one curve.  Other logs are separate runs.
"""

from dataclasses import dataclass, field

from common import cli
from common.errors import UserError
from common.files import replacing
from training.log import FIGURES, read_log


@dataclass
class RunCurves:
    """The figures of a run: key → {step over both phases: value}."""

    name: str
    output_dir: str
    curves: dict[str, dict[int, float]] = field(default_factory=dict)
    phase2_start: int = 0  # the last step of phase 1; 0 where there is no phase 2


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


def add_curves(runs: list[RunCurves], path: str) -> None:
    """Add the figures of one log file to the run that they belong to.

    Of a step that was logged twice, before and after an interruption, the last line counts.
    """
    run, offset = None, 0
    for line in read_log(path):
        if line["step"] == "PARAMETER" or run is None:
            parameters = line["data"] if line["step"] == "PARAMETER" else {}
            run = run_of(runs, parameters, path)
            offset = parameters.get("phase1_end_step", 0) if parameters.get("phase2") else 0
            run.phase2_start = offset or run.phase2_start
        if isinstance(line["step"], list) and line["step"]:
            for key, value in line["data"].items():
                if isinstance(value, int | float):
                    run.curves.setdefault(key, {})[line["step"][1] + offset] = value


def run_of(runs: list[RunCurves], parameters: dict, path: str) -> RunCurves:
    """The run that these flags continue: the last one with their --output_dir where they resume, else a new one."""
    output_dir = parameters.get("output_dir", path)
    before = [run for run in runs if run.output_dir == output_dir]
    if before and parameters.get("resume_from_checkpoint"):
        return before[-1]
    runs.append(RunCurves(path if before else output_dir, output_dir))
    return runs[-1]


def draw_panels(runs: list[RunCurves], output: str) -> None:
    """Draw a panel for each figure that a run has, with a dotted line where phase 2 starts.

    What can be reached without context, or by the larger class, is dashed.
    """
    from matplotlib.figure import Figure

    panels = [figure for figure in FIGURES if figure.title and any(figure.name in run.curves for run in runs)]
    figure = Figure(figsize=(12, 3.2 * -(-len(panels) // 2)), layout="constrained")
    axes = figure.subplots(-(-len(panels) // 2), 2, squeeze=False).flatten()
    for axis, panel in zip(axes, panels, strict=False):
        axis.set(title=panel.title, xlabel="optimizer step", ylabel=panel.unit)
        axis.grid(alpha=0.3)
        for number, run in enumerate(runs):
            draw_curve(axis, run, panel.name, f"C{number}")
            for line in FIGURES:
                if line.line_in == panel.name:
                    axis.plot(*points_of(run, line.name), linestyle="--", color=f"C{number}", alpha=0.6)
    for axis in axes[len(panels):]:
        axis.remove()
    if sum(bool(run.curves) for run in runs) > 1:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center")
    with replacing(output) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def points_of(run: RunCurves, key: str) -> tuple[list[int], list[float]]:
    """The steps and the values of a figure."""
    curve = run.curves.get(key, {})
    return sorted(curve), [curve[step] for step in sorted(curve)]


def draw_curve(axis, run: RunCurves, key: str, color: str) -> None:
    steps, values = points_of(run, key)
    if not steps:
        return
    axis.plot(steps, values, marker="o" if len(steps) < 15 else None, label=run.name, color=color)
    if run.phase2_start:
        axis.axvline(run.phase2_start, linestyle=":", color=color)


if __name__ == "__main__":
    cli.run(main)
