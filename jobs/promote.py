"""Register a run's best checkpoint, and make a version the champion if it meets a condition."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from next.cli import FAILURE, parse, run_job
from next.tracking.registry.promotion import promote
from next.tracking.registry.versions import CANDIDATE, registry_server


@dataclass(frozen=True)
class PromoteJob:
    """Register a run as a candidate (--run), promote it to champion (--when), or both."""

    model: str
    """Name of the registered model."""
    run: Path | None = None
    """Folder of a finished run or sweep; its best checkpoint becomes the candidate."""
    when: tuple[str, ...] = ()
    """Conditions that all must hold: 'test/mAP >= 80', 'test/mAP > champion + 0.5'."""
    version: str = CANDIDATE
    """Version that is promoted: an alias or a number."""
    tracking_uri: Annotated[str | None, tyro.conf.arg(name="tracking.uri")] = None
    """MLflow server; without it, the local one of --storage_path."""
    storage_path: Path | None = None
    """Folder of all runs, whose local server is used without --tracking.uri; None: the one that
    --run lies in, or else runs."""
    dry_run: bool = False
    """Say whether the run could be registered and whether --version meets the conditions of --when;
    register and promote nothing."""
    json: bool = False
    """Print the answer as one JSON object."""


def main(argv: Sequence[str]) -> int:
    """Parse, call, exit code."""
    job = parse(PromoteJob, argv)
    if job.run is None and not job.when:
        raise ValueError("nothing to do: give --run to register, --when to promote, or both")
    answer: dict[str, object] = {}
    lines: list[str] = []
    promoted = True
    beside = job.run.absolute().parent if job.run else Path("runs")
    with registry_server(job.tracking_uri, job.storage_path or beside) as uri:
        if job.run is not None:
            # Takes five seconds to import.
            from next.training.results.registration import read_card, register_run

            if job.dry_run:
                answer["scores"] = read_card(job.run.absolute()).scores
                lines.append(f"could be    registered as {CANDIDATE} of {job.model}: {job.run}")
            else:
                version = register_run(job.run.absolute(), uri, job.model)
                answer["registered"] = version.uri
                lines.append(f"registered  {version.uri} as {CANDIDATE}")
        if job.when:
            found = promote(uri, job.model, job.when, alias=job.version, dry_run=job.dry_run)
            promoted = found.promoted
            answer |= {
                "promoted": promoted,
                "version": found.version.uri,
                "champion_before": found.champion.uri if found.champion else None,
                "findings": found.findings,
            }
            lines += [f"condition   {finding}" for finding in found.findings]
            lines.append(
                f"{'would be champion' if job.dry_run else 'champion   '} {found.version.uri}"
                if promoted
                else f"not promoted: {found.version.uri} does not meet every condition"
            )
    if job.dry_run:
        lines.append("nothing was registered or promoted (--dry-run)")
    print(json.dumps(answer) if job.json else "\n".join(lines))
    return 0 if promoted else FAILURE


if __name__ == "__main__":
    run_job(main, kept="the registry has what was done so far")
