"""Check machine, cluster, storage, MLflow and data before a run, and say what mends a mistake."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from next.cli import USER_ERROR, Settings, base_config, named_options, parse, run_defaults, run_job
from next.config import RunConfig, override
from next.doctor.examination import examine, table
from next.doctor.finding import Inquiry
from next.storage import require_own_disk
from next.tracking.run import replay, start_server
from next.tuning.settings import SweepConfig

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class DoctorJob:
    """Find the usual mistakes in under ten seconds; takes the flags that the run will have.

    With --space, or a flag of --sweep, it takes those of a sweep.

    Exit code 0: nothing stands in the way (warnings may); 2: something does, with what mends it.
    """

    data: str | None = None
    """Folder of shards that the run will read."""
    card: Path | None = None
    """Card whose recipe gives the defaults, as for jobs/train.py."""
    recipe: Path | None = None
    """TOML file of settings, as for jobs/train.py."""
    space: Path | None = None
    """File of the space that is to be searched, as for jobs/sweep.py."""
    lock: Path = ROOT / "requirements.txt"
    """File of name==version lines that this environment is held against."""
    replay: Path | None = None
    """Instead: deliver the journal of this run's folder to MLflow (tracking.uri, or the local
    server of the folder's parent), as after a crash or a server that was away."""
    json: bool = False
    """Print the answer as one JSON object."""
    sweep: SweepConfig = SweepConfig()  # noqa: RUF009 (frozen)
    """How the space is searched."""
    config: Settings = RunConfig()  # noqa: RUF009 (frozen)


def main(argv: Sequence[str]) -> int:
    """Parse, call, exit code."""
    began = time.monotonic()
    argv = ["--sweep.trials" if word == "--trials" else word for word in argv]  # as jobs/sweep.py
    job = parse(DoctorJob, argv, default=DoctorJob(config=_defaults(argv)))
    if job.replay is not None:
        return _replay(job, job.replay)
    sweeps = job.space is not None or any(word.startswith("--sweep.") for word in argv)
    config = override(job.config, {"data.uri": job.data})
    findings = examine(Inquiry(config, job.lock, job.sweep if sweeps else None))
    errors = sum(finding.verdict == "error" for finding in findings)
    seconds = time.monotonic() - began
    if job.json:
        checks = [finding._asdict() for finding in findings]
        print(json.dumps({"ok": not errors, "seconds": round(seconds, 2), "checks": checks}))
    else:
        print("\n".join(table(findings)))
        print(f"{errors} errors in {len(findings)} checks, {seconds:.1f} s")
    sys.stdout.flush()
    # A check that hangs must not hold up the answer: its thread is not waited for.
    os._exit(USER_ERROR if errors else 0)


def _defaults(argv: Sequence[str]) -> RunConfig:
    """Those of the run; data that cannot be opened are for the check of the data to report."""
    try:
        return run_defaults(argv)
    except OSError:
        return base_config(None, named_options(argv, "recipe").get("recipe"))


def _replay(job: DoctorJob, folder: Path) -> int:
    with ExitStack() as stack:
        uri = job.config.tracking.uri
        if uri is None:
            local = folder.absolute().parent / "mlflow"
            require_own_disk(local, "the folder above --replay", "MLflow's database")
            uri = stack.enter_context(start_server(local)).uri
        done = replay(folder, uri)
    answer = done._asdict() | {"uri": uri}
    print(json.dumps(answer) if job.json else "  ".join(f"{k} {v}" for k, v in answer.items()))
    return USER_ERROR if done.refused else 0


if __name__ == "__main__":
    run_job(main)
