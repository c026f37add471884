"""Queries against a gallery, and what they find: as JSON, as a table, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from next.config import near_matches
from next.data.labels import Labels
from next.data.loading.decoding import decode
from next.data.source.pixels import plain
from next.evaluation.ranking.metrics import RULES, check_rule
from next.pictures.model.rank_lists import RankList, Shown, rank_lists
from next.retrieval.embed import Model
from next.retrieval.gallery import Gallery, Known, require_model
from next.retrieval.search import Ranked, search
from next.retrieval.sources import open_origin

MOST_DRAWN = 8
"""Queries of one picture."""
_NOTHING = -1


@dataclass(frozen=True, eq=False)
class Query:
    """What searches."""

    names: list[str]
    """[Q] sample names, or what was given."""
    features: np.ndarray
    """float32 [Q, F]."""
    labels: Labels
    """-1 where something is not known."""
    own: np.ndarray
    """[Q] gallery row that is the query itself, which it never finds; -1: there is none."""
    gallery: Gallery | None
    """The gallery that they are rows of; None: they are files."""
    rows: list[int]
    """[Q] rows of that gallery."""
    files: Mapping[str, str]
    """Modality -> image of the one query that is files."""


@dataclass(frozen=True, eq=False)
class Results:
    """What queries found."""

    query: Query
    gallery: Gallery
    ranked: Ranked
    rule: str
    found: list[list[Known]]
    """[Q][k] nearest first."""

    def as_json(self) -> dict[str, Any]:
        """Everything, with the digests of model and gallery."""
        return {
            "model": self.gallery.facts.model,
            "gallery": self.gallery.digest,
            "data": self.gallery.facts.data,
            "rows": len(self.gallery),
            "rule": self.rule,
            "queries": [
                {
                    "query": name,
                    "pid": _known(self.query.labels.pid[place]),
                    "camera": _known(self.query.labels.camera[place]),
                    "removed_by_rule": int(self.ranked.removed[place]),
                    "results": [
                        {"rank": rank, "distance": round(float(distance), 6), **one._asdict()}
                        for rank, (one, distance) in enumerate(
                            zip(self.found[place], self.ranked.distances[place], strict=False), 1
                        )
                    ],
                }
                for place, name in enumerate(self.query.names)
            ],
        }


def of_files(
    gallery: Gallery,
    model: Model,
    images: Mapping[str, str],
    captions: Mapping[str, str],
    *,
    pid: int | None = None,
    camera: int | None = None,
) -> Query:
    """One query: the images of a sample by modality.

    Args:
        gallery: that is searched.
        model: that embedded it.
        images: modality -> file.
        captions: modality -> text.
        pid: identity, if it is known.
        camera: if it is known.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the model is not the gallery's, or takes no such modality, or an image cannot be
            used.
    """
    require_model(gallery, model.digest)
    columns = {f"image_{name}": [path] for name, path in images.items()}
    columns |= {f"caption_{name}": [text] for name, text in captions.items()}
    found = model.embed(columns | {"camera": [_NOTHING if camera is None else camera]})
    known = [_NOTHING if value is None else value for value in (pid, camera)]
    names = np.array([" ".join(f"{name}={path}" for name, path in images.items())])
    labels = Labels(names, *(np.array([one]) for one in (*known, _NOTHING)))
    return Query(list(map(str, names)), found, labels, np.array([-1]), None, [0], dict(images))


def of_rows(gallery: Gallery, queries: Gallery, samples: Sequence[str] = ()) -> Query:
    """Rows of a gallery as queries.

    Args:
        gallery: that is searched.
        queries: whose rows search; may be ``gallery`` itself.
        samples: names; empty: all rows.

    Raises:
        ValueError: another model, or no sample of this name.
    """
    require_model(gallery, queries.facts.model)
    labels = queries.labels()
    rows = list(range(len(queries)))
    if samples:
        place = {name: row for row, name in enumerate(labels.sample_id.tolist())}
        missing = [name for name in samples if name not in place]
        if missing:
            near = near_matches(missing[0], list(place))
            raise ValueError(
                f"{queries.folder.uri} has no sample {missing[0]!r}"
                + (f"; did you mean {near[0]}?" if near else "")
            )
        rows = [place[name] for name in samples]
    same = queries.facts.data == gallery.facts.data
    own = np.array(rows) if same else np.full(len(rows), -1)
    taken = labels.take(np.array(rows))
    names = list(map(str, taken.sample_id))
    return Query(names, queries.embeddings(rows), taken, own, queries, rows, {})


def search_gallery(
    gallery: Gallery,
    query: Query,
    *,
    top: int = 10,
    rule: str | None = None,
    whole: bool = False,
    device: torch.device | str = "cpu",
) -> Results:
    """The nearest gallery samples of each query; see :func:`next.retrieval.search.search`.

    Args:
        gallery: that is searched.
        query: by the same model.
        top: results of a query.
        rule: None: the card's.
        whole: compare samples of other modalities over the whole feature.
        device: where the products are made.

    Raises:
        ValueError: no such rule, or a part of the gallery is damaged.
    """
    rule = gallery.facts.rule if rule is None else rule
    if rule not in RULES:
        check_rule(rule, query.labels, query.labels)
    ranked = search(
        query.features,
        gallery.blocks(),
        top=top,
        layout=None if whole else gallery.facts.layout,
        labels=query.labels,
        rule=rule,
        own=query.own,
        device=device,
    )
    rows = np.unique(ranked.rows[ranked.rows >= 0])
    known = dict(zip(rows.tolist(), gallery.known(rows.tolist()), strict=True))
    found = [[known[row] for row in of.tolist() if row >= 0] for of in ranked.rows]
    return Results(query, gallery, ranked, rule, found)


def table(results: Results) -> list[str]:
    """The results as lines of text."""
    lines = [
        f"gallery {results.gallery.digest[:16]}, model {results.gallery.facts.model[:16]}, "
        f"{len(results.gallery)} rows, rule {results.rule}"
    ]
    for place, name in enumerate(results.query.names):
        removed = int(results.ranked.removed[place])
        lines += [
            "",
            f"query {name}" + (f" ({removed} rows left out by the rule)" if removed else ""),
            f"{'rank':>4}  {'distance':>8}  {'pid':>7}  {'camera':>6}  {'modalities':<14} sample",
        ]
        for rank, one in enumerate(results.found[place], 1):
            pid, camera = ("-" if value is None else value for value in (one.pid, one.camera))
            lines.append(
                f"{rank:>4}  {results.ranked.distances[place, rank - 1]:>8.4f}  {pid:>7}  "
                f"{camera:>6}  {'+'.join(one.modalities):<14} {one.sample_id}"
                + (f"  {one.time}" if one.time else "")
            )
    return lines


def draw_results(path: Path, gallery: Gallery, query: Query, results: Results) -> Path:
    """A contact sheet: queries (the first :data:`MOST_DRAWN`) with what they found.

    Raises:
        OSError: the images that the gallery was made of cannot be read.
        ValueError: they do not fit their card any more.
    """
    drawn = range(min(MOST_DRAWN, len(query.names)))
    wanted = sorted({one.row for place in drawn for one in results.found[place]})
    source = open_origin(gallery.facts.origin)
    known = {one.row: one for place in drawn for one in results.found[place]}
    names = [known[row].sample_id for row in wanted]
    pictures = dict(zip(wanted, source.images(names, wanted), strict=True))
    lists = []
    for place in drawn:
        pid = int(query.labels.pid[place])
        found = results.found[place]
        lists.append(
            RankList(
                title=f"Query {_short(query, place)}",
                query=_shown(gallery, _query_images(query, place), _label(query.labels, place)),
                results=[
                    _shown(gallery, pictures[one.row], _caption(one.pid, one.camera))
                    for one in found
                ],
                distances=results.ranked.distances[place, : len(found)],
                right=None if pid < 0 else np.array([one.pid == pid for one in found]),
            )
        )
    return rank_lists(path, lists, modalities=gallery.facts.modalities)


def _short(query: Query, place: int) -> str:
    """The name of a query in a picture, where a path has no room."""
    return f"by {' and '.join(query.files)}" if query.files else query.names[place]


def _query_images(query: Query, place: int) -> dict[str, bytes]:
    if query.gallery is None:
        return {name: Path(path).read_bytes() for name, path in query.files.items()}
    row = query.rows[place]
    return open_origin(query.gallery.facts.origin).images([query.names[place]], [row])[0]


def _shown(gallery: Gallery, images: Mapping[str, bytes], caption: str) -> Shown:
    facts = gallery.facts
    depth = facts.origin.card.depth
    pixels = np.zeros((len(facts.modalities), *facts.image_size, 3), dtype=np.uint8)
    present = np.array([name in images for name in facts.modalities])
    for place in np.flatnonzero(present):
        name = facts.modalities[place]
        pixels[place] = decode(plain(images[name], depth.get(name)), facts.image_size)
    return Shown(images=pixels, caption=caption, present=present)


def _label(labels: Labels, place: int) -> str:
    return _caption(_known(labels.pid[place]), _known(labels.camera[place]))


def _caption(pid: int | None, camera: int | None) -> str:
    return ("?" if pid is None else f"{pid}") + ("" if camera is None else f"\ncam {camera}")


def _known(value: Any) -> int | None:
    return int(value) if value >= 0 else None
