import json
import logging
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from next.tracking import journal as journal_module
from next.tracking.delivery.client import connect
from next.tracking.delivery.delivery import read_address
from next.tracking.journal import FILE_NAME, Artifact, Status, encode, read_metrics, read_records
from next.tracking.run import check_name, open_run, replay, start_server
from tests.tracking.conftest import child_run_ids

DEAD = "http://127.0.0.1:9"


def begin(uri, folder, **given):
    settings = {"experiment": "demo", "name": folder.name, "params": {}, "tags": {}}
    return open_run(uri=uri, folder=folder, **(settings | given))


def in_journal(folder) -> Counter:
    """How often each (name, step, value) was logged; infinities as MLflow stores them."""
    largest = sys.float_info.max
    return Counter(
        (name, line["step"], repr(min(max(value, -largest), largest)))
        for line in read_metrics(folder)
        for name, value in line["values"].items()
    )


def on_server(client, run_id) -> Counter:
    names = client.get_run(run_id).data.metrics
    return Counter(
        (name, metric.step, repr(metric.value))
        for name in names
        for metric in client.get_metric_history(run_id, name)
    )


def becomes(client, run_id, status) -> bool:
    deadline = time.monotonic() + 20
    while client.get_run(run_id).info.status != status and time.monotonic() < deadline:
        time.sleep(0.1)
    return client.get_run(run_id).info.status == status


def test_a_sweep_appears_as_a_parent_with_lean_children(server, client, tmp_path):
    with begin(server.uri, tmp_path / "sweep", params={"trials": 3}) as parent:
        for number in range(3):
            swept = {"model.semantic.experts": number, "captions.sampling": "all"}
            with begin(
                server.uri, tmp_path / f"trial{number}", parent=parent.key, params=swept
            ) as trial:
                trial.log_metrics({"val/mAP": 10.0 * number}, step=1)
    children = child_run_ids(server.uri, parent.experiment_id, parent.run_id)
    runs = [client.get_run(child) for child in children]
    assert [run.info.run_name for run in runs] == ["trial0", "trial1", "trial2"]
    assert [run.data.params["model.semantic.experts"] for run in runs] == ["0", "1", "2"]
    assert all(len(run.data.params) == 2 for run in runs)
    assert [run.data.metrics for run in runs] == [{"val/mAP": 10.0 * n} for n in range(3)]
    assert client.get_run(parent.run_id).data.params == {"trials": "3"}
    assert client.get_experiment(parent.experiment_id).name == "demo"


def test_a_parent_may_be_given_by_its_mlflow_id(server, client, tmp_path):
    with (
        begin(server.uri, tmp_path / "sweep") as parent,
        begin(server.uri, tmp_path / "trial", parent=parent.run_id) as trial,
    ):
        pass
    tags = client.get_run(trial.run_id).data.tags
    assert tags["mlflow.parentRunId"] == parent.run_id


def test_the_server_holds_what_the_journal_holds(server, client, tmp_path):
    source = tmp_path / "elsewhere.txt"
    source.write_text("picture")
    with begin(server.uri, tmp_path / "run", tags={"next.plan_hash": "ab"}) as run:
        for step in range(120):
            run.log_metrics({f"train/m{n}": step / (n + 1) for n in range(10)}, step=step)
        run.log_metrics({"a": math.nan, "b": math.inf, "c": -math.inf}, step=7)
        run.set_tags({"next.best": True})
        run.log_artifact(source, "figures")
        run.log_text("seed = 0\n", "config.toml")
        (run.folder / "pictures").mkdir()
        (run.folder / "pictures" / "cmc.txt").write_text("cmc")
        run.log_artifact(run.folder / "pictures", "all")
        run.log_data("demo", "d" * 64, "/data/demo", "train")
    source.unlink()
    assert on_server(client, run.run_id) == in_journal(run.folder)
    assert sum(in_journal(run.folder).values()) == 1203

    stored = client.get_run(run.run_id)
    assert stored.info.status == "FINISHED"
    assert stored.data.tags["next.plan_hash"] == "ab"
    assert stored.data.tags["next.best"] == "True"
    [data] = stored.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("demo", "d" * 36)
    assert json.loads(data.dataset.source)["digest"] == "d" * 64
    assert [(tag.key, tag.value) for tag in data.tags] == [("mlflow.data.context", "train")]
    for name, text in [
        ("figures/elsewhere.txt", "picture"),
        ("config.toml", "seed = 0\n"),
        ("all/cmc.txt", "cmc"),
    ]:
        path = client.download_artifacts(run.run_id, name, str(tmp_path))
        assert Path(path).read_text() == text


