"""The report as one HTML file that needs nothing beside it: no network, no script.

What a page says is data; ``page.html`` lays it out and escapes every value, so that text which came
from others (a trial's files, an error) is shown and never part of the page.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import jinja2

from next.storage import write_whole


class Picture(NamedTuple):
    """A PNG and what it says."""

    path: Path
    caption: str
    wide: bool = False
    """Takes a whole row, and scrolls sideways on a small screen."""

    def base64(self) -> str:
        """The file, as an address within the page holds it."""
        return base64.b64encode(self.path.read_bytes()).decode()


@dataclass(frozen=True)
class Facts:
    """Figures with their names."""

    kind: ClassVar = "facts"
    pairs: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar = "text"
    words: str
    style: str = ""
    """Class of the style sheet in ``page.html``."""


@dataclass(frozen=True)
class Table:
    """A table that scrolls within the page."""

    kind: ClassVar = "table"
    names: Sequence[str]
    """Of the columns."""
    rows: Sequence[Sequence[object]]
    words: Sequence[int] = ()
    """Columns that hold text, which stands left."""
    styles: Sequence[str] = ()
    """Class of each row; empty: none has one."""


@dataclass(frozen=True)
class Gallery:
    """Pictures side by side where there is room."""

    kind: ClassVar = "gallery"
    pictures: Sequence[Picture]


@dataclass(frozen=True)
class Beside:
    """Blocks side by side where there is room."""

    kind: ClassVar = "beside"
    blocks: Sequence[Block]


Block = Facts | Text | Table | Gallery | Beside


class Section(NamedTuple):
    """A part of the page."""

    title: str
    blocks: Sequence[Block]


def write_page(path: Path, title: str, lead: Sequence[Block], sections: Sequence[Section]) -> Path:
    """Write the page, whole or not at all.

    Args:
        path: of the HTML file.
        title: of the page.
        lead: what stands below the title.
        sections: in their order.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    template = environment.get_template("page.html")
    return write_whole(path, template.render(title=title, lead=lead, sections=sections))
