"""Pieces of a source embedded by several processes: Ray Data feeds workers that hold the model.

The model's files travel through Ray's object store, and what a worker makes of a piece comes back
to the driver, which writes it: no node needs to see the driver's disk. Samples are read by each
worker, so every node must see them at the same address. A piece that is lost with a worker is given
to another one.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.data

from next.local_ray import ray_for_data
from next.retrieval.embed import Embed, Made, Model, embed_piece
from next.retrieval.gallery import GalleryFacts
from next.retrieval.sources import Source

Open = Callable[[Path, str], Model]
"""Makes a model of a folder, on a device."""


@contextmanager
def embedding_on_ray(
    open_model: Open,
    files: Mapping[str, bytes],
    facts: GalleryFacts,
    source: Source,
    *,
    workers: int,
    use_gpu: bool = False,
) -> Iterator[Embed]:
    """Embeds pieces on workers of Ray, which is joined or started for the block.

    Args:
        open_model: called on each worker with a folder of ``files``, and ``cpu`` or ``cuda``.
        files: of the model, by path.
        facts: of the gallery.
        source: what is embedded; every node must be able to read it.
        workers: processes, each with a CPU and, with ``use_gpu``, a GPU.
        use_gpu: where they compute.

    Raises:
        ConnectionError: nothing answers at ``RAY_ADDRESS``.
    """
    with ray_for_data(workers):
        shared = ray.put((dict(files), facts, source))

        def embed(pieces: Sequence[int]) -> Iterator[Made]:
            items = [{"piece": piece} for piece in pieces]
            made = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
                _Worker,
                fn_constructor_kwargs={
                    "open_model": open_model,
                    "shared": shared,
                    "device": "cuda" if use_gpu else "cpu",
                },
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(size=min(workers, len(items))),
                num_cpus=1,
                num_gpus=1 if use_gpu else None,
            )
            for batch in made.iter_batches(batch_size=None, prefetch_batches=0):
                for said, file in zip(batch["said"], batch["file"], strict=True):
                    answer = json.loads(said)
                    if "error" in answer:
                        raise _KINDS[answer["error"]](answer["message"])
                    yield Made(answer["piece"], answer["rows"], bytes(file))

        yield embed


_KINDS: dict[str, type[Exception]] = {"os": OSError, "value": ValueError}
"""What a user can mend. Raised on a worker, it would reach the driver as one of Ray's errors."""


class _Worker:
    """Embeds pieces; the model is read once."""

    def __init__(self, open_model: Open, shared: Any, device: str) -> None:
        files, self._facts, self._source = ray.get(shared)
        with tempfile.TemporaryDirectory(prefix="next-model-") as folder:
            for name, content in files.items():
                path = Path(folder, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            self._model = open_model(Path(folder), device)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Embed a batch of pieces; for each what came of it, and its file."""
        said, files = [], []
        for piece in batch["piece"].tolist():
            try:
                made = embed_piece(self._model, self._facts, self._source, piece)
            except (ValueError, OSError) as error:
                kind = "os" if isinstance(error, OSError) else "value"
                said.append(json.dumps({"error": kind, "message": str(error)}))
                files.append(b"")
                continue
            said.append(json.dumps({"piece": made.piece, "rows": made.rows}))
            files.append(made.file)
        return {"said": said, "file": files}
