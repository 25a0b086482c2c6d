"""Parts of an HTML page from plain text.  All text is escaped here.  No torch here."""

import math
from html import escape


def section(title: str, *contents: str) -> str:
    """A section of the page; empty where it has no contents."""
    body = "\n".join(content for content in contents if content)
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>" if body else ""


def heading(title: str) -> str:
    return f"<h3>{escape(title)}</h3>"


def paragraph(text: str, css_class: str = "") -> str:
    return f'<p class="{css_class}">{escape(text)}</p>' if css_class else f"<p>{escape(text)}</p>"


def figures_table(header: list[str], rows: list[list[str]]) -> str:
    """A table of numbers, whose first column names the rows."""
    return table_of("figures", header, [(name, "".join(f"<td>{escape(cell)}</td>" for cell in cells))
                                        for name, *cells in rows])


def columns_table(columns: dict[str, dict[str, str]]) -> str:
    """A table of several columns, each a dictionary of row names; a row is left out where no column has it.

    What is the same in all columns is written once, across them.
    """
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    rows = []
    for name in names:
        cells = [column.get(name, "") for column in columns.values()]
        rows.append((name, f'<td colspan="{len(cells)}">{escape(cells[0])}</td>' if len(set(cells)) == 1
                     else "".join(f"<td>{escape(cell)}</td>" for cell in cells)))
    return table_of("columns", ["", *columns], rows) if rows else ""


def table_of(css_class: str, header: list[str], rows: list[tuple[str, str]]) -> str:
    """A table of rows, each a name and its cells in HTML.  It scrolls by itself where it is wider than the page."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "\n".join(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>' for name, cells in rows)
    return (f'<div class="wide"><table class="{css_class}">\n<thead><tr>{head}</tr></thead>\n'
            f"<tbody>\n{body}\n</tbody>\n</table></div>")


def share_bar(name: str, share: float, note: str = "") -> str:
    """A line of a list: a name, a bar as long as a share from 0 to 1, and the share in per cent."""
    width = 100 * min(max(share, 0.0), 1.0)
    return (f'<li><span class="name">{escape(name)}</span><span class="bar"><i style="width:{width:.2f}%"></i></span>'
            f'<span class="share">{escape(note or percent(share))}</span></li>')


def bars(lines: list[str]) -> str:
    return f'<ul class="bars">{"".join(lines)}</ul>' if lines else ""


def row_picture(lengths: list[float], row_length: float) -> str:
    """A packed row: its sequences one behind the other, the rest empty."""
    pieces = "".join(f'<i style="width:{100 * length / row_length:.2f}%">{length}</i>' for length in lengths)
    return f'<div class="row">{pieces}</div>'


def percent(share: float) -> str:
    """0.1234 → 12.3 %; two digits that count where the share is small."""
    if not 0 < abs(share) < 0.01:
        return f"{100 * share:.1f}\u00a0%"
    return f"{100 * share:.{min(6, 1 - math.floor(math.log10(abs(100 * share))))}f}\u00a0%"


def count(number: float, name: str = "") -> str:
    """1234, "step" → 1,234 steps."""
    return f"{number:,.0f}" + (f" {name}{'' if number == 1 else 's'}" if name else "")
