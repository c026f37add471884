"""The pages of a service: one HTML file that loads nothing from elsewhere, and its interface.

What came from others (names of samples, texts of errors) is put into a page as text and never as
HTML, and the policy in :data:`PAGE_HEADERS` forbids every script and style but those in the file.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

_FOLDER = Path(__file__).parent


@cache
def search_page() -> str:
    """The page where a person searches by images."""
    return (_FOLDER / "page.html").read_text(encoding="utf-8")


def documentation(openapi: Mapping[str, Any]) -> str:
    """The interface as a page, without a script.

    Args:
        openapi: the description that ``/openapi.json`` has.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string((_FOLDER / "interface.html").read_text(encoding="utf-8"))
    return page.render(
        title=openapi["info"]["title"],
        version=openapi["info"]["version"],
        operations=[
            (method.upper(), path, operation)
            for path, methods in openapi["paths"].items()
            for method, operation in methods.items()
        ],
        schemas=openapi["components"]["schemas"],
    )


def _hashes(tag: str) -> str:
    """Of the inline blocks of both pages, as a policy names them."""
    found = []
    for name in ("page.html", "interface.html"):
        text = (_FOLDER / name).read_text(encoding="utf-8")
        for block in re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL):
            digest = hashlib.sha256(block.encode()).digest()
            found.append(f"'sha256-{base64.b64encode(digest).decode()}'")
    return " ".join(found)


PAGE_HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; script-src {_hashes('script')}; style-src {_hashes('style')}; "
        "img-src data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""Of every page."""