def test_a_failure_is_a_failed_run(server, client, tmp_path):
    with pytest.raises(ZeroDivisionError), begin(server.uri, tmp_path / "run") as run:
        raise ZeroDivisionError
    assert client.get_run(run.run_id).info.status == "FAILED"


def test_a_killed_process_is_completed_by_a_replay_exactly_once(server, client, tmp_path):
    code = (
        "import os, signal, sys, time\n"
        "from next.tracking.run import open_run\n"
        "run = open_run(uri=sys.argv[1], experiment='demo', name='r', folder=sys.argv[2])\n"
        "assert run.run_id\n"
        "for step in range(300): run.log_metrics({'a': step, 'b': 0.5}, step=step)\n"
        "time.sleep(2.5)\n"  # some of them are delivered
        "for step in range(300, 400): run.log_metrics({'a': step, 'b': 0.5}, step=step)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    folder = tmp_path / "run"
    done = subprocess.run([sys.executable, "-c", code, server.uri, str(folder)], check=False)
    assert done.returncode == -signal.SIGKILL
    before = read_address(folder)
    assert 0 < before.delivered < (folder / FILE_NAME).stat().st_size

    result = replay(folder, server.uri)
    assert result.run_id == before.run_id
    assert result.delivered > 0
    assert result.refused == 0
    assert on_server(client, result.run_id) == in_journal(folder)
    assert sum(in_journal(folder).values()) == 800
    assert client.get_run(result.run_id).info.status == "KILLED"
    assert replay(folder, server.uri).delivered == 0


def test_a_lost_acknowledgement_doubles_nothing(server, client, tmp_path):
    with begin(server.uri, tmp_path / "run", params={"p": 1}, tags={"t": 1}) as run:
        for step in range(50):
            run.log_metrics({"a": step, "nan": math.nan}, step=step)
        run.log_data("demo", "d", "/data", "train")
        run.log_text("x", "x.txt")
        run_id = run.run_id
    (run.folder / "run.json").unlink()
    assert replay(run.folder, server.uri).run_id == run_id
    assert on_server(client, run_id) == in_journal(run.folder)
    assert len(client.get_run(run_id).inputs.dataset_inputs) == 1
    assert client.get_run(run_id).info.status == "FINISHED"


def test_opening_the_folder_again_goes_on_with_the_same_run(server, client, tmp_path):
    with begin(server.uri, tmp_path / "run", params={"p": 1}) as first:
        for step in range(10):
            first.log_metrics({"a": step, "b": math.nan}, step=step)
    with begin(server.uri, tmp_path / "run", params={"p": 1, "q": 2}) as second:
        assert becomes(client, second.run_id, "RUNNING")
        for step in range(5, 15):  # the last checkpoint was after step 5
            second.log_metrics({"a": step, "b": math.nan}, step=step)
    assert second.run_id == first.run_id
    assert second.key == first.key
    stored = on_server(client, first.run_id)
    assert stored == in_journal(second.folder)
    assert set(stored.values()) == {1}
    assert len(stored) == 30
    assert client.get_run(first.run_id).data.params == {"p": "1", "q": "2"}
    assert client.get_run(first.run_id).info.status == "FINISHED"


def test_a_parameter_that_changes_is_told_and_stops_nothing(server, client, tmp_path, caplog):
    begin(server.uri, tmp_path / "run", params={"p": 1}).close()
    with begin(server.uri, tmp_path / "run", params={"p": 2}) as run:
        run.log_metrics({"a": 1}, step=1)
    assert "parameter p was 1 when the run began and is 2 now" in caplog.text
    assert client.get_run(run.run_id).data.params == {"p": "1"}
    assert client.get_run(run.run_id).data.metrics == {"a": 1.0}


def test_a_dead_server_costs_the_training_nothing_and_loses_nothing(
    server, client, tmp_path, caplog
):
    run = begin(DEAD, tmp_path / "run")
    begun = time.monotonic()
    for step in range(200):
        run.log_metrics({"a": step}, step=step)
    run.log_text("x", "x.txt")
    run.set_tags({"t": 1})
    run.log_data("demo", "d", "/data", "train")
    assert time.monotonic() - begun < 1
    begun = time.monotonic()
    run.close(timeout=1)
    assert time.monotonic() - begun < 2
    assert "206 records of the run" in caplog.text
    assert f"-m next.tracking.replay {run.folder} --uri {DEAD}" in caplog.text

    result = replay(run.folder, server.uri)
    assert result.delivered == 206
    assert on_server(client, result.run_id) == in_journal(run.folder)
    assert client.list_artifacts(result.run_id)[0].path == "x.txt"
    assert client.get_run(result.run_id).info.status == "FINISHED"


def test_a_server_that_takes_connections_and_never_answers_holds_up_nothing(tmp_path):
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        run = begin(f"http://127.0.0.1:{deaf.getsockname()[1]}", tmp_path / "run")
        begun = time.monotonic()
        run.log_metrics({"a": 1}, step=1)
        run.close(timeout=0.5)
        assert time.monotonic() - begun < 2
    assert in_journal(run.folder) == {("a", 1, "1.0"): 1}


@pytest.mark.slow
def test_a_server_that_hangs_costs_seconds_at_the_end_and_gets_everything_by_the_printed_command(
    tmp_path, caplog
):
    store = tmp_path / "runs" / "mlflow"
    with start_server(store) as local:
        run = begin(local.uri, tmp_path / "runs" / "run")
        run.log_metrics({"a": 1}, step=1)
        run_id = run.run_id
        assert run_id is not None
        os.kill(local.pid, signal.SIGSTOP)
        run.log_metrics({"a": 2}, step=2)
        begun = time.monotonic()
        run.close()
        assert time.monotonic() - begun < 15, "7 s, and no request's whole time-out"
        begun = time.monotonic()
        with begin(local.uri, run.folder) as again:  # as the test scores are logged
            again.log_metrics({"test/mAP": 3}, step=2)
            assert again.run_id == run_id, "known from before"
        assert time.monotonic() - begun < 10
    assert "are not on the tracking server, which does not answer" in caplog.text
    command = re.findall(r"and so does: (.*)", caplog.text)[-1]
    assert command.endswith(f"-m next.tracking.replay {run.folder} --local {store}")
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(rf"\d+ records delivered, 0 refused, run {run_id}", done.stderr)
    with start_server(store) as local:
        client = connect(local.uri)
        assert on_server(client, run_id) == in_journal(run.folder)
        assert client.get_run(run_id).info.status == "FINISHED"


def test_a_replay_by_hand_says_in_a_line_what_is_wrong(tmp_path):
    command = [sys.executable, "-m", "next.tracking.replay", str(tmp_path), "--uri", DEAD]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.fullmatch(r"error: .* must be the folder of a run, but holds no .*\n", done.stderr)


def test_a_proxy_of_the_environment_is_not_asked_for_what_is_on_this_machine(
    server, client, tmp_path, monkeypatch
):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, DEAD)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "elsewhere.invalid")
    with begin(server.uri, tmp_path / "run") as run:
        run.log_metrics({"a": 1}, step=1)
        run.log_text("x", "x.txt")
    assert on_server(client, run.run_id) == {("a", 1, "1.0"): 1}
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == "elsewhere.invalid,127.0.0.1"


