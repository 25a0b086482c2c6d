"""The curves of the runs as SVG pictures that stand in the page itself.  No torch here."""

import re
from dataclasses import replace
from html import escape
from io import StringIO
from itertools import cycle, islice

from training.curves import RunCurves, draw_panel, panels_of
from training.log import Figure

COLORS = ("#2b7bd6", "#d97706", "#1f9d61", "#c43d92", "#8463d9", "#8a7a1f")  # legible on white and on black
INK = "#0a0b0c"  # stands for the page's text colour, which depends on the reader's light or dark mode
SIZE = (4.5, 2.9)  # inches: 324 points wide, as a phone's screen, so that letters have their size there
MOST_POINTS = 600  # of a curve
STYLE = {"svg.fonttype": "none", "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK,
         "ytick.color": INK, "font.size": 10, "axes.titlesize": 11, "axes.spines.top": False,
         "axes.spines.right": False, "lines.linewidth": 1.6, "lines.markersize": 4}


def run_colors(runs: list[RunCurves]) -> list[str]:
    return list(islice(cycle(COLORS), len(runs)))


def curve_pictures(runs: list[RunCurves]) -> list[str]:
    """An SVG element for each panel."""
    short = [replace(run, curves={key: thinned(curve) for key, curve in run.curves.items()}) for run in runs]
    return [curve_picture(panel, short) for panel in panels_of(short)]


def curve_picture(panel: Figure, runs: list[RunCurves]) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Picture

    file = StringIO()
    with rc_context({**STYLE, "svg.hashsalt": panel.name}):  # the salt keeps the ids of two pictures apart
        picture = Picture(figsize=SIZE, layout="constrained")
        draw_panel(picture.subplots(), panel, runs, run_colors(runs))
        picture.savefig(file, format="svg", transparent=True,
                        metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return inline_svg(file.getvalue(), panel.title)


def inline_svg(document: str, title: str) -> str:
    """The svg element of an SVG file, without what only a file needs, as wide as its place in the page.

    Ids that nothing in it refers to go, because each picture has the same ones.
    """
    element = document[document.index("<svg"):].replace(INK, "currentColor")
    element = re.sub(r' xmlns(:\w+)?="[^"]*"', "", element)
    used = set(re.findall(r'#([\w-]+)["\')]', element))
    element = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", element)
    opening, rest = element.split(">", 1)
    opening = re.sub(r' (width|height|version)="[^"]*"', "", opening)
    return f'{opening} role="img" aria-label="{escape(title)}">{rest}'


def thinned(curve: dict[int, float]) -> dict[int, float]:
    """At most about MOST_POINTS of a curve's points: the first, the last, and extremes between, so that peaks stay."""
    points = sorted(curve.items())
    if len(points) <= MOST_POINTS:
        return curve
    size = -(-2 * len(points) // MOST_POINTS)
    kept = [points[0], points[-1]]
    for start in range(0, len(points), size):
        part = points[start:start + size]
        kept += [min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])]
    return dict(sorted(kept))
