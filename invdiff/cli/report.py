"""A report of a posterior: the figure as PNG, or a self-contained page with the figure and the provenance."""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invdiff.errors import StoreError
from invdiff.io.atomic import whole_file

if TYPE_CHECKING:
    from invdiff.posterior import Posterior

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #222; }
img { max-width: 100%; }
table { border-collapse: collapse; }
td, th { text-align: left; vertical-align: top; padding: .2rem 1.2rem .2rem 0; }
th { font-weight: 500; color: #666; white-space: nowrap; }
td { overflow-wrap: anywhere; }
details { margin-top: 1rem; } summary { cursor: pointer; color: #666; }
"""


def write_report(posterior: Posterior, path: Path, facts: dict[str, Any], case: int = 0) -> Path:
    """Write a report as ``.png`` or ``.html``, whole or not at all.

    Args:
        posterior: What to report on.
        path: Where to; the suffix decides.
        facts: Names and values shown above the provenance of a page.
        case: Which case is pictured.
    """
    from invdiff.figures import png_bytes, save_png, summary_figure

    figure = summary_figure(posterior, case)
    if path.suffix.lower() == ".png":
        return save_png(figure, path)
    page = html_page(posterior, png_bytes(figure), facts)
    try:
        with whole_file(path) as temporary:
            temporary.write_text(page, encoding="utf-8")
    except OSError as error:
        raise StoreError(f"{path} could not be written ({error.strerror}); nothing was left behind.") from error
    return path


def html_page(posterior: Posterior, png: bytes, facts: dict[str, Any]) -> str:
    """Return a page that needs nothing else: picture inside, no script, every text escaped."""
    title = html.escape(posterior.title)
    picture = base64.b64encode(png).decode()
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body>\n<h1>{title}</h1>\n"
        f'<img alt="mean, spread and draws" src="data:image/png;base64,{picture}">\n'
        f"<h2>Facts</h2>\n{_rows({**posterior.facts(), **facts})}\n"
        f"<details open><summary>Provenance</summary>\n{_rows(posterior.provenance)}\n</details>\n</body></html>\n"
    )


def _rows(values: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><th>{html.escape(str(name))}</th><td>{html.escape(_text(value))}</td></tr>"
        for name, value in values.items()
    )
    return f"<table>{rows}</table>"


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{k} = {_text(v)}" for k, v in value.items())
    return value if isinstance(value, str) else json.dumps(value, default=str)
