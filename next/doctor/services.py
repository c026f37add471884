"""Checks of what a run reaches beyond its machine: cluster, storage, MLflow, data."""

from __future__ import annotations

import email.utils
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from next.addresses import is_loopback, redacted
from next.config import RunConfig
from next.data.shards.reader import open_manifest, shard_damage
from next.doctor.finding import Finding, Inquiry
from next.doctor.machine import clock_behind_files, clock_differs
from next.evaluation.queries import measurable
from next.tracking.journal import FILE_NAME, Tags, read_records
from next.tracking.run import check_server

_TIMEOUT = 4.0
_READING_SECONDS = 3.0
"""How long shards are read and hashed; ``jobs/prepare.py --check`` reads all of them."""
_DIGEST_TAG = "next.data_digest"


class Answer(NamedTuple):
    """What a server said to a GET."""

    status: int
    """HTTP status; 0: nobody answered."""
    body: bytes
    date: float | None
    """The server's clock less ours, in seconds; None where it did not say."""


def token(inquiry: Inquiry) -> Finding:
    """Whether this shell has the token of its cluster, and keeps it to itself."""
    mode = os.environ.get("RAY_AUTH_MODE")
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    given = bool(os.environ.get("RAY_AUTH_TOKEN"))
    if not given and file.is_file() and file.stat().st_mode & 0o077:
        found = f"{file} can be read by others; who has it runs code on the cluster"
        return Finding("token", "error", found, f"chmod 600 {file}")
    if cluster_address() is None:
        return Finding("token", "ok", "no cluster is named; a Ray of its own makes its own token")
    if mode != "token":
        return Finding(
            "token",
            "error",
            f"a cluster is named, but RAY_AUTH_MODE is {mode or 'not set'}; a head without it runs "
            f"code for whoever reaches it, and one with it refuses this shell",
            "export RAY_AUTH_MODE=token  # for the head, each node and each client",
        )
    if not given and not file.is_file():
        return Finding(
            "token",
            "error",
            f"RAY_AUTH_MODE is token, but there is neither RAY_AUTH_TOKEN nor {file}",
            "(umask 077 && ray get-auth-token --generate > /dev/null)  # one for all nodes",
        )
    return Finding("token", "ok", "from RAY_AUTH_TOKEN" if given else f"from {file}")


def cluster(inquiry: Inquiry) -> Finding:
    """Whether the named cluster answers us, and runs our version of Ray."""
    address = redacted(cluster_address() or "")
    if not address:
        return Finding(
            "cluster", "skipped", "neither RAY_API_SERVER_ADDRESS nor RAY_ADDRESS is set"
        )
    answer = ask_cluster("/api/version")
    if answer.status in (401, 403):
        return Finding(
            "cluster",
            "error",
            f"{address} refuses us ({answer.status}): "
            + ("no token came" if answer.status == 401 else "it has another token"),
            "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=...  # the one of the head",
        )
    if answer.status != 200:
        return Finding(
            "cluster",
            "error",
            f"nobody answers as a Ray head at {address}",
            "export RAY_API_SERVER_ADDRESS=http://HEAD:8265  # and let the port through to here",
        )
    theirs, ours = json.loads(answer.body)["ray_version"], metadata.version("ray")
    if theirs != ours:
        return Finding(
            "cluster",
            "error",
            f"{address} runs Ray {theirs}, this environment has {ours}; they must be the same",
            f"pip install 'ray[default,train,tune,data]=={theirs}'",
        )
    return Finding("cluster", "ok", f"Ray {theirs} answers at {address}")


def tracking(inquiry: Inquiry) -> Finding:
    """Whether MLflow takes what this machine, and a worker elsewhere, would send."""
    uri = inquiry.config.tracking.uri
    remote = len(living_nodes() or []) > 1
    if not inquiry.config.tracking.enabled:
        return Finding("tracking", "skipped", "tracking.enabled is off")
    if uri is None or is_loopback(uri):
        if remote:
            return Finding(
                "tracking",
                "warning",
                f"{uri or 'a server beside the driver'} is for this machine alone; the driver of a "
                f"training reaches it, but trials of a sweep on the cluster's other nodes do not",
                "--tracking.uri http://HOST:5000  # a name that every node resolves",
            )
        if uri is None:
            return Finding("tracking", "ok", "a local server under run.storage_path")
    try:
        check_server(uri)
    except PermissionError as error:
        mend = "export MLFLOW_TRACKING_USERNAME=... MLFLOW_TRACKING_PASSWORD=..."
        return Finding("tracking", "error", str(error), mend)
    except (ConnectionError, ValueError) as error:
        return Finding("tracking", "error", str(error), _tracking_mend(uri, str(error)))
    return Finding("tracking", "ok", f"{uri} takes runs")


def clock(inquiry: Inquiry) -> Finding:
    """This machine's clock against files and the servers that it speaks to."""
    if behind := clock_behind_files(inquiry):
        return behind
    asked = 0
    for name, answer in _dated_servers(inquiry.config):
        if answer.date is not None:
            asked += 1
            if differs := clock_differs(answer.date, f"the clock of {name} is"):
                return differs
    return Finding("clock", "ok", f"agrees with {asked} servers and is not behind its files")


