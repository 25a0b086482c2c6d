"""A report of one run or several: one HTML file that needs no other.  No torch here."""

from html import escape
from string import Template

from common.files import replacing
from training.curves import RunCurves
from training.report import results, settings
from training.report.inputs import read_evaluation, read_examples
from training.report.markup import count

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style</style>
</head>
<body>
<header>
<h1>$title</h1>
$subtitle
</header>
<main>
$sections
</main>
</body>
</html>
""")

STYLE = """
:root { color-scheme: light dark; --text: #1c2024; --soft: #5b6570; --back: #fff; --card: #f5f7f9; --edge: #d9dfe5;
  --accent: #2b7bd6; --good: #1f9d61; --bad: #d97706; --mark: #ffe9a8; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e8ec; --soft: #9ba6b1; --back: #14171a; --card: #1d2226;
  --edge: #353c43; --mark: #5c4a10; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 68rem; color: var(--text); background: var(--back);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; padding-bottom: .2rem; border-bottom: 1px solid var(--edge); }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
h4 { font-size: .85rem; font-weight: 600; color: var(--soft); margin: .4rem 0; }
p { margin: .5rem 0; }
.note, .subtitle { color: var(--soft); font-size: .9rem; }
.verdict { padding: .7rem 1rem; background: var(--card); border-left: 5px solid var(--bad); border-radius: 4px; }
.verdict.good { border-color: var(--good); }
.verdict strong { display: block; font-size: 1.15rem; }
.pictures { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1rem; }
figure { margin: 0; }
svg { display: block; width: 100%; max-width: 100%; height: auto; }
svg text { font-family: system-ui, sans-serif !important; }
.legend { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: .9rem; }
.legend i { display: inline-block; width: 1.4em; height: .3em; margin-right: .5em; vertical-align: middle; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; }
th, td { padding: .35rem .8rem .35rem 0; text-align: left; vertical-align: top; font-weight: normal;
  border-bottom: 1px solid var(--edge); font-variant-numeric: tabular-nums; overflow-wrap: break-word; }
thead th, tbody th { color: var(--soft); }
.figures td, .figures thead th:not(:first-child) { text-align: right; }
article { margin: .8rem 0; padding: .6rem 1rem; background: var(--card); border-radius: 6px; break-inside: avoid; }
.sentence { font-size: 1.05rem; }
mark { background: var(--mark); color: inherit; padding: 0 .2em; border-radius: 3px; }
.pair { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 0 2rem; }
.truth { font-size: .9rem; }
.bars { list-style: none; margin: .2rem 0 .6rem; padding: 0; font-size: .9rem; max-width: 32rem; }
.bars li { display: grid; grid-template-columns: 8rem minmax(0, 1fr) 4.2rem; gap: .6rem; align-items: center; }
.bar { height: .65rem; background: var(--edge); border-radius: 2px; }
.bar i { display: block; height: 100%; background: var(--accent); border-radius: 2px; }
.share { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.rows { max-width: 32rem; }
.row { display: flex; margin: .25rem 0; background: var(--edge); border-radius: 2px; overflow: hidden; }
.row i { flex: none; font: .75rem/1.2rem system-ui, sans-serif; color: #fff; background: var(--accent);
  text-align: center; overflow: hidden; border-right: 1px solid var(--back); }
.row i:nth-child(even) { background: var(--good); }
pre { padding: .7rem 1rem; background: var(--card); border-radius: 6px; font-size: .82rem; white-space: pre-wrap;
  word-break: break-all; }
@media (max-width: 700px) { .pictures, .pair { grid-template-columns: minmax(0, 1fr); }
  body { padding: .8rem; } }
@media print { :root { color-scheme: light; --text: #000; --soft: #444; --back: #fff; --card: #f5f7f9; --edge: #ccc;
    --mark: #ffe9a8; }
  html { font-size: 12px; }
  body { max-width: none; font-size: 1rem; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  h2, h3 { break-after: avoid; }
  figure, tr, article, .verdict, .rows { break-inside: avoid; }
  .wide { overflow: visible; } }
"""


def write_report(runs: list[RunCurves], output: str, evaluations: list[str], examples: str | None) -> None:
    """Write the page from runs and the named files.  UserError where a file is not what it should be."""
    logged = results.logged_evaluations(runs)
    files = [results.HeldOutFigures(path, read_evaluation(path)) for path in evaluations]
    sections = [
        results.verdict_section(logged, files), results.curves_section(runs),
        results.held_out_section([*files, *logged]),
        results.examples_section(read_examples(examples) if examples else []),
        settings.data_section(runs), settings.settings_section(runs), settings.commands_section(runs),
    ]
    text = PAGE.substitute(title=escape(page_title(runs)), style=STYLE, subtitle=subtitle(runs),
                           sections="\n".join(filter(None, sections)))
    with replacing(output) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # names of files may be anything


def page_title(runs: list[RunCurves]) -> str:
    models = dict.fromkeys(str(run.parameters[0]["bert_model"]) for run in runs
                           if run.parameters and "bert_model" in run.parameters[0])
    return "Pre-training of " + ", ".join(models or [run.name for run in runs])


def subtitle(runs: list[RunCurves]) -> str:
    """Each run with the step that it reached."""
    return "\n".join(f'<p class="subtitle">{escape(run.name)}: {count(run.phases()[-1][1], "step")}'
                     f'{" over two phases" if len(run.phases()) > 1 else ""}</p>' for run in runs if run.phases())
