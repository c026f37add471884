"""Trained models in MLflow's registry: versions with a card and aliases.

A version is an MLflow ``pyfunc`` model that names a loader module of this package and holds a
folder of plain data. Nothing in it is pickled, and :func:`fetch_model` refuses a version that names
any other loader or brings code along, so loading one executes this package's code only.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from next.addresses import tracking_uri
from next.storage import path_within, require_own_disk, write_whole
from next.tracking.delivery.client import check_server, connect, http_status, short_message
from next.tracking.delivery.delivery import read_address
from next.tracking.delivery.presence import require_answer
from next.tracking.server import start_server

CANDIDATE, CHAMPION = "candidate", "champion"
"""Aliases: the newest version, and the one that is in use."""

CARD = "next.card"
"""Tag of a version: its card as JSON."""
_MODEL_URI = re.compile(r"models:/(?P<name>[^/@:]+)(?:/(?P<version>\d+)|@(?P<alias>[\w.-]+))")
_PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".joblib", ".npy", ".npz", ".cloudpickle")


@dataclass(frozen=True)
class ModelCard:
    """What a model is worth, on which data, and what may be done with it."""

    benchmark: str
    data_digest: str
    scores: dict[str, float]
    """Metric -> value, percent."""
    interval: dict[str, tuple[float, float]]
    """Metric -> ends of its 95 % interval over query identities, for this one checkpoint."""
    modalities: list[str]
    subsets: list[list[str]]
    """Sets of modalities that a sample may have."""
    weights_licence: str
    seed: int
    run: str
    """Name of the run that trained it."""
    subset_scores: dict[str, float] = field(default_factory=dict)
    """mAP on the test split by what query and gallery have (``RGB+NI``), as :attr:`subsets`."""
    seed_spread: dict[str, tuple[float, int]] = field(default_factory=dict)
    """Metric -> standard deviation from seed to seed and its degrees of freedom, pooled over the
    settings that a sweep ran with several seeds; empty: one seed was run."""

    def markdown(self) -> str:
        """The card as MLflow's pages show it."""
        lines = [
            f"Trained on **{self.benchmark}**, data `{self.data_digest[:16]}`, seed {self.seed}, "
            f"run `{self.run}`.",
            "",
            "| score | value | 95 % interval over query identities | from seed to seed |",
            "|---|---|---|---|",
        ]
        for name, value in self.scores.items():
            low, high = self.interval.get(name, (None, None))
            interval = "-" if low is None else f"{low:.1f} to {high:.1f}"
            seeds = "-"
            if name in self.seed_spread:
                deviation, freedom = self.seed_spread[name]
                seeds = f"± {deviation:.2f} ({freedom} degrees of freedom)"
            lines.append(f"| {name} | {value:.1f} | {interval} | {seeds} |")
        if not self.seed_spread:
            lines += [
                "",
                "One seed was run, so how far scores move from seed to seed is not known.",
            ]
        lines += ["", "| a sample may have | test mAP with that alone |", "|---|---|"]
        for subset in map("+".join, self.subsets):
            score = self.subset_scores.get(subset)
            lines.append(f"| {subset} | {'-' if score is None else f'{score:.1f}'} |")
        lines += [
            "",
            f"Licence of the weights: {self.weights_licence}.",
        ]
        return "\n".join(lines)


class Version(NamedTuple):
    """A version of a registered model."""

    name: str
    version: int

    @property
    def uri(self) -> str:
        """Its address for MLflow and for ``jobs/evaluate.py --model``."""
        return f"models:/{self.name}/{self.version}"


def register(
    uri: str,
    name: str,
    folder: Path,
    *,
    run_id: str,
    loader: str,
    inputs: Mapping[str, str],
    width: int,
    card: ModelCard,
    requirements: Sequence[str],
) -> Version:
    """Make a folder of plain data a version of a model, with the alias ``candidate``.

    Args:
        uri: of the server.
        name: of the registered model; created if it is not there.
        folder: what the loader reads.
        run_id: MLflow's id of the run that trained it.
        loader: module of this package with ``_load_pyfunc(path)``.
        inputs: column -> MLflow's type; every column may be left out.
        width: length of an embedding.
        card: goes into the folder as ``card.json``, to the version's page and its tags.
        requirements: pinned packages that the loader needs.

    Raises:
        ValueError: a folder with a file that may hold a pickle, or a bad name.
        ConnectionError: the server cannot be reached, or does not take the model.
    """
    from mlflow.exceptions import MlflowException

    if not re.fullmatch(r"[\w.-]+", name):
        raise ValueError(
            f"tracking.model must be made of letters, digits and _ - ., but got {name!r}"
        )
    _refuse_pickles(folder)
    require_answer(uri)
    write_whole(folder / "card.json", json.dumps(asdict(card), indent=2))
    with (
        registry_errors(uri),
        _mlflows_own_warnings_off(),
        tempfile.TemporaryDirectory() as parent,
    ):
        client = connect(tracking_uri(uri))
        model = _write_model(Path(parent) / "model", folder, loader, inputs, width, requirements)
        client.log_artifacts(run_id, str(model), "model")
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        source = f"{client.get_run(run_id).info.artifact_uri}/model"
        created = client.create_model_version(
            name,
            source,
            run_id,
            tags={CARD: json.dumps(asdict(card)), "next.data_digest": card.data_digest}
            | {name: f"{value:.2f}" for name, value in card.scores.items()},
            description=card.markdown(),
        )
        client.set_registered_model_alias(name, CANDIDATE, created.version)
    return Version(name, int(created.version))


