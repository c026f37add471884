"""The files that captions come in: JSON lists of ``{"item": file name, "description": text}``."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import PurePosixPath

from next.data.source.listing import as_stored, composed
from next.data.wording import count, some
from next.storage import Folder


class CaptionFiles:
    """The caption files below a source, each read once, and which of their items were taken."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.texts: dict[str, dict[str, str]] = {}
        self.takers: dict[str, dict[tuple[str, str], str]] = {}

    def take(self, path: str, names: Iterable[str], split: str, sample: str) -> str | None:
        """The text of the first of ``names`` that the file has, for one sample of a split.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not what it should be, or the item is another sample's already.
        """
        if path not in self.texts:
            try:
                data = self.folder.read(as_stored(self.folder, path))
            except FileNotFoundError as error:
                raise FileNotFoundError(
                    f"{error}; put the caption files where the card says, or do without "
                    f"(--no-captions)"
                ) from None
            self.texts[path] = read_captions(f"{self.folder.uri}/{path}", data)
            self.takers[path] = {}
        for name in map(composed, names):
            if name in self.texts[path]:
                taker = self.takers[path].setdefault((split, name), sample)
                if taker != sample:
                    raise ValueError(
                        f"{self.folder.uri}/{path}: the item {name} is the caption of both {taker} "
                        f"and {sample}; tell them apart by {{folder}} in captions.names of the card"
                    )
                return self.texts[path][name]
        return None

    def unused(self) -> dict[str, int]:
        """Items without an image, by file.

        Raises:
            ValueError: no item of a file belongs to any image.
        """
        left = {}
        for path, texts in sorted(self.texts.items()):
            taken = {name for _, name in self.takers[path]}
            if texts and not taken:
                raise ValueError(
                    f"{self.folder.uri}/{path}: none of its {count(len(texts), 'item')} is called "
                    f"like an image; there is {some(texts)}; mend captions.names in the card"
                )
            if len(texts) > len(taken):
                left[path] = len(texts) - len(taken)
        return left


def read_captions(where: str, data: bytes) -> dict[str, str]:
    """Descriptions by item, extension removed, of a list of ``{"item", "description"}``.

    Args:
        where: names the file in errors.
        data: its bytes, UTF-8.

    Raises:
        ValueError: not JSON, not such a list, or two items of one name with different texts; the
            message names file and position.
    """
    try:
        items = json.loads(data.decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    rule = 'a caption file is a list of {"item": file name, "description": text}'
    if not isinstance(items, list):
        raise ValueError(f"{where}: {rule}, but it holds a {type(items).__name__}")
    texts: dict[str, str] = {}
    for position, item in enumerate(items, start=1):
        for key in ("item", "description"):
            if not isinstance(item, dict) or not isinstance(item.get(key), str):
                shown = json.dumps(item, ensure_ascii=False)[:80]
                raise ValueError(f'{where}: {rule}, but entry {position} has no "{key}": {shown}')
            if _lone_surrogate(item[key]):
                raise ValueError(
                    f"{where}: entry {position} has half of a surrogate pair in its {key!r}, which "
                    f"is no character: {json.dumps(item[key])[:80]}; remove it"
                )
        name = composed(PurePosixPath(item["item"]).stem)
        if texts.setdefault(name, item["description"]) != item["description"]:
            raise ValueError(
                f"{where}: entry {position} describes {item['item']} a second time and otherwise; "
                f"remove one of the two"
            )
    return texts


def _lone_surrogate(text: str) -> bool:
    """Whether a text cannot be written, as JSON may name half of a character."""
    return any("\ud800" <= mark <= "\udfff" for mark in text)
