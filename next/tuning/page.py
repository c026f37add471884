"""The report as one HTML file that needs nothing beside it: no network, no script."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from next.storage import write_whole

_STYLE = """
:root { color-scheme: light; --ink: #222; --faint: #d9d9d9; --blue: #0072b2; --soft: #f4f6f8; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 78rem; color: var(--ink);
       font: 16px/1.5 system-ui, "DejaVu Sans", sans-serif; background: #fff; }
h1 { font-size: 1.6rem; margin: .2rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; border-bottom: 2px solid var(--faint); }
p, li { max-width: 62rem; } .note { color: #555; font-size: .9rem; }
.facts { display: flex; flex-wrap: wrap; gap: .6rem; padding: 0; margin: .8rem 0; }
.facts li { list-style: none; background: var(--soft); border-radius: .5rem; padding: .5rem .9rem; }
.facts b { display: block; font-size: 1.25rem; }
.verdict { border-left: .35rem solid var(--faint); padding: .3rem .8rem; margin: .5rem 0; }
.verdict.yes { border-color: #009e73; } .verdict.no { border-color: #8a8a8a; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; white-space: nowrap; }
th { border-bottom: 2px solid var(--ink); vertical-align: bottom; }
td { border-bottom: 1px solid var(--faint); } td.text, th.text { text-align: left; }
tr.dim td { color: #757575; } tr.first td { background: #eaf4fb; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr));
        gap: 1rem; align-items: start; }
figure { margin: 0; border: 1px solid var(--faint); border-radius: .5rem; padding: .6rem;
         min-width: 0; }
figure img { width: 100%; height: auto; display: block; }
figcaption { font-size: .9rem; color: #444; margin-top: .4rem; }
.wide { grid-column: 1 / -1; } .wide.scroll img { min-width: 44rem; }
@media (max-width: 480px) { body { padding: .6rem; } h1 { font-size: 1.3rem; } }
@media print { figure { break-inside: avoid; } }
"""


class Picture(NamedTuple):
    """A PNG and what it says."""

    path: Path
    caption: str
    wide: bool = False
    """Takes a whole row, and scrolls sideways on a small screen."""


class Section(NamedTuple):
    """A part of the page."""

    title: str
    body: str
    """HTML."""


def write_page(path: Path, title: str, lead: str, sections: Sequence[Section]) -> Path:
    """Write the page, whole or not at all.

    Args:
        path: of the HTML file.
        title: of the page.
        lead: HTML below the title.
        sections: in their order.
    """
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>",
        lead,
        *(f"<h2>{html.escape(part.title)}</h2>\n{part.body}" for part in sections),
        "</body></html>",
    ]
    return write_whole(path, "\n".join(parts))


def text(value: object) -> str:
    """Text within HTML."""
    return html.escape(str(value))


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Figures with their names."""
    items = "".join(f"<li>{text(name)}<b>{text(value)}</b></li>" for name, value in pairs)
    return f'<ul class="facts">{items}</ul>'


def table(
    names: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    words: Sequence[int] = (),
    classes: Sequence[str] = (),
) -> str:
    """A table that scrolls within the page.

    Args:
        names: of the columns.
        rows: cells.
        words: columns that hold text, which stands left.
        classes: of each row; empty: none.
    """

    def cells(tag: str, values: Sequence[object]) -> str:
        return "".join(
            f"<{tag}{' class=text' if place in words else ''}>{text(value)}</{tag}>"
            for place, value in enumerate(values)
        )

    body = "".join(
        f'<tr class="{classes[index] if classes else ""}">{cells("td", row)}</tr>'
        for index, row in enumerate(rows)
    )
    head = f"<thead><tr>{cells('th', names)}</tr></thead>"
    return f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'


def gallery(pictures: Sequence[Picture]) -> str:
    """Pictures side by side where there is room."""
    return f'<div class="grid">{"".join(map(_figure, pictures))}</div>'


def _figure(picture: Picture) -> str:
    data = base64.b64encode(picture.path.read_bytes()).decode()
    caption = text(picture.caption)
    return (
        f'<figure class="{"wide scroll" if picture.wide else ""}">'
        f'<img alt="{caption}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )
