"""Tell Ray that EC2 takes this spot machine back, as soon as EC2 tells it: two minutes ahead.

    python spot_notice.py [--metadata URL] [options of `ray drain-node`]

Runs beside Ray on each spot node (cluster.yaml starts it) and needs nothing but Python and the
`ray` beside it. Ray starts nothing new on the node then, and a run that trains on it writes a
checkpoint at once and another just before the machine goes. Ends when Ray was told.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime
from pathlib import Path

_log = logging.getLogger(__name__)

EVERY_SECONDS = 5.0
"""Between two looks: as often as AWS asks for."""


def main(argv: list[str]) -> int:
    """Look until there is a notice, and hand it on until Ray takes it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--metadata", default="http://169.254.169.254", help="EC2's service")
    options, rest = parser.parse_known_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    _log.info("looking at %s every %.0f s", options.metadata, EVERY_SECONDS)
    while True:
        end = when(options.metadata)
        if end is not None and told(end, rest):
            return 0
        time.sleep(EVERY_SECONDS)


def when(metadata: str) -> datetime | None:
    """When EC2 takes the machine back; None: nothing is known of it."""
    try:
        key = ask("PUT", f"{metadata}/latest/api/token", "ttl-seconds", "60")
        notice = ask("GET", f"{metadata}/latest/meta-data/spot/instance-action", "", key)
    except urllib.error.HTTPError as error:
        if error.code != 404:  # which is EC2's word for no notice
            _log.warning("%s", error)
        return None
    except OSError as error:
        _log.warning("%s", error)
        return None
    return datetime.fromisoformat(json.loads(notice)["time"])


def ask(method: str, url: str, header: str, value: str) -> str:
    """What the metadata service answers; it wants a key of its own with each question."""
    name = "-".join(part for part in ("X-aws-ec2-metadata-token", header) if part)
    request = urllib.request.Request(url, method=method, headers={name: value})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=3) as answer:
        return str(answer.read().decode())


def told(end: datetime, rest: list[str]) -> bool:
    """Whether Ray took the notice."""
    left = max(0, int((end - datetime.now(UTC)).total_seconds()))
    _log.warning("this machine goes in %d s, at %s UTC", left, f"{end:%H:%M:%S}")
    drain = [
        *(str(Path(sys.executable).parent / "ray"), "drain-node"),
        *("--reason", "DRAIN_NODE_REASON_PREEMPTION"),
        *("--reason-message", "EC2 takes this spot machine back"),
        *("--deadline-remaining-seconds", str(left)),
    ]
    return subprocess.run([*drain, *rest], check=False).returncode == 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
