import http.server
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psutil
import pytest

from next.tracking.delivery.client import check_server, connect
from next.tracking.run import open_run, read_metrics
from next.tracking.server import start_server, view_command


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for_end(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_alive(pid)


def answers(uri: str) -> bool:
    try:
        with urllib.request.urlopen(f"{uri}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


@contextmanager
def answering(status: int):
    """Something in front of a server that answers everything with ``status``."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(status)

        do_POST = do_GET

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as proxy:
        thread = threading.Thread(target=proxy.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{proxy.server_address[1]}"
        proxy.shutdown()
        thread.join()


def test_a_second_driver_shares_the_server_and_the_last_one_ends_it(server):
    with start_server(server.folder) as second:
        assert second.pid == server.pid
        assert second.uri == server.uri
    assert answers(server.uri)


def test_it_is_one_process_that_leads_its_own_group_and_serves_loopback_only(server):
    process = psutil.Process(server.pid)
    assert not process.children(recursive=True)
    assert os.getpgid(server.pid) == server.pid != os.getpgid(0)
    listening = [c.laddr.ip for c in process.net_connections("tcp") if c.status == "LISTEN"]
    assert listening == ["127.0.0.1"]
    assert process.memory_info().rss < 400 * 2**20


def test_the_start_does_not_touch_this_process(server):
    assert "MLFLOW_TRACKING_URI" not in os.environ
    assert not [name for name in os.environ if name.startswith("_MLFLOW_SERVER")]


@pytest.mark.slow
def test_a_server_that_is_killed_is_started_again_at_its_address_and_nothing_is_lost(
    tmp_path, caplog
):
    with (
        start_server(tmp_path / "mlflow", wait=False) as server,
        open_run(uri=server.uri, experiment="e", name="r", folder=tmp_path / "run") as run,
    ):
        run.log_metrics({"train/loss": 1.0}, step=1)
        for step in (1, 2):  # while it starts, and while it serves
            first = server.pid
            os.killpg(first, signal.SIGKILL)
            assert wait_for_end(first, 10)
            deadline = time.monotonic() + 120
            while not answers(server.uri) and time.monotonic() < deadline:
                time.sleep(0.1)
            assert server.pid != first
            run.log_metrics({"train/loss": step + 1.0}, step=step + 1)
        deadline = time.monotonic() + 120
        while (run_id := run.run_id) is None:
            assert time.monotonic() < deadline
        with start_server(tmp_path / "mlflow") as second:
            assert (second.uri, second.pid) == (server.uri, server.pid), "shared, as before"
        run.close(timeout=60)
        history = connect(server.uri).get_metric_history(run_id, "train/loss")
        assert connect(server.uri).get_run(run_id).info.status == "FINISHED"
    assert not answers(server.uri)
    assert "had ended, and was started again; nothing is lost" in caplog.text
    logged = [(line["step"], line["values"]["train/loss"]) for line in read_metrics(run.folder)]
    assert sorted((metric.step, metric.value) for metric in history) == logged
    assert len(logged) == 3


def test_a_server_that_is_stopped_is_ended_all_the_same(tmp_path):
    with start_server(tmp_path, wait=False) as server:
        os.kill(server.pid, signal.SIGSTOP)
        begun = time.monotonic()
    assert time.monotonic() - begun < 8, "SIGTERM is not waited for"
    assert not is_alive(server.pid)


@pytest.mark.slow
def test_a_server_that_ends_by_itself_and_never_served_is_not_started_again(tmp_path, caplog):
    (tmp_path / "mlflow.db").write_text("this is no database\n" * 100)
    with start_server(tmp_path, wait=False) as server:
        first = server.pid
        deadline = time.monotonic() + 120
        while "is not started again" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.1)
        assert server.pid == first
    assert "after 1 starts, and is not started again; what runs log meanwhile waits" in caplog.text


def test_a_killed_driver_takes_its_server_along(tmp_path):
    code = (
        "import sys, time\n"
        "from next.tracking.server import start_server\n"
        "sys.stdout.write(str(start_server(sys.argv[1], wait=False).pid))\n"
        "sys.stdout.flush()\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE
    ) as driver:
        assert driver.stdout is not None
        pid = int(driver.stdout.read1())
        assert is_alive(pid)
        driver.kill()
    assert wait_for_end(pid, 10)


def test_a_server_that_does_not_come_up_shows_the_end_of_its_log(tmp_path):
    (tmp_path / "mlflow.db").write_text("this is no database\n" * 100)
    with pytest.raises(
        RuntimeError, match=r"(?s)ended while it started; the end of .*server\.log:\n.*database"
    ):
        start_server(tmp_path)


def test_a_server_that_does_not_answer_in_time_is_an_error(tmp_path):
    with (
        start_server(tmp_path, wait=False) as server,
        pytest.raises(RuntimeError, match=r"must answer at http://127.0.0.1:.* within 0 s"),
    ):
        server.wait(timeout=0)
    assert not is_alive(server.pid)


def test_a_port_that_is_taken_is_an_error(tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port} must be free"):
            start_server(tmp_path, port=port)


def test_the_view_command_opens_a_folder(server):
    command = view_command(server.folder)
    # A job in the background of a shell starts with Ctrl-C ignored, and its children inherit that.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(
        command, shell=True, stderr=subprocess.PIPE, text=True, preexec_fn=heed
    ) as viewer:
        assert viewer.stderr is not None
        lines = [viewer.stderr.readline(), viewer.stderr.readline()]
        assert f"open {server.uri}" in "".join(lines)
        shell = psutil.Process(viewer.pid)
        for process in [*shell.children(), shell]:
            process.send_signal(signal.SIGINT)
        viewer.communicate(timeout=10)
    assert answers(server.uri)


def test_the_view_command_refuses_a_folder_without_runs(tmp_path):
    done = subprocess.run(
        view_command(tmp_path), shell=True, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "holds no mlflow.db; give the folder that a run wrote" in done.stderr
    assert not list(Path(tmp_path).iterdir())


def test_a_server_that_takes_runs_passes_the_check(server):
    check_server(server.uri)


def test_the_check_names_a_server_that_is_not_there():
    with pytest.raises(ConnectionError, match=r"must take runs, but it does not.*refused"):
        check_server("http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [
        (401, PermissionError, "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        (403, ConnectionError, "--allowed-hosts"),
    ],
)
def test_the_check_tells_credentials_from_a_host_that_is_not_allowed(status, error, words):
    with answering(status) as uri, pytest.raises(error, match=words):
        check_server(uri)