def test_another_server_gets_the_whole_run(server, client, tmp_path):
    with begin(server.uri, tmp_path / "run") as run:
        run.log_metrics({"a": 1}, step=1)
    address = tmp_path / "run" / "run.json"
    unknown = json.loads(address.read_text()) | {"run_id": "0" * 32}
    address.write_text(json.dumps(unknown))
    client.set_tag(run.run_id, "next.run_key", "somebody-else")
    result = replay(run.folder, server.uri)
    assert result.run_id not in (run.run_id, "0" * 32)
    assert on_server(client, result.run_id) == in_journal(run.folder)


def test_a_run_that_was_created_twice_by_a_lost_answer_becomes_one(server, client, tmp_path):
    begin(DEAD, tmp_path / "run").close(timeout=0.2)
    opened = next(read_records(tmp_path / "run")).record
    experiment = client.get_experiment_by_name("demo")
    doubles = [
        client.create_run(experiment.experiment_id, tags={"next.run_key": opened.key})
        for _ in range(2)
    ]
    result = replay(tmp_path / "run", server.uri)
    states = {run.info.run_id: client.get_run(run.info.run_id).info for run in doubles}
    assert states.pop(result.run_id).lifecycle_stage == "active"
    assert [info.lifecycle_stage for info in states.values()] == ["deleted"]


def test_a_double_that_a_late_answer_created_is_gone_when_the_run_ends(server, client, tmp_path):
    with begin(server.uri, tmp_path / "run") as run:
        run.log_metrics({"a": 1}, step=1)
        tags = {"next.run_key": run.key}
        doubles = [client.create_run(run.experiment_id, start_time=1, tags=tags) for _ in range(3)]
    stages = [client.get_run(double.info.run_id).info.lifecycle_stage for double in doubles]
    assert stages == ["deleted"] * 3
    assert on_server(client, run.run_id) == {("a", 1, "1.0"): 1}
    assert client.get_run(run.run_id).info.status == "FINISHED"


