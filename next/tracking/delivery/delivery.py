"""From the journal to MLflow: at least once from here, exactly once over there.

``run.json`` beside the journal says which MLflow run it belongs to and how many bytes the server
has acknowledged. A record may therefore be sent twice after a crash, which changes nothing:
MLflow's key of a metric value is (run, name, step, time, value) and the time is the journal's;
parameters, tags, data sets, artifacts and the status are set to what they are. The run itself is
found again by the tag ``next.run_key``, so that not even a lost answer to its creation makes a
second one.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from next.storage import path_within, write_whole
from next.tracking.delivery.client import (
    RUN_KEY,
    NotDelivered,
    connect,
    experiment_by_name,
    find_by_key,
    http_status,
    short_message,
)
from next.tracking.journal import (
    FILE_NAME,
    Artifact,
    Data,
    Entry,
    ExperimentTags,
    Metrics,
    Opened,
    Params,
    Status,
    Tags,
    ends_with,
    is_boundary,
    read_records,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

_log = logging.getLogger(__name__)

_BATCH = 1000
"""Values in one request; MLflow's own limit."""
_DIGEST_LENGTH = 36
"""MLflow's limit for the digest of a data set."""


@dataclass(frozen=True)
class Address:
    """What ``run.json`` holds: the MLflow run of a journal, and how far it is complete."""

    uri: str | None = None
    """The server that was spoken to last."""
    experiment_id: str | None = None
    run_id: str | None = None
    delivered: int = 0
    """Bytes of the journal that the server has acknowledged."""
    aside: list[int] = field(default_factory=list)
    """First bytes of records before ``delivered`` that the server refused; tried again."""
    seal: str = ""
    """Checksum of the record that ends at ``delivered``."""
    shortened: bool = False
    """The journal has lost records that the server has. So the server is asked what it has of a
    step before more is sent of it; else values that are logged again would stand there twice."""


