"""All that is sent to MLflow of a run: kept in its journal first, then delivered.

:func:`open_run` gives a :class:`Run`; its methods write to the run's journal and return (about
20 us for ten metrics). A thread of the run delivers the journal to MLflow, again and again until
the server has it; the training never waits for the server and never sees its errors. What the
server has not got when the run closes stays in the journal: opening the run again, or
:func:`replay`, completes it.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, SupportsFloat

from next.addresses import tracking_uri
from next.storage import write_whole
from next.tracking.delivery.client import check_server
from next.tracking.delivery.delivery import Address, Delivery
from next.tracking.delivery.publication import Publication
from next.tracking.delivery.sender import Sender
from next.tracking.journal import (
    Artifact,
    Data,
    ExperimentTags,
    Journal,
    Metrics,
    Opened,
    Params,
    Status,
    Tags,
    now,
    read_metrics,
    read_records,
    read_status,
    text_values,
)
from next.tracking.replay import Replay, replay
from next.tracking.server import TrackingServer, replay_command, start_server, view_command
from next.tracking.system import SystemMonitor
from next.tracking.views.images import (
    LOGGED_IMAGES,
    LOGGED_TABLES,
    add_image,
    table_tag,
    write_table,
)
from next.tracking.views.links import run_url

__all__ = [
    "Replay",
    "Run",
    "TrackingServer",
    "check_server",
    "open_run",
    "read_metrics",
    "read_status",
    "replay",
    "replay_command",
    "run_url",
    "start_server",
    "view_command",
]

_log = logging.getLogger(__name__)

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]

_NAME = re.compile(r"[\w\-. :/]{1,250}")
_PATIENCE = 30.0


class Run:
    """A run that is being written; :func:`open_run` makes it."""

    def __init__(
        self,
        journal: Journal,
        key: str,
        uri: str | None,
        earlier: _Earlier,
        publication: Publication | None = None,
    ) -> None:
        self.folder = journal.path.parent
        self.key = key
        """The run's own name, known at once; as ``parent`` of other runs it needs no server."""
        self.uri = uri
        self._journal = journal
        self._earlier = earlier
        self._checked: set[str] = set()
        self._sender = Sender(journal, Delivery(self.folder, uri) if uri else None, publication)
        self._monitor: SystemMonitor | None = None
        self._closed = False

    @property
    def run_id(self) -> str | None:
        """MLflow's id; waits up to 30 s for the server, None if there is none or it is away."""
        return self._address().run_id

    @property
    def experiment_id(self) -> str | None:
        """MLflow's id of the experiment; as :attr:`run_id`."""
        return self._address().experiment_id

    @property
    def url(self) -> str | None:
        """The run's page; as :attr:`run_id`."""
        address = self._address()
        if self.uri is None or address.run_id is None or address.experiment_id is None:
            return None
        return run_url(self.uri, address.experiment_id, address.run_id)

    def log_metrics(self, metrics: Mapping[str, SupportsFloat], *, step: int) -> None:
        """Log values of one step; NaN and infinities are kept.

        After a resume a step keeps the values it has.

        Raises:
            ValueError: a name that MLflow would not take.
            TypeError: a value that is no number.
        """
        values = {name: float(value) for name, value in metrics.items()}
        self._check_names(values)
        if self._earlier.metrics:
            values = self._earlier.without_repeats(values, step)
        if values:
            self._journal.append(Metrics(int(step), now(), values))

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags; a later value replaces an earlier one.

        Raises:
            ValueError: a name that MLflow would not take.
        """
        self._check_names(tags)
        self._journal.append(Tags(text_values(tags)))

    def log_artifact(self, path: str | Path, folder: str = "") -> None:
        """Log a file or a whole folder.

        Inside the run's folder it is read when it is delivered, so it must stay; from elsewhere it
        is copied into the run's folder first.

        Args:
            path: the file or folder.
            folder: where it lies among the run's artifacts.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: ``folder`` leads out of the artifacts.
        """
        path, place = Path(path).absolute(), _place(folder)
        if not path.exists():
            raise FileNotFoundError(f"{path} must exist to be logged as an artifact")
        if not path.is_relative_to(self.folder):
            copy = self.folder / "artifacts" / place / path.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                shutil.copytree(path, copy, dirs_exist_ok=True)
            else:
                shutil.copyfile(path, copy)
            path = copy
        self._journal.append(Artifact(path.relative_to(self.folder).as_posix(), place))

    def log_image(self, picture: str | Path, key: str, *, step: int) -> None:
        """Log a PNG for MLflow's image grid, which lays the pictures of one key side by side.

        Args:
            picture: the file.
            key: what it is of, such as ``figures/cmc``.
            step: when it was taken; the same key and step again replace it.

        Raises:
            ValueError: a key that MLflow would not take.
            FileNotFoundError: there is no such file.
        """
        for path in add_image(self.folder / "images", Path(picture), key, step):
            self.log_artifact(path, "images")
        self.set_tags({LOGGED_IMAGES: "true"})

    def log_table(self, columns: Mapping[str, Sequence[Any]], name: str) -> None:
        """Log a table that MLflow's table view shows, as the artifact ``name`` (``.json``).

        Raises:
            ValueError: columns of different lengths, or another ending.
        """
        self.log_artifact(write_table(self.folder / "tables" / _place(name), columns), "tables")
        self._earlier.tables = list(dict.fromkeys([*self._earlier.tables, f"tables/{name}"]))
        self.set_tags({LOGGED_TABLES: table_tag(self._earlier.tables)})

    def describe_experiment(self, tags: Mapping[str, str]) -> None:
        """Set tags of the experiment: :func:`next.tracking.views.comparison.experiment_tags`."""
        self._journal.append(ExperimentTags(dict(tags)))

    def log_text(self, text: str, name: str) -> None:
        """Log a text as the artifact ``name``, for example ``config.toml`` or ``git/diff.txt``."""
        path = self.keep_text(text, name)
        folder = path.parent.relative_to(self.folder / "artifacts").as_posix()
        self.log_artifact(path, "" if folder == "." else folder)

    def keep_text(self, text: str, name: str) -> Path:
        """Write a text where :meth:`log_text` does, and send it to no server."""
        return write_whole(self.folder / "artifacts" / _place(name), text)

    def log_data(
        self,
        name: str,
        digest: str,
        source: str,
        context: str,
        *,
        schema: Mapping[str, str] | None = None,
        rows: int | None = None,
    ) -> None:
        """Log a data set that the run reads.

        Args:
            name: of the benchmark.
            digest: of the manifest; MLflow's own column keeps the first 36 characters.
            source: where the shards lie.
            context: ``train``, ``test``, ...
            schema: column -> type (``long``, ``string``, ``binary``; ``string[]`` is a list).
            rows: samples.
        """
        self._journal.append(Data(name, digest, source, context, dict(schema or {}), rows))

    def close(self, status: RunStatus = "FINISHED", *, timeout: float = 20.0) -> None:
        """End the run and deliver what is left; a second call does nothing.

        Args:
            status: how it ended.
            timeout: longest time to wait for the server in seconds; a server that has been away
                for longer already is tried once more and not waited for, and one that takes
                connections and does not answer costs 7 s the first time, 2 s from then on.
        """
        if self._closed:
            return
        self._closed = True
        if self._monitor is not None:
            self._monitor.stop()
        self._journal.append(Status(status, now()))
        self._sender.finish(timeout)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.close("FINISHED")
        else:
            self.close("FAILED" if isinstance(error, Exception) else "KILLED")

    def publish(self) -> None:
        """Bring what was logged to the run's store now; nothing where it has none.

        Raises:
            OSError: the store cannot be reached or is full; what was logged is kept here.
            TakenOverError: another process goes on with this run.
        """
        self._sender.publish()

    def monitor_system(self, every: float) -> None:
        """Log CPU, memory and GPUs of this machine as ``system/*`` until the run is closed.

        Args:
            every: seconds between samples.
        """
        began = self._earlier.opened.time if self._earlier.opened else now()
        self._monitor = SystemMonitor(
            lambda values, step: self.log_metrics(values, step=step), every, began
        )

    def _address(self) -> Address:
        return self._sender.address(_PATIENCE)

    def _check_names(self, names: Mapping[str, Any]) -> None:
        for name in names:
            if name not in self._checked:
                check_name(name)
                self._checked.add(name)


def open_run(
    *,
    uri: str | None,
    experiment: str,
    name: str,
    folder: str | Path,
    parent: str | None = None,
    params: Mapping[str, Any] | None = None,
    tags: Mapping[str, Any] | None = None,
    system_seconds: float | None = None,
    store: str | None = None,
) -> Run:
    """Begin a run, or go on with the one of this folder or of its store.

    The same folder is the same MLflow run: what an earlier process could not deliver is delivered
    now, and a value that is logged again for the same step is not doubled. So is the same store,
    from whichever machine.

    Args:
        uri: ``http(s)://`` address of MLflow; None keeps the journal only.
        experiment: created if it is not there.
        name: shown in MLflow.
        folder: of the run; the journal, ``run.json`` and copied artifacts are written to it.
        parent: :attr:`Run.key` of the parent run (good with a server that is away, too), or its
            MLflow id.
        params: what MLflow shows as parameters: for a child only what the sweep varies.
        tags: provenance and the like.
        system_seconds: seconds between samples of CPU, memory and GPUs; None: none are taken.
        store: address of the run's store, which gets the journal and the files that it names
            (:mod:`next.tracking.delivery.publication`); None: they stay in ``folder``.

    Raises:
        OSError: the store cannot be reached.
        ValueError: a bad address, a name that MLflow would not take, or a folder whose run belongs
            to another experiment.
        RuntimeError: another process writes this run.
    """
    params, tags = text_values(params or {}), text_values(tags or {})
    for given in (*params, *tags):
        check_name(given)
    uri = tracking_uri(uri) if uri is not None else None
    folder = Path(folder).absolute()
    publication = Publication(folder, store) if store is not None else None
    if publication is not None:
        publication.fetch()
    journal = Journal(folder)
    try:
        earlier = _Earlier(folder)
        opened = earlier.opened
        if opened is None:
            opened = Opened(str(uuid.uuid4()), experiment, name, parent, now())
            journal.append(opened)
            earlier.opened = opened
        elif opened.experiment != experiment:
            raise ValueError(
                f"{folder} must be used with one experiment, but it holds a run of "
                f"{opened.experiment!r} and not of {experiment!r}; choose another folder"
            )
        new_params = earlier.without_old_params(params)
        if new_params:
            journal.append(Params(new_params))
        if tags:
            journal.append(Tags(tags))
        journal.append(Status("RUNNING", now()))
    except BaseException:
        journal.close()
        raise
    run = Run(journal, opened.key, uri, earlier, publication)
    if system_seconds is not None:
        run.monitor_system(system_seconds)
    return run


def check_name(name: str) -> None:
    """Refuse a name that MLflow would not take.

    Raises:
        ValueError: the name is empty, longer than 250 characters, looks like a path, or has a
            character that is not allowed.
    """
    parts = name.split("/")
    if not _NAME.fullmatch(name) or "" in parts or "." in parts or ".." in parts:
        raise ValueError(
            f"a metric, parameter or tag must be named with up to 250 letters, digits, spaces and "
            f"_ - . : and single inner slashes, but got {name!r}"
        )


class _Earlier:
    """What a journal held when it was opened."""

    def __init__(self, folder: Path) -> None:
        self.opened: Opened | None = None
        self.metrics: dict[int, dict[str, float]] = {}
        self.tables: list[str] = []
        self._params: dict[str, str] = {}
        for record in (entry.record for entry in read_records(folder)):
            if isinstance(record, Opened):
                self.opened = record
            elif isinstance(record, Metrics):
                self.metrics.setdefault(record.step, {}).update(record.values)
            elif isinstance(record, Params):
                self._params |= record.values
            elif isinstance(record, Tags) and LOGGED_TABLES in record.values:
                self.tables = [table["path"] for table in json.loads(record.values[LOGGED_TABLES])]

    def without_repeats(self, values: dict[str, float], step: int) -> dict[str, float]:
        """The values that the step does not have already; the first one stays.

        Steps that are computed again after a resume may differ in the last bits (another number
        of workers, another device), and in how long they took.
        """
        known = self.metrics.get(step, {})
        return {name: value for name, value in values.items() if name not in known}

    def without_old_params(self, params: dict[str, str]) -> dict[str, str]:
        """The new ones; MLflow does not let a parameter change."""
        for name, value in params.items():
            if self._params.get(name, value) != value:
                _log.warning(
                    "parameter %s was %s when the run began and is %s now; MLflow keeps the first",
                    *(name, self._params[name], value),
                )
        return {name: value for name, value in params.items() if name not in self._params}


def _place(folder: str) -> str:
    """A clean relative path among the artifacts."""
    parts = [part for part in folder.split("/") if part]
    if folder.startswith("/") or ".." in parts or "." in parts:
        raise ValueError(
            f"the place of an artifact must be a relative path like 'figures', but got {folder!r}"
        )
    return "/".join(parts)
