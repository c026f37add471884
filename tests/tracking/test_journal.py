import json
import math
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from next.tracking import journal as module
from next.tracking.journal import (
    FILE_NAME,
    Artifact,
    Data,
    Journal,
    Metrics,
    Opened,
    Params,
    Status,
    Tags,
    decode,
    encode,
    is_boundary,
    read_metrics,
    read_records,
)

EVERY_KIND = [
    Opened("a-b", "demo", "run", None, 1.5),
    Params({"optim.lr": "0.1"}),
    Tags({"git.commit": "ünknown\n"}),
    Metrics(3, 2.125, {"train/loss": 0.1}),
    Artifact("figures/cmc.png", "figures"),
    Data("demo", "abc", "/data", "train"),
    Status("FINISHED", 4.0),
]


def write(folder, records) -> None:
    journal = Journal(folder)
    for record in records:
        journal.append(record)
    journal.close()


def test_records_come_back_in_the_order_in_which_they_were_logged(tmp_path):
    write(tmp_path, EVERY_KIND)
    assert [entry.record for entry in read_records(tmp_path)] == EVERY_KIND


def test_reading_can_begin_at_the_end_of_any_record(tmp_path):
    write(tmp_path, EVERY_KIND)
    ends = [entry.end for entry in read_records(tmp_path)]
    for number, end in enumerate(ends):
        rest = [entry.record for entry in read_records(tmp_path, end)]
        assert rest == EVERY_KIND[number + 1 :]
        assert is_boundary(tmp_path, end)
        assert not is_boundary(tmp_path, end - 1)
    assert not is_boundary(tmp_path, ends[-1] + 5)


@settings(deadline=None)
@given(
    st.integers(0, 2**40),
    st.dictionaries(st.text(max_size=5), st.floats(), max_size=4),
)
def test_any_metric_is_one_line_of_strict_json_and_comes_back(step, values):
    line = encode(Metrics(step, 1.0, values))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    json.loads(line, parse_constant=refuse)
    assert line.count(b"\n") == 1
    back = decode(line)
    assert isinstance(back, Metrics)
    assert repr(back.values) == repr(values)


def test_nan_and_infinities_are_kept(tmp_path):
    write(tmp_path, [Metrics(1, 2.0, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.0})])
    [metrics] = read_metrics(tmp_path)
    assert metrics["step"] == 1
    assert metrics["time"] == 2.0
    assert math.isnan(metrics["values"].pop("a"))
    assert metrics["values"] == {"b": math.inf, "c": -math.inf, "d": 1.0}


@pytest.mark.parametrize("torn", [b'{"type":"metr', b"x" * 10_000])
def test_a_torn_last_line_is_left_out_and_cut_off_by_the_next_writer(tmp_path, torn):
    write(tmp_path, EVERY_KIND)
    with (tmp_path / FILE_NAME).open("ab") as file:
        file.write(torn)
    assert [entry.record for entry in read_records(tmp_path)] == EVERY_KIND
    write(tmp_path, [Status("RUNNING", 5.0)])
    assert [entry.record for entry in read_records(tmp_path)] == [
        *EVERY_KIND,
        Status("RUNNING", 5.0),
    ]


def test_a_journal_that_is_only_a_torn_line_becomes_empty(tmp_path):
    (tmp_path / FILE_NAME).write_bytes(b"{" * 5000)
    Journal(tmp_path).close()
    assert (tmp_path / FILE_NAME).read_bytes() == b""


@pytest.mark.parametrize(
    "damage", [b"\0\0\0\n", b'{"type":"other"}\n', b'{"type":"tags","x":1}\n', b"[1]\n", b"7\n"]
)
def test_a_damaged_line_is_skipped_with_a_warning(tmp_path, caplog, damage):
    write(tmp_path, EVERY_KIND[:1])
    with (tmp_path / FILE_NAME).open("ab") as file:
        file.write(damage)
    write(tmp_path, EVERY_KIND[1:])
    assert [entry.record for entry in read_records(tmp_path)] == EVERY_KIND
    assert "not a journal record" in caplog.text