def read_address(folder: Path) -> Address:
    """The content of ``run.json``; empty if there is none or it is damaged."""
    try:
        return Address(**json.loads((folder / "run.json").read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError):
        return Address()


class Delivery:
    """Brings one journal to one server. Not thread-safe; one for each journal at a time."""

    def __init__(self, folder: Path, uri: str) -> None:
        self.folder = folder
        self.uri = uri
        self.address = read_address(folder)
        self._client: MlflowClient | None = None
        self._located = False
        self._guard = threading.Lock()
        self._given_up = False
        self._steps: dict[str, set[int]] = {}
        """Steps of each metric that the server has; of a shortened journal alone."""

    def locate(self) -> Address:
        """The MLflow run of this journal, created if the server has none.

        Raises:
            NotDelivered: the server cannot be asked, or the run or its experiment is deleted.
        """
        with _as_not_delivered(self.uri):
            if self._client is None:
                self._client = connect(self.uri)
            if not self._located:
                self._locate(self._client)
                self._located = True
        return self.address

    def deliver(self, *, retry_aside: bool = False, until: int | None = None) -> int:
        """Send what is new in the journal.

        Args:
            retry_aside: send records again that the server refused before.
            until: byte of the journal up to which it may be sent; None: to its end.

        Returns:
            Number of records that the server took.

        Raises:
            NotDelivered: the server cannot be reached or cannot take records now; what it took
                before that is remembered.
        """
        self.locate()
        taken = 0
        if retry_aside:
            for start in self.address.aside:
                if self._send([next(read_records(self.folder, start))]):
                    taken += 1
                    kept = [other for other in self.address.aside if other != start]
                    self._remember(replace(self.address, aside=kept))
        new = read_records(self.folder, self.address.delivered)
        for batch in _batches(takewhile(lambda entry: until is None or entry.end <= until, new)):
            if self._given_up:
                raise NotDelivered("the run is closed")
            refused = [] if self._send(batch) else self._refused(batch)
            taken += len(batch) - len(refused)
            self._remember(
                replace(
                    self.address,
                    delivered=batch[-1].end,
                    seal=batch[-1].seal,
                    aside=self.address.aside + [entry.start for entry in refused],
                )
            )
        return taken

    def give_up(self) -> None:
        """Deliver no more, so that another may; a request that is under way changes nothing then.

        May be called by another thread than the one that delivers.
        """
        with self._guard:
            self._given_up = True

    def undelivered(self) -> int:
        """Number of records that the server does not have."""
        new = sum(1 for _ in read_records(self.folder, self.address.delivered))
        return new + len(self.address.aside)

    def _refused(self, batch: list[Entry]) -> list[Entry]:
        """The records of a refused batch that are refused alone, too."""
        if len(batch) == 1:
            return batch
        return [entry for entry in batch if not self._send([entry])]

    def _send(self, batch: list[Entry]) -> bool:
        """Whether the server took it; False: it answered that it will not."""
        assert self._client is not None
        record = batch[0].record
        try:
            if isinstance(record, Artifact):
                self._send_artifact(self._client, record)
            elif isinstance(record, Data):
                self._send_data(self._client, record)
            elif isinstance(record, ExperimentTags):
                for name, value in record.values.items():
                    self._client.set_experiment_tag(self.address.experiment_id, name, value)
            elif isinstance(record, Status):
                self._send_status(self._client, record)
            elif not isinstance(record, Opened):
                self._send_values(self._client, batch)
        except Exception as error:
            self._steps.clear()  # what of the batch the server has is not known
            # An artifact may fail for itself (its file, its store), which must not hold up the
            # metrics behind it; anything else that is no plain "bad request" is the server's.
            if not isinstance(record, Artifact) and http_status(error) not in (400, 404):
                raise NotDelivered(f"{self.uri}: {short_message(error)}") from error
            self._require_active_run(self._client)
            if len(batch) == 1:
                _log.warning(
                    "%s: the tracking server does not take a record, which stays in the journal: "
                    "%s (%s)",
                    self.folder,
                    record,
                    short_message(error),
                )
            return False
        return True

    def _send_values(self, client: MlflowClient, batch: list[Entry]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        metrics: list[Metric] = []
        params: dict[str, str] = {}
        tags: dict[str, str] = {}
        for record in (entry.record for entry in batch):
            if isinstance(record, Metrics):
                moment = _milliseconds(record.time)
                metrics += [
                    Metric(name, value, moment, record.step)
                    for name, value in record.values.items()
                ]
            elif isinstance(record, Params):
                params |= record.values
            elif isinstance(record, Tags):
                tags |= record.values
        if self.address.shortened:
            metrics = [one for one in metrics if self._lacks(client, one.key, one.step)]
        client.log_batch(
            self.address.run_id,
            metrics=metrics,
            params=[Param(name, value) for name, value in params.items()],
            tags=[RunTag(name, value) for name, value in tags.items()],
        )

    def _lacks(self, client: MlflowClient, name: str, step: int) -> bool:
        """Whether the server has no value of a metric at a step."""
        if name not in self._steps:
            history = client.get_metric_history(str(self.address.run_id), name)
            self._steps[name] = {metric.step for metric in history}
        lacks = step not in self._steps[name]
        self._steps[name].add(step)
        return lacks

    def _send_artifact(self, client: MlflowClient, record: Artifact) -> None:
        # A journal may be somebody else's: what it names outside its folder is not sent.
        path = path_within(self.folder, record.path)
        if not path.exists():
            raise FileNotFoundError(f"{path} is gone")
        for file in path.rglob("*") if path.is_dir() else ():
            path_within(self.folder, file.relative_to(self.folder).as_posix())
        send = client.log_artifacts if path.is_dir() else client.log_artifact
        send(self.address.run_id, str(path), record.folder or None)

    def _send_data(self, client: MlflowClient, record: Data) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        source_type = "s3" if record.source.startswith("s3://") else "local"
        dataset = Dataset(
            name=record.name,
            digest=record.digest[:_DIGEST_LENGTH],
            source_type=source_type,
            source=json.dumps({"uri": record.source, "digest": record.digest}),
            schema=_schema(record.schema),
            profile=None if record.rows is None else json.dumps({"num_rows": record.rows}),
        )
        tag = InputTag("mlflow.data.context", record.context)
        client.log_inputs(self.address.run_id, datasets=[DatasetInput(dataset, [tag])])

    def _send_status(self, client: MlflowClient, record: Status) -> None:
        if record.status == "RUNNING":
            client.update_run(self.address.run_id, status="RUNNING")
        else:
            # An answer that came too late may belong to a double, which would run for ever.
            opened, own = _opened(self.folder), self.address
            find_by_key(client, str(own.experiment_id), opened.key, keep=own.run_id)
            client.set_terminated(own.run_id, record.status, _milliseconds(record.time))

    def _locate(self, client: MlflowClient) -> None:
        opened = _opened(self.folder)
        known = self.address
        if not is_boundary(self.folder, known.delivered) or (
            known.seal and not ends_with(self.folder, known.delivered, known.seal)
        ):
            _log.warning(
                "%s lacks records that the tracking server has, or has others: it is delivered "
                "again, and what the server has of a step stays; bring the file back from a copy",
                self.folder / FILE_NAME,
            )
            self._remember(replace(known, delivered=0, aside=[], seal="", shortened=True))
        if self.address.run_id and self._has_active_run(client):
            self._remember(replace(self.address, uri=self.uri))
            return
        experiment_id = experiment_by_name(client, opened.experiment)
        run = find_by_key(client, experiment_id, opened.key) or self._create(
            client, experiment_id, opened
        )
        _require_active(run)
        self._remember(Address(self.uri, experiment_id, run.info.run_id))

    def _create(self, client: MlflowClient, experiment_id: str, opened: Opened) -> Any:
        tags = {RUN_KEY: opened.key}
        if opened.parent is not None:
            tags["mlflow.parentRunId"] = self._parent_id(client, experiment_id, opened.parent)
        client.create_run(
            experiment_id,
            start_time=_milliseconds(opened.time),
            tags=tags,
            run_name=opened.name,
        )
        return find_by_key(client, experiment_id, opened.key)

    def _parent_id(self, client: MlflowClient, experiment_id: str, parent: str) -> str:
        if not is_key(parent):
            return parent
        run = find_by_key(client, experiment_id, parent)
        if run is None:
            raise NotDelivered(f"the parent run (key {parent}) is not on the server yet")
        return str(run.info.run_id)

    def _has_active_run(self, client: MlflowClient) -> bool:
        """Whether this server knows our run; another server starts from the first record."""
        from mlflow.exceptions import MlflowException

        try:
            run = client.get_run(self.address.run_id)
        except MlflowException as error:
            if http_status(error) == 404:
                return False
            raise
        _require_active(run)
        return True

    def _require_active_run(self, client: MlflowClient) -> None:
        """Tell a record that is refused for itself from one whose run is gone."""
        with _as_not_delivered(self.uri):
            if not self._has_active_run(client):
                self._located = False
                raise NotDelivered("the server has lost the run; it will be created again")

    def _remember(self, address: Address) -> None:
        with self._guard:
            if self._given_up or address == self.address:
                return
            self.address = address
            try:
                write_whole(self.folder / "run.json", json.dumps(asdict(address)))
            except OSError as error:  # a full disk; the records are sent once more after a crash
                _log.debug("run.json cannot be written: %s", error)


def is_key(name: str) -> bool:
    """Whether this is a run's key and no id of MLflow's (which has no dashes)."""
    return "-" in name


@contextmanager
def _as_not_delivered(uri: str) -> Iterator[None]:
    """Turn whatever MLflow's client raises into :class:`NotDelivered`."""
    try:
        yield
    except NotDelivered:
        raise
    except Exception as error:
        raise NotDelivered(f"{uri}: {short_message(error)}") from error


def _batches(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    """Neighbours that fit into one request; artifacts, data and status stand alone."""
    batch: list[Entry] = []
    values = 0
    for entry in entries:
        record = entry.record
        if isinstance(record, Metrics | Params | Tags):
            if batch and values + len(record.values) > _BATCH:
                yield batch
                batch, values = [], 0
            batch.append(entry)
            values += len(record.values)
        else:
            if batch:
                yield batch
            yield [entry]
            batch, values = [], 0
    if batch:
        yield batch


def _opened(folder: Path) -> Opened:
    for entry in read_records(folder):
        if isinstance(entry.record, Opened):
            return entry.record
    raise ValueError(f"{folder} must hold the journal of a run, but its journal has no beginning")


def _schema(columns: dict[str, str]) -> str | None:
    """Columns in the form that MLflow's pages show."""
    if not columns:
        return None
    listed: list[dict[str, Any]] = []
    for name, kind in columns.items():
        column: dict[str, Any] = {"name": name, "type": kind, "required": True}
        if kind.endswith("[]"):
            column |= {"type": "array", "items": {"type": kind.removesuffix("[]")}}
        listed.append(column)
    return json.dumps({"mlflow_colspec": listed})


def _require_active(run: Any) -> None:
    if run.info.lifecycle_stage != "active":
        raise NotDelivered(
            f"run {run.info.run_id} is deleted on the server; restore it there, and it is completed"
        )


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)