def test_a_refused_record_does_not_hold_up_the_others(server, client, tmp_path, caplog):
    run = begin(server.uri, tmp_path / "run")
    client.log_param(run.run_id, "p", "taken")
    run.close()
    run = begin(server.uri, tmp_path / "run", params={"p": "other"})
    run.log_metrics({"a": 1}, step=1)
    run.close()
    assert client.get_run(run.run_id).data.metrics == {"a": 1.0}
    assert client.get_run(run.run_id).info.status == "FINISHED"
    assert "does not take a record, which stays in the journal: Params" in caplog.text
    assert "1 records of the run" in caplog.text
    assert replay(run.folder, server.uri).refused == 1


def test_an_artifact_that_is_gone_is_told_and_taken_when_it_is_back(
    server, client, tmp_path, caplog
):
    folder = tmp_path / "run"
    run = begin(DEAD, folder)
    (folder / "late.txt").write_text("x")
    run.log_artifact(folder / "late.txt")
    run.log_metrics({"a": 1}, step=1)
    run.close(timeout=0.2)
    (folder / "late.txt").unlink()
    result = replay(folder, server.uri)
    assert result.refused == 1
    assert "late.txt is gone" in caplog.text
    assert client.get_run(result.run_id).data.metrics == {"a": 1.0}
    (folder / "late.txt").write_text("x")
    assert replay(folder, server.uri) == (1, 0, result.run_id)
    assert client.list_artifacts(result.run_id)[0].path == "late.txt"


def test_a_run_that_was_deleted_on_the_server_is_not_created_again(server, client, tmp_path):
    begin(server.uri, tmp_path / "run").close()
    run_id = read_address(tmp_path / "run").run_id
    client.delete_run(run_id)
    with pytest.raises(ConnectionError, match="is deleted on the server; restore it"):
        replay(tmp_path / "run", server.uri)
    client.restore_run(run_id)
    assert replay(tmp_path / "run", server.uri).run_id == run_id


def test_a_child_waits_for_its_parent(server, tmp_path):
    parent = begin(DEAD, tmp_path / "sweep")
    child = begin(server.uri, tmp_path / "trial", parent=parent.key)
    for run in (child, parent):
        run.close(timeout=0.5)
    with pytest.raises(ConnectionError, match=r"the parent run .* is not on the server yet"):
        replay(child.folder, server.uri)
    above = replay(parent.folder, server.uri)
    below = replay(child.folder, server.uri)
    experiment_id = read_address(child.folder).experiment_id
    assert child_run_ids(server.uri, experiment_id, above.run_id) == [below.run_id]


def test_a_journal_that_lost_its_tail_is_delivered_again(server, client, tmp_path):
    with begin(server.uri, tmp_path / "run") as run:
        for step in range(20):
            run.log_metrics({"a": step}, step=step)
        run_id = run.run_id
    path = tmp_path / "run" / FILE_NAME
    path.write_bytes(path.read_bytes()[:-1500])
    assert len(read_metrics(tmp_path / "run")) < 15
    for _ in range(2):  # goes on from a checkpoint of before, and once more
        with begin(server.uri, tmp_path / "run") as run:
            run.log_metrics({"z": 1}, step=1)
            for step in range(10, 20):
                run.log_metrics({"a": step}, step=step)
    assert run.run_id == run_id
    assert client.get_run(run_id).data.metrics["z"] == 1.0
    values = on_server(client, run_id)
    assert set(values.values()) == {1}, "none twice"
    assert {step for name, step, _ in values if name == "a"} == set(range(20)), "and all of them"


def test_without_an_address_the_journal_is_all(tmp_path):
    with begin(None, tmp_path / "run") as run:
        run.log_metrics({"a": 1}, step=3)
        assert run.run_id is None
        assert run.url is None
    assert in_journal(tmp_path / "run") == {("a", 3, "1.0"): 1}
    statuses = [e.record for e in read_records(tmp_path / "run") if isinstance(e.record, Status)]
    assert [status.status for status in statuses] == ["RUNNING", "FINISHED"]
    assert not (tmp_path / "run" / "run.json").exists()


