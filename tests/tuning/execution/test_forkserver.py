"""Real processes, forked from a real server."""

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from next.training.checkpointing.interruption import Request
from next.tuning.execution.forkserver import Forked, ForkedProcessError, forking

ROOT = Path(__file__).resolve().parents[3]
TARGET = "tests.tuning.forked:answer"


@pytest.fixture(autouse=True)
def _finds_the_tests(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


def silent(_: dict) -> None:
    pass


def ends(pid: int, within_s: float = 20) -> bool:
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        until = time.monotonic() + within_s
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            if time.monotonic() > until:
                return False
            time.sleep(0.05)
    return True


def test_processes_come_of_one_server_share_its_memory_and_have_the_askers_place(
    monkeypatch, tmp_path
):
    with forking(TARGET) as key:
        monkeypatch.setenv("SAID", "one")
        one = Forked(key, TARGET)
        monkeypatch.setenv("SAID", "other")
        monkeypatch.chdir(tmp_path)
        other = Forked(key, TARGET)
        facts = [forked.run({"what": "facts"}, silent) for forked in (one, other)]
        assert facts[0]["parent"] == facts[1]["parent"] != os.getpid()
        assert [fact["pid"] for fact in facts] == [one.pid, other.pid]
        assert [fact["said"] for fact in facts] == ["one", "other"]
        assert facts[1]["folder"] == str(tmp_path)
        for fact in facts:
            assert fact["ballast"] == 102_400_000
            assert fact["own_mib"] < 30, "the server's 100 MB are not its own"
        again = one.run({"what": "facts"}, silent)
        assert again["pid"] == one.pid, "a process answers again and again"
        one.close()
        assert ends(one.pid)
        other.close()
    assert ends(facts[0]["parent"], 0), "nothing is left when the block ends"


def test_a_node_that_forks_nothing_starts_no_server_and_another_starts_its_own(monkeypatch):
    with forking(TARGET, here=False) as key:
        before = psutil.Process().children()
        forked = Forked(key, TARGET)  # as an actor on another node does
        server = forked.run({"what": "facts"}, silent)["parent"]
        assert server in {child.pid for child in psutil.Process().children()}
        assert not {child.pid for child in before} & {server}
        forked.close()
    assert ends(server), "it has been alone for five seconds"


def test_a_report_is_heard_here_and_its_end_there():
    heard = []

    def report(content: dict) -> None:
        heard.append(content["count"])
        if len(heard) == 3:
            raise SystemExit

    with forking(TARGET) as key:
        forked = Forked(key, TARGET)
        assert forked.run({"what": "count"}, report) == 3
        assert heard == [1, 2, 3]
        forked.close()


def test_a_request_reaches_the_call_that_runs_and_is_lost_on_one_that_has_ended():
    with forking(TARGET) as key:
        forked = Forked(key, TARGET)
        for _ in range(2):
            answer = forked.run({"what": "wait"}, lambda told: forked.ask(Request.CHECKPOINT))
            assert answer == "CHECKPOINT"
        psutil.Process(forked.pid).kill()
        assert ends(forked.pid)
        forked.ask(Request.CHECKPOINT)
        forked.close()


@pytest.mark.parametrize("what", ["kill", "raise"])
def test_a_process_that_ends_is_an_error_that_names_it(what, capfd):
    with forking(TARGET) as key:
        forked = Forked(key, TARGET)
        with pytest.raises(ForkedProcessError, match=f"process {forked.pid}, .* ended"):
            forked.run({"what": what}, silent)
        assert ends(forked.pid)
        after = Forked(key, TARGET)  # the server goes on
        assert after.run({"what": "facts"}, silent)["pid"] == after.pid
        after.close()
    if what == "raise":
        assert "ValueError: out of order" in capfd.readouterr().err, "it has the asker's output"


def test_a_process_ends_with_its_asker_and_its_server_soon_after(tmp_path):
    script = (
        "import os\n"
        "from next.tuning.execution.forkserver import Forked\n"
        f"forked = Forked('{os.getpid()}', '{TARGET}')\n"
        "server = forked.run({'what': 'facts'}, print)['parent']\n"
        "forked.run({'what': 'hang'}, lambda told: print(server, told['pid'], flush=True))\n"
    )
    asker = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert asker.stdout is not None
    with asker, asker.stdout:
        server, hanging = map(int, asker.stdout.readline().split())
        asker.kill()
        asker.wait()
    assert ends(hanging)
    assert ends(server), "it has been alone for five seconds"


def test_a_server_that_cannot_start_says_why():
    missing = "tests.tuning.nowhere:answer"
    with (
        forking(missing) as key,
        pytest.raises(RuntimeError, match=r"did not start; it wrote:(.|\n)*No module named"),
    ):
        Forked(key, missing)


def test_trials_find_nothing_of_torch_in_their_actor():
    said = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys\nfrom next.tuning.execution.trial import run_trial\n"
            "print(sorted({'torch', 'open_clip'} & {*sys.modules}))",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.strip() == "[]", "an actor takes its share of memory for nothing then"


ASKED = """
import torch

asked = []
for module, name in [(torch.cuda, "is_available"), (torch.cuda, "device_count"),
                     (torch.cuda, "_lazy_init"), (torch._C, "_cuda_getDeviceCount")]:
    if hasattr(module, name):
        def noted(*given, call=getattr(module, name), name=name):
            asked.append(name)
            return call(*given)
        setattr(module, name, noted)
from next.tuning.execution.training import train_trial
print(asked)
"""


def test_what_the_server_imports_asks_nothing_of_a_gpu():
    said = subprocess.run([sys.executable, "-c", ASKED], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]", "a process could not use it after the fork then"
