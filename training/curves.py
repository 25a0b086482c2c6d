"""The figures of runs over their steps, from their logs, and the panels that show them.  No torch here."""

from dataclasses import dataclass, field
from itertools import pairwise

from common.download import local_file
from training.log import FIGURES, Figure
from training.log_versions import read_current_log


@dataclass
class RunCurves:
    """The figures of a run: key → {step over both phases: value}."""

    name: str
    output_dir: str
    curves: dict[str, dict[int, float]] = field(default_factory=dict)
    phase2_start: int = 0  # the last step of phase 1; 0 where there is no phase 2
    parameters: list[dict] = field(default_factory=list)  # of each start and restart: flags and run_record()
    evaluation: dict = field(default_factory=dict)  # the figures of the last one in the log, and its step

    def add_step(self, step: int, data: dict) -> None:
        for key, value in data.items():
            if isinstance(value, int | float):
                self.curves.setdefault(key, {})[step] = value
        if "eval_mlm_loss" in data:
            self.evaluation = {"step": step, **data}

    def phases(self) -> list[tuple[int, int]]:
        """The steps (first, last] of each phase, as far as they were logged."""
        last = max((step for curve in self.curves.values() for step in curve), default=0)
        bounds = sorted({0, min(self.phase2_start, last), last})
        return list(pairwise(bounds))


def add_curves(runs: list[RunCurves], path: str) -> None:
    """Add the figures of one log, a path or URL, to the run that they belong to.

    Of a step that was logged twice, before and after an interruption, the last line counts.
    """
    run, offset = None, 0
    for line in read_current_log(local_file(path)):
        if line["step"] == "PARAMETER" or run is None:
            parameters = line["data"] if line["step"] == "PARAMETER" else {}
            run = run_of(runs, parameters, path)
            offset = parameters.get("phase1_end_step", 0) if parameters.get("phase2") else 0
            run.phase2_start = offset or run.phase2_start
            run.parameters += [parameters] if parameters else []
        if isinstance(line["step"], list) and line["step"]:
            run.add_step(line["step"][1] + offset, line["data"])


def run_of(runs: list[RunCurves], parameters: dict, path: str) -> RunCurves:
    """The run that these flags continue: the last one with their --output_dir where they resume, else a new one."""
    output_dir = parameters.get("output_dir", path)
    before = [run for run in runs if run.output_dir == output_dir]
    if before and parameters.get("resume_from_checkpoint"):
        return before[-1]
    runs.append(RunCurves(path if before else output_dir, output_dir))
    return runs[-1]


def panels_of(runs: list[RunCurves]) -> list[Figure]:
    """The figures that have a panel of their own, and that a run has."""
    return [figure for figure in FIGURES if figure.title and any(run.curves.get(figure.name) for run in runs)]


def draw_panel(axis, panel: Figure, runs: list[RunCurves], colors: list[str]) -> None:
    """Draw a figure of each run, the lines to compare it with, and a dotted line where phase 2 starts."""
    axis.set(title=panel.title, xlabel="optimizer step", ylabel=panel.unit)
    axis.grid(alpha=0.3)
    lines = [figure.name for figure in FIGURES if figure.line_in == panel.name]
    for run, color in zip(runs, colors, strict=True):
        draw_curve(axis, run, panel.name, color)
        for start, end, value in (segment for line in lines for segment in line_segments(run, line)):
            axis.hlines(value, start, end, linestyles="dashed", colors=color)


def draw_curve(axis, run: RunCurves, key: str, color: str) -> None:
    points = sorted(run.curves.get(key, {}).items())
    if not points:
        return
    axis.plot(*zip(*points, strict=True), marker="o" if len(points) < 15 else None, label=run.name, color=color)
    if run.phase2_start:
        axis.axvline(run.phase2_start, linestyle=":", color=color)


def line_segments(run: RunCurves, key: str) -> list[tuple[int, int, float]]:
    """Where the last value of a figure in each phase holds: the phase's first and last logged step, and the value.

    It is a figure of the data, so it is the same in the whole phase.
    """
    segments = []
    for start, end in run.phases():
        values = [value for step, value in sorted(run.curves.get(key, {}).items()) if start < step <= end]
        segments += [(start, end, values[-1])] if values else []
    return segments
