"""What docs/running.md tells a user to type exists; tests/cluster runs the local commands."""

import re
import shlex
from pathlib import Path

from next.cli import parse
from next.config import setting_names
from tests.cluster.cluster import BLOCKS as RUN
from tests.cluster.cluster import commands, job

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "running.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)


def test_every_file_that_the_page_names_exists():
    named = set(re.findall(r"\b(?:jobs|deploy|datasets)/[\w./-]+\.\w+", PAGE))
    assert len(named) >= 8
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_every_job_line_is_one_that_its_job_accepts():
    from jobs.doctor import DoctorJob
    from jobs.train import TrainJob

    kinds = {"train": TrainJob, "doctor": DoctorJob}
    seen = 0
    text = "\n".join(BLOCKS).replace("\\\n", " ").replace("$TRACKING", "http://mlflow:5000")
    for name, flags in re.findall(r"python jobs/(train|doctor)\.py ([^\n#']*)", text):
        parse(kinds[name], shlex.split(flags.replace("$", "/")))
        seen += 1
    assert seen >= 7


def test_the_blocks_that_the_tests_of_a_cluster_run_are_on_the_page():
    assert sorted(re.findall(r"<!-- run: (\w+) -->", PAGE)) == sorted(RUN)
    for name in RUN:
        assert commands(name)
    for name in ("train", "prepare", "caption run", "sweep", "evaluate", "promote"):
        assert job(name).startswith(f"python jobs/{name.split()[0]}.py ")


def test_every_block_is_shell_that_parses():
    import subprocess

    for block in BLOCKS:
        done = subprocess.run(["bash", "-n", "-c", block], capture_output=True, text=True)
        assert done.returncode == 0, f"{done.stderr}\n{block}"


def test_a_file_that_will_hold_a_secret_is_its_owners_alone_from_its_first_moment():
    """``chmod`` comes after others could have opened it, and a command line is read by all."""
    making = r"get-auth-token --generate|> ?\S*\.env|_(?:PASSWORD|KEY|TOKEN)=%s"
    pages = [*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "SECURITY.md"]
    pages += [*(ROOT / "deploy").rglob("*.md"), *(ROOT / "deploy").rglob("*.yaml")]
    found = 0
    for page in [*pages, ROOT / "cluster.yaml"]:
        text = page.read_text().replace("\\\n", " ")
        for line in (line for line in text.splitlines() if re.search(making, line)):
            found += 1
            assert re.search(r"\(umask 077 && [^)]*", line), f"{page}: {line}"
        assert not re.search(r"--from-literal=\w*(PASSWORD|KEY|TOKEN)", text), page
    assert found >= 4


def test_a_block_that_brings_a_port_here_ends_when_the_port_answers():
    forwarding = [block for block in BLOCKS if re.search(r"&$", block, re.M)]
    assert len(forwarding) == 2
    for block in forwarding:
        _, waiting = block.splitlines()
        assert waiting.startswith("timeout 60 sh -c 'until curl "), "pasted whole, nothing races it"


def test_the_wait_for_a_port_ends_when_something_answers_and_fails_when_nothing_does(tmp_path):
    import subprocess
    import sys

    from tests.ports import free_port

    [waiting] = {line for line in PAGE.splitlines() if line.startswith("timeout 60 sh -c 'until")}
    port = free_port()
    here = waiting.replace("8265", str(port)).replace("timeout 60", "timeout 20")
    none = subprocess.run(["bash", "-c", here.replace("timeout 20", "timeout 1")])
    assert none.returncode == 124
    (tmp_path / "api").mkdir()
    (tmp_path / "api" / "gcs_healthz").write_text("success")
    server = subprocess.Popen(
        [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert subprocess.run(["bash", "-c", here]).returncode == 0
    finally:
        server.kill()
        server.wait()


def test_a_new_aws_account_gets_what_spot_nodes_need():
    [once] = [block for block in BLOCKS if "create-instance-profile" in block]
    assert '"iam:CreateServiceLinkedRole"' in once
    [quota] = [block for block in BLOCKS if "service-quotas" in block]
    assert "create-service-linked-role --aws-service-name spot.amazonaws.com" in quota


def test_settings_that_the_page_names_are_settings():
    flags = set(re.findall(r"--((?:run|data|tracking|scaling)\.[\w.]+)", PAGE))
    assert flags <= set(setting_names())


def test_the_target_of_the_tests_of_a_cluster_is_in_the_makefile():
    assert re.search(
        r'^test-network:.*\n.*-m "network or cluster"', (ROOT / "Makefile").read_text(), re.M
    )
