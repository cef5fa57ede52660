"""One table three ways: aligned text, Markdown, HTML."""

from __future__ import annotations

import html
from collections.abc import Sequence

#: What stands where there is no value.
NONE = "–"


def text(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return aligned columns: the first to the left, the others to the right."""
    widths = [max(len(r[i]) for r in (headers, *rows)) for i in range(len(headers))]
    lines = []
    for row in (headers, *rows):
        first, rest = row[0].ljust(widths[0]), [c.rjust(w) for c, w in zip(row[1:], widths[1:])]
        lines.append("  ".join([first, *rest]).rstrip())
    return "\n".join(lines)


def markdown(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, bars escaped."""
    rule = ["---", *(["---:"] * (len(headers) - 1))]
    lines = [headers, rule, *([c.replace("|", "\\|") for c in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def to_html(headers: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> str:
    """Return an HTML table with notes below, every text escaped."""

    def line(tag: str, cells: Sequence[str]) -> str:
        style = 'style="text-align:{};padding:1px 8px"'
        shown = (
            f"<{tag} {style.format('left' if i == 0 else 'right')}>{html.escape(c)}</{tag}>"
            for i, c in enumerate(cells)
        )
        return f"<tr>{''.join(shown)}</tr>"

    body = "".join(line("td", row) for row in rows)
    below = "".join(f"<li>{html.escape(n)}</li>" for n in notes)
    return f"<table>{line('th', headers)}{body}</table>" + (f"<ul>{below}</ul>" if below else "")
