"""Say what a node's folder of decoded caches and text banks holds, and make it smaller."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from next.cli import parse, run_job
from next.data.loading.cache import CacheEntry, cache_root, clean_up, contents
from next.lease import Lease
from next.storage import open_folder


@dataclass(frozen=True)
class CacheJob:
    """Say what a node's folder of decoded caches and text banks holds, and make it smaller."""

    cache: str | None = None
    """The folder (data.cache); ~/.cache/next-reid where it is left out."""
    limit: float | None = None
    """Remove what was not used for longest until the folder takes no more than so many gigabytes;
    0 removes all. What a running process uses stays."""
    dry_run: bool = False
    """With --limit: say what would be removed, and remove nothing."""
    json: bool = False
    """Print the answer as one JSON object."""


def main(argv: Sequence[str]) -> int:
    """Parse, call, exit code."""
    job = parse(CacheJob, argv)
    if job.limit is not None and job.limit < 0:
        raise ValueError(f"--limit must be 0 or more gigabytes, but got {job.limit:g}")
    root = cache_root(job.cache)
    removed: list[CacheEntry] = []
    if job.limit is not None:
        cleaning = Lease(open_folder(root), "the folder of caches", does="cleaned up", within=True)
        with nullcontext() if job.dry_run else cleaning:
            removed = clean_up(root, job.limit, dry_run=job.dry_run)
    entries = contents(root)
    if job.json:
        answer = {"root": str(root), "entries": entries, "removed": removed}
        print(json.dumps({name: _plain(value) for name, value in answer.items()}))
        return 0
    print("\n".join(table(entries)))
    held = sum(entry.bytes for entry in entries if entry.in_use)
    total = sum(entry.bytes for entry in entries)
    print(f"{root}: {total / 1e9:.2f} GB, of which {held / 1e9:.2f} GB are in use")
    if job.limit is not None:
        done = "would remove" if job.dry_run else "removed"
        print(f"{done} {len(removed)}: {sum(entry.bytes for entry in removed) / 1e9:.2f} GB")
        if total > job.limit * 1e9 and not job.dry_run:
            print("what is left above the limit is in use by running processes")
    return 0


def table(entries: Sequence[CacheEntry]) -> list[str]:
    """One line for each entry, what was used last first."""
    return [
        f"{entry.bytes / 1e6:>10,.1f} MB  {entry.kind:<10}  "
        f"{time.strftime('%Y-%m-%d %H:%M', time.localtime(entry.used))}  "
        f"{'in use' if entry.in_use else '-':<6}  {entry.about or entry.path.name}"
        for entry in entries
    ]


def _plain(value: object) -> object:
    if isinstance(value, list):
        return [{**entry._asdict(), "path": str(entry.path)} for entry in value]
    return value


if __name__ == "__main__":
    run_job(main, kept="what was removed is gone")