def test_closing_twice_is_closing_once_and_nothing_is_logged_after(tmp_path):
    run = begin(None, tmp_path / "run")
    run.close("KILLED")
    run.close()
    last = [entry.record for entry in read_records(tmp_path / "run")][-1]
    assert isinstance(last, Status)
    assert last.status == "KILLED"
    with pytest.raises(RuntimeError, match="is closed; open it again to log"):
        run.log_metrics({"a": 1}, step=1)


def test_an_address_that_is_not_http_is_an_error_and_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"tracking\.uri must be an http"):
        begin("sqlite:///mlflow.db", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_of_another_experiment_is_an_error(tmp_path):
    begin(None, tmp_path / "run").close()
    with pytest.raises(ValueError, match="holds a run of 'demo' and not of 'other'"):
        begin(None, tmp_path / "run", experiment="other")
    begin(None, tmp_path / "run").close()


@pytest.mark.parametrize("name", ["", "a,b", "/a", "a/", "a//b", "../a", "a/./b", "x" * 251, "a\n"])
def test_a_name_that_mlflow_would_refuse_is_refused_at_once(tmp_path, name):
    with pytest.raises(ValueError, match="a metric, parameter or tag must be named"):
        check_name(name)
    with begin(None, tmp_path / "run") as run, pytest.raises(ValueError, match="must be named"):
        run.log_metrics({name: 1.0}, step=0)


def test_a_name_that_passes_the_check_is_one_that_mlflow_takes(server, client, tmp_path):
    names = ["a", "val/mAP", "model.routing.temperature", "a b:c-d_e", "größe", "x" * 250]
    with begin(server.uri, tmp_path / "run", params=dict.fromkeys(names, 1)) as run:
        run.log_metrics(dict.fromkeys(names, 1.0), step=0)
    assert sorted(client.get_run(run.run_id).data.metrics) == sorted(names)
    assert sorted(client.get_run(run.run_id).data.params) == sorted(names)


def test_a_missing_artifact_and_a_place_outside_are_errors(tmp_path):
    with begin(None, tmp_path / "run") as run:
        with pytest.raises(FileNotFoundError, match="must exist to be logged"):
            run.log_artifact(tmp_path / "none.png")
        (tmp_path / "a.txt").write_text("")
        with pytest.raises(ValueError, match="must be a relative path like 'figures'"):
            run.log_artifact(tmp_path / "a.txt", "../../etc")


def test_a_replay_of_a_run_that_is_being_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(journal_module, "_LOCK_SECONDS", 0.1)
    with begin(None, tmp_path / "run"), pytest.raises(RuntimeError, match="must have one writer"):
        replay(tmp_path / "run", DEAD)


def test_a_replay_of_somebody_elses_run_sends_nothing_from_outside_its_folder(
    server, client, tmp_path, caplog
):
    folder, secret = tmp_path / "run", tmp_path / "secret.txt"
    secret.write_text("mine")
    (tmp_path / "secrets").mkdir()
    begin(None, folder).close()
    (folder / "sub").mkdir()
    (folder / "sub" / "own.txt").write_text("theirs")
    (folder / "link.txt").symlink_to(secret)
    (folder / "mixed").mkdir()
    (folder / "mixed" / "link.txt").symlink_to(secret)
    named = ["sub", str(secret), "../secret.txt", "sub/../../secret.txt", "link.txt", "mixed"]
    with (folder / FILE_NAME).open("ab") as file:
        for path in [*named, "../secrets"]:
            file.write(encode(Artifact(path, "got")))
    result = replay(folder, server.uri)
    assert result.refused == 6
    got = [item.path for item in client.list_artifacts(result.run_id, "got")]
    assert got == ["got/own.txt"]
    assert "'../secret.txt' must name a file within" in caplog.text


def test_a_replay_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must be the folder of a run"):
        replay(tmp_path, DEAD)
    begin(None, tmp_path / "run").close()
    with pytest.raises(ConnectionError, match="Connection refused"):
        replay(tmp_path / "run", DEAD)


def test_mlflow_is_not_imported_with_the_module():
    code = "import sys, next.tracking.run; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_several_runs_begin_an_experiment_together(server, client, tmp_path):
    runs = [begin(server.uri, tmp_path / f"r{n}", experiment="together") for n in range(4)]
    for run in runs:
        run.close()
    assert len({run.experiment_id for run in runs}) == 1
    assert len({run.run_id for run in runs}) == 4


def test_the_log_is_quiet_while_a_server_starts(server, tmp_path, caplog):
    with caplog.at_level(logging.INFO), begin(server.uri, tmp_path / "run") as run:
        run.log_metrics({"a": 1}, step=1)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