def fetch_model(uri: str, model: str, destination: Path, *, loader: str) -> Path:
    """Download a version and check that loading it executes nothing but ``loader``.

    Args:
        uri: of the server.
        model: ``models:/NAME/VERSION`` or ``models:/NAME@ALIAS``.
        destination: folder to download to.
        loader: the only module that may be named.

    Returns:
        The folder of plain data that ``loader`` reads.

    Raises:
        ValueError: no such address or version, or one that is not to be loaded.
        ConnectionError: the server cannot be reached.
    """
    with registry_errors(uri), _mlflows_own_warnings_off():
        from mlflow.artifacts import download_artifacts
        from mlflow.models import Model

        version = find_version(connect(tracking_uri(uri)), model)
        source = connect(uri).get_model_version_download_uri(version.name, str(version.version))
        local = Path(download_artifacts(source, dst_path=str(destination), tracking_uri=uri))
        flavour = Model.load(str(local / "MLmodel")).flavors.get("python_function", {})
    if flavour.get("loader_module") != loader or flavour.get("code"):
        raise ValueError(
            f"{version.uri} must be a model of this package (loader {loader}, no code of its own), "
            f"but names {flavour.get('loader_module')!r}; it is not loaded"
        )
    _refuse_pickles(local)
    return path_within(local, str(flavour["data"]))


def version_of(uri: str, model: str) -> Version:
    """The version that an address names now, on a server.

    Raises:
        ValueError: it names none.
        ConnectionError: the server cannot be reached.
    """
    with registry_errors(uri):
        return find_version(connect(tracking_uri(uri)), model)


def find_version(client: Any, model: str) -> Version:
    """The version that an address names.

    Raises:
        ValueError: it names none.
    """
    match = _MODEL_URI.fullmatch(model)
    if match is None:
        raise ValueError(
            f"a model must be given as models:/NAME/VERSION or models:/NAME@ALIAS, "
            f"but got {model!r}"
        )
    if match["version"] is not None:
        return Version(match["name"], int(match["version"]))
    version = aliased(client, match["name"], match["alias"])
    if version is None:
        raise ValueError(f"there is no version {model}; see the server's Model registry page")
    return version


def aliased(client: Any, name: str, alias: str) -> Version | None:
    """The version that carries an alias; None: no version does."""
    from mlflow.exceptions import MlflowException

    try:
        found = client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if http_status(error) in (400, 404):
            return None
        raise
    return Version(name, int(found.version))


def _write_model(
    path: Path,
    folder: Path,
    loader: str,
    inputs: Mapping[str, str],
    width: int,
    requirements: Sequence[str],
) -> Path:
    import mlflow.pyfunc
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema, TensorSpec

    columns = [ColSpec(kind, name, required=False) for name, kind in inputs.items()]
    embedding = TensorSpec(np.dtype("float32"), (-1, width))
    mlflow.pyfunc.save_model(
        str(path),
        loader_module=loader,
        data_path=str(folder),
        signature=ModelSignature(Schema(columns), Schema([embedding])),
        pip_requirements=list(requirements),
    )
    shutil.copyfile(folder / "card.json", path / "card.json")
    return path


@contextmanager
def _mlflows_own_warnings_off() -> Iterator[None]:
    """MLflow warns about its own type hints when its models are imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _refuse_pickles(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.suffix in _PICKLES:
            raise ValueError(f"{path} may hold a pickle, which executes code when it is loaded")


@contextmanager
def registry_errors(uri: str) -> Iterator[None]:
    """Turn what MLflow's client raises into what a user can mend.

    Raises:
        ValueError: the server does not take the request.
        ConnectionError: it cannot be reached.
    """
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if http_status(error) in (400, 404):
            raise ValueError(f"{uri}: {short_message(error)}") from error
        raise ConnectionError(f"the registry at {uri}: {short_message(error)}") from error


def run_id_of(folder: str | Path) -> str:
    """MLflow's id of a folder's run.

    Raises:
        ValueError: the run was never delivered to a server.
    """
    address = read_address(Path(folder).absolute())
    if address.run_id is None:
        raise ValueError(
            f"the run in {folder} must be in MLflow, but was never delivered to a server; deliver "
            f"it with jobs/doctor.py --replay first"
        )
    return address.run_id


@contextmanager
def registry_server(uri: str | None, runs: str | Path) -> Iterator[str]:
    """Address of the server that holds the models: the one given, or the local one of a folder.

    Raises:
        FileNotFoundError: no address, and the folder of runs has no local server's store.
        ValueError: that store is on a network file system.
        ConnectionError: nobody answers there.
        PermissionError: the server wants other credentials.
    """
    if uri is not None:
        check_server(uri)
        yield tracking_uri(uri)
        return
    folder = Path(runs).absolute() / "mlflow"
    if not (folder / "mlflow.db").exists():
        raise FileNotFoundError(
            f"{folder} must hold the store of a local MLflow server, but there is none; give "
            f"--storage_path, the folder of all runs, or --tracking.uri"
        )
    require_own_disk(folder, "--storage_path", "MLflow's database")
    with start_server(folder) as server:
        yield server.uri