def test_a_line_that_was_changed_is_not_believed_and_the_others_are(tmp_path, caplog):
    write(tmp_path, EVERY_KIND)
    path = tmp_path / FILE_NAME
    path.write_bytes(path.read_bytes().replace(b'"train/loss":0.1', b'"train/loss":0.9'))
    found = [entry.record for entry in read_records(tmp_path)]
    assert found == [record for record in EVERY_KIND if not isinstance(record, Metrics)]
    assert "the line was changed after it was written" in caplog.text
    assert "bring the file back from a copy" in caplog.text


@pytest.mark.parametrize("missing", [0, 3])
def test_lines_that_are_missing_are_noticed(tmp_path, caplog, missing):
    write(tmp_path, EVERY_KIND[:4])
    write(tmp_path, EVERY_KIND[4:])
    path = tmp_path / FILE_NAME
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(list(read_records(tmp_path))) == len(EVERY_KIND)
    assert caplog.text == "", "two writers in turn make one chain"
    del lines[missing]
    path.write_bytes(b"".join(lines))
    assert len(list(read_records(tmp_path))) == len(EVERY_KIND) - 1
    assert "lines are missing before it; bring the file back from a copy" in caplog.text
    at = f"byte {len(b''.join(lines[:missing]))}: lines are missing"
    assert at in caplog.text


def test_a_journal_of_before_is_read_and_goes_on_with_checksums(tmp_path, caplog):
    (tmp_path / FILE_NAME).write_bytes(b"".join(map(encode, EVERY_KIND[:4])))
    write(tmp_path, EVERY_KIND[4:])
    entries = list(read_records(tmp_path))
    assert [entry.record for entry in entries] == EVERY_KIND
    assert [bool(entry.seal) for entry in entries] == [False] * 4 + [True] * 3
    assert list(read_records(tmp_path, entries[5].start)) == entries[5:]
    assert caplog.text == ""


def test_a_second_writer_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_LOCK_SECONDS", 0.1)
    journal = Journal(tmp_path)
    with pytest.raises(RuntimeError, match="must have one writer, but another process holds it"):
        Journal(tmp_path)
    journal.close()
    Journal(tmp_path).close()


def test_a_closed_journal_takes_no_record(tmp_path):
    journal = Journal(tmp_path)
    journal.close()
    with pytest.raises(RuntimeError, match="is closed; open it again"):
        journal.append(EVERY_KIND[0])


def test_a_full_disk_stops_nothing_and_loses_nothing(tmp_path, caplog):
    journal = Journal(tmp_path)
    journal.append(EVERY_KIND[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / FILE_NAME).stat().st_size + 10, hard))
    try:
        for record in EVERY_KIND[1:4]:
            journal.append(record)
        journal.sync()
        assert [entry.record for entry in read_records(tmp_path)] == EVERY_KIND[:1]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caplog.text.count("cannot be written") == 1
    for record in EVERY_KIND[4:]:
        journal.append(record)
    journal.close()
    assert [entry.record for entry in read_records(tmp_path)] == EVERY_KIND


def test_a_killed_process_loses_no_record(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from next.tracking.journal import Journal, Metrics\n"
        "journal = Journal(Path(sys.argv[1]))\n"
        "for step in range(500): journal.append(Metrics(step, 1.0, {'a': step}))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [metrics["step"] for metrics in read_metrics(tmp_path)] == list(range(500))


def test_ten_metrics_cost_a_step_less_than_half_a_millisecond(tmp_path):
    journal = Journal(tmp_path)
    metrics = Metrics(7, 1.0, {f"train/m{number}": number / 7 for number in range(10)})
    costs = []
    for _ in range(500):
        begin = time.perf_counter()
        journal.append(metrics)
        costs.append(time.perf_counter() - begin)
    journal.close()
    assert sorted(costs)[250] < 0.0005


def test_a_folder_without_a_journal_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_metrics(tmp_path)


def test_closing_gives_the_lock_back_although_a_forked_child_lives(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_LOCK_SECONDS", 0.1)
    journal = Journal(tmp_path)
    child = os.fork()
    if child == 0:
        time.sleep(30)
        os._exit(0)
    try:
        journal.close()
        Journal(tmp_path).close()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
