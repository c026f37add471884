"""Completing a run on a server after its process has ended.

``python -m next.tracking.replay FOLDER --uri URI`` does it by hand, and ``--local FOLDER`` instead
of an address starts the local server of that folder for it.
"""

from __future__ import annotations

import argparse
import logging
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from next.addresses import tracking_uri
from next.storage import require_own_disk
from next.tracking.delivery.client import NotDelivered
from next.tracking.delivery.delivery import Delivery
from next.tracking.delivery.presence import require_answer
from next.tracking.journal import FILE_NAME, Journal, Status, now, read_records
from next.tracking.server import start_server

_log = logging.getLogger(__name__)


class Replay(NamedTuple):
    """What :func:`replay` did."""

    delivered: int
    """Records that the server took now."""
    refused: int
    """Records that it will not take; the log says why."""
    run_id: str
    """MLflow's id of the run."""


def replay(folder: str | Path, uri: str) -> Replay:
    """Bring the rest of a run, and of the runs below its folder, to a server.

    The trials of a sweep lie below it, so a sweep is completed as a whole. A run whose process
    died is marked as KILLED. A server that does not know the run (another one, or one with a new
    store) gets all of it. Bring a parent that lies elsewhere before its children.

    Returns:
        Records in all; ``run_id`` is that of the folder itself.

    Raises:
        FileNotFoundError: the folder has no journal.
        RuntimeError: a process still writes one of the runs.
        ValueError: a bad address.
        ConnectionError: the server cannot be reached or cannot take records now.
    """
    folder, uri = Path(folder).absolute(), tracking_uri(uri)
    if not (folder / FILE_NAME).exists():
        raise FileNotFoundError(f"{folder} must be the folder of a run, but holds no {FILE_NAME}")
    require_answer(uri)
    below = sorted(path.parent for path in folder.rglob(FILE_NAME) if path.parent != folder)
    whole = _replay_one(folder, uri)
    for run in below:
        found = _replay_one(run, uri)
        whole = Replay(
            whole.delivered + found.delivered, whole.refused + found.refused, whole.run_id
        )
    return whole


def _replay_one(folder: Path, uri: str) -> Replay:
    journal = Journal(folder)
    try:
        records = (entry.record for entry in read_records(folder))
        states = [record for record in records if isinstance(record, Status)]
        if states and states[-1].status == "RUNNING":
            journal.append(Status("KILLED", now()))
            journal.sync()
        delivery = Delivery(folder, uri)
        taken = delivery.deliver(retry_aside=True)
    except NotDelivered as error:
        raise ConnectionError(
            f"the run in {folder} must be completed on the server, but cannot be now: {error}"
        ) from error
    finally:
        journal.close()
    assert delivery.address.run_id is not None
    return Replay(taken, len(delivery.address.aside), delivery.address.run_id)


def _main() -> None:
    parser = argparse.ArgumentParser(
        description="Bring the rest of a run, and of the runs below its folder, to MLflow."
    )
    parser.add_argument("folder", type=Path)
    server = parser.add_mutually_exclusive_group(required=True)
    server.add_argument("--uri", help="address of the server")
    server.add_argument("--local", type=Path, help="folder of a local server, which is started")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        with ExitStack() as stack:
            if given.local is not None:
                require_own_disk(given.local, "--local", "MLflow's database")
            uri = given.uri or stack.enter_context(start_server(given.local)).uri
            done = replay(given.folder, uri)
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")
    _log.info("%d records delivered, %d refused, run %s", *done)


if __name__ == "__main__":
    _main()