def data(inquiry: Inquiry) -> Finding:
    """Whether the shards are what their manifest and an earlier run of this name say."""
    uri = inquiry.config.data.uri
    if uri is None:
        return Finding("data", "skipped", "no --data was given")
    prepare = "python jobs/prepare.py --card CARD --source DIR --out OUT"
    try:
        manifest = open_manifest(uri)
    except (OSError, ValueError) as error:
        return Finding("data", "error", str(error), prepare)
    before = _earlier_digest(inquiry.config)
    if before is not None and before != manifest.digest:
        return Finding(
            "data",
            "error",
            f"run {inquiry.config.run.name} was trained on digest {before[:16]}, these shards have "
            f"{manifest.digest[:16]}",
            "--run.name ANOTHER  # or give the shards that it began with",
        )
    rows = sum(split.rows for split in manifest.splits.values())
    found = f"{rows} rows, digest {manifest.digest[:16]}"
    shards = [shard for entry in manifest.splits.values() for shard in entry.shards]
    if not manifest.folder.is_local:
        return Finding("data", "ok", f"{found}; sizes and columns agree, the bytes were not read")
    began, read = time.monotonic(), 0
    for shard in shards:
        damage = shard_damage(manifest, shard, manifest.folder.read(shard.file))
        if damage is not None:
            return Finding("data", "error", damage, prepare)
        read += 1
        if time.monotonic() - began > _READING_SECONDS:
            break
    return Finding("data", "ok", f"{found}; every byte of {read} of {len(shards)} shards agrees")


def queries(inquiry: Inquiry) -> Finding:
    """Whether a run on these data has anything to be measured on, and how surely."""
    uri = inquiry.config.data.uri
    if uri is None:
        return Finding("queries", "skipped", "no --data was given")
    try:
        told, problems = measurable(inquiry.config, open_manifest(uri))
    except OSError as error:  # of which the check of the data has more to say
        return Finding("queries", "skipped", f"the labels cannot be read: {error}")
    if problems:
        return Finding("queries", "error", "; ".join(problems.values()))
    found = "; ".join(f"{name}: {one}" for name, one in told.items())
    few = "; ".join(f"{name}: {one.warning()}" for name, one in told.items() if one.warning())
    if few:
        return Finding("queries", "warning", f"{found}; {few}", "--selection.holdout MORE")
    return Finding("queries", "ok", found)


def cluster_address() -> str | None:
    """``http://`` address of the named cluster's job server; None: no cluster is named."""
    named = os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    if not named or named in ("auto", "local"):
        return None
    if "://" in named and not named.startswith("ray://"):
        return named.rstrip("/")
    host = named.removeprefix("ray://").rpartition(":")[0]
    return f"http://{host}:8265"  # the port where a head serves unless told otherwise


def ask_cluster(path: str, body: Mapping[str, Any] | None = None, method: str = "") -> Answer:
    """Ask the named cluster's job server, with our token if we have one; as :func:`ask`."""
    secret = os.environ.get("RAY_AUTH_TOKEN")
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if not secret and file.is_file():
        secret = file.read_text(encoding="utf-8").strip()
    headers = {"Authorization": f"Bearer {secret}"} if secret else {}
    return ask(f"{cluster_address()}{path}", headers, body, method)


def ask(
    url: str,
    headers: Mapping[str, str] | None = None,
    body: Mapping[str, Any] | None = None,
    method: str = "",
) -> Answer:
    """GET an address, or POST ``body`` as JSON, without a proxy, within a few seconds."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        request = urllib.request.Request(
            url,
            None if body is None else json.dumps(body).encode(),
            dict(headers or {}) | ({"Content-Type": "application/json"} if body else {}),
            method=method or ("GET" if body is None else "POST"),
        )
        with opener.open(request, timeout=_TIMEOUT) as answer:
            return Answer(answer.status, answer.read(), _ahead(answer.headers.get("Date")))
    except urllib.error.HTTPError as error:
        return Answer(error.code, b"", _ahead(error.headers.get("Date")))
    except (OSError, ValueError):
        return Answer(0, b"", None)


def _ahead(date: str | None) -> float | None:
    if date is None:
        return None
    try:
        return email.utils.parsedate_to_datetime(date).timestamp() - time.time()
    except ValueError:
        return None


def living_nodes() -> list[dict[str, Any]] | None:
    """The named cluster's living nodes, as its State API lists them; None: no cluster answers."""
    if cluster_address() is None:
        return None
    answer = ask_cluster("/api/v0/nodes?limit=1000&detail=1")
    if answer.status != 200:
        return None
    listed: list[dict[str, Any]] = json.loads(answer.body)["data"]["result"]["result"]
    return [node for node in listed if node["state"] == "ALIVE"]


def _tracking_mend(uri: str, reason: str) -> str:
    host = urlsplit(uri).netloc
    if "403" in reason or "Invalid Host" in reason:
        return f"mlflow server ... --allowed-hosts '{urlsplit(uri).hostname},{host}'"
    return f"curl {uri}/health  # is it up, and does this machine get through to it?"


def _dated_servers(config: RunConfig) -> Iterator[tuple[str, Answer]]:
    if cluster_address() is not None:
        yield "the cluster's head", ask_cluster("/api/version")
    if config.tracking.enabled and config.tracking.uri is not None:
        yield "the tracking server", ask(f"{config.tracking.uri}/health")
    if str(config.checkpoint.storage_path).startswith("s3://"):
        yield (
            "the object store",
            ask(os.environ.get("AWS_ENDPOINT_URL", "https://s3.amazonaws.com")),
        )


def _earlier_digest(config: RunConfig) -> str | None:
    """Digest of the data that the run of this name began with, as its journal says."""
    folder = Path(config.run.storage_path) / str(config.run.name)
    if config.run.name is None or not (folder / FILE_NAME).is_file():
        return None
    records = (entry.record for entry in read_records(folder))
    tags = (record.values for record in records if isinstance(record, Tags))
    return next((values[_DIGEST_TAG] for values in tags if _DIGEST_TAG in values), None)
