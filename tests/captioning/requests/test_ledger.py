import json
import os
import subprocess
import sys
import threading
import time

import pytest

from next.captioning.requests.ledger import Ledger, LedgerPart, LedgerTail, Row, row_key
from next.lease import LostLeaseError


def row(image="a", status="answered", **fields):
    return Row(
        image=image, prompt="p", model="m", settings={"seed": 1}, status=status,
        answer="{}", reason="", tokens_in=9, tokens_out=3, money=0.5, requests=1,
    )._replace(**fields)  # fmt: skip


def write(folder, *rows):
    part = LedgerPart(folder)
    for one in rows:
        part.append(one)
    part.close()
    return part.path


def test_a_row_is_found_by_what_decides_an_answer(tmp_path):
    write(tmp_path, row("a"), row("b", answer="ü\n"))
    with Ledger(tmp_path) as ledger:
        assert len(ledger) == 2
        assert ledger.get(row("b").key) == row("b", answer="ü\n")
        for other in (row("c"), row(prompt="q"), row(model="n"), row(settings={"seed": 2})):
            assert ledger.get(other.key) is None
            assert other.key not in ledger


def test_the_latest_row_of_a_key_counts(tmp_path):
    write(tmp_path, row("a", "failed"))
    write(tmp_path, row("a", "answered"))
    with Ledger(tmp_path) as ledger:
        assert ledger.get(row("a").key).status == "answered"
        assert [one.status for one in ledger.rows()] == ["answered"]
        assert ledger.finished(lambda status: status == "failed") == set()
        assert ledger.finished(lambda status: status == "answered") == {row("a").key}


def test_a_row_that_was_cut_is_passed_over_and_what_comes_after_stands(tmp_path):
    path = write(tmp_path, row("a"), row("b"))
    path.write_bytes(path.read_bytes()[:-20])
    write(tmp_path, row("c"))
    with Ledger(tmp_path) as ledger:
        assert len(ledger) == 2
        assert row("b").key not in ledger


def test_a_damaged_row_is_an_error_that_names_its_place(tmp_path):
    path = write(tmp_path, row("a"))
    size = path.stat().st_size
    with open(path, "ab") as file:
        file.write(b"{}\n")
    with pytest.raises(ValueError, match=rf"row at byte {size} is damaged"):
        Ledger(tmp_path)


def test_a_row_of_which_a_digit_was_changed_is_not_believed(tmp_path):
    path = write(tmp_path, row("a", answer='{"colour": 0.91}'))
    path.write_text(path.read_text().replace("0.91", "0.19"))
    with pytest.raises(
        ValueError, match=r"row at byte 0 is damaged \(it is not what was written .*\); rem"
    ):
        Ledger(tmp_path)


def test_a_row_of_an_older_version_has_no_checksum_and_is_read(tmp_path):
    (tmp_path / "old.jsonl").write_text(json.dumps(row("a")._asdict()) + "\n")
    with Ledger(tmp_path) as ledger:
        assert ledger.get(row("a").key) == row("a")


def test_rows_that_are_written_meanwhile_are_taken_up(tmp_path):
    with Ledger(tmp_path) as ledger:
        write(tmp_path, row("a"))
        assert row("a").key not in ledger
        ledger.refresh()
        assert row("a").key in ledger


def test_a_part_without_rows_leaves_no_file(tmp_path):
    assert not write(tmp_path).exists()


def test_two_runs_do_not_share_a_ledger(tmp_path):
    with Ledger(tmp_path):
        script = f"from next.captioning.requests.ledger import Ledger; Ledger({str(tmp_path)!r})"
        result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    held = f"the ledger of captions in {tmp_path} is being written by"
    assert held in result.stderr
    assert f"(process {os.getpid()})" in result.stderr
    with Ledger(tmp_path):
        pass


def test_a_run_waits_for_a_writer_that_outlived_its_run(tmp_path):
    part = LedgerPart(tmp_path)
    part.append(row("a"))
    with pytest.raises(FileExistsError, match="still writes to this ledger"):
        Ledger(tmp_path, wait_s=0.2)
    closer = threading.Timer(0.3, part.close)
    closer.start()
    began = time.monotonic()
    with Ledger(tmp_path, wait_s=10) as ledger:
        assert row("a").key in ledger
    assert time.monotonic() - began > 0.2
    closer.join()


def test_a_part_that_is_begun_while_a_run_waits_is_taken_up(tmp_path):
    first, second = LedgerPart(tmp_path), []

    def close() -> None:
        second.append(LedgerPart(tmp_path))
        second[0].append(row("b"))
        first.close()
        time.sleep(0.3)
        second[0].close()

    first.append(row("a"))
    closer = threading.Timer(0.3, close)
    closer.start()
    with Ledger(tmp_path, wait_s=10) as ledger:
        assert row("b").key in ledger
    closer.join()


def test_a_worker_begins_no_part_once_another_run_has_the_ledger(tmp_path):
    with Ledger(tmp_path) as ledger:
        LedgerPart(tmp_path, ledger.key).close()
    with Ledger(tmp_path), pytest.raises(LostLeaseError, match="another run goes on with"):
        LedgerPart(tmp_path, ledger.key)
    assert not list(tmp_path.glob("*.jsonl"))


def test_a_row_is_on_file_when_append_returns(tmp_path):
    script = f"""
import os, signal
from next.captioning.requests.ledger import LedgerPart, Row
from next.lease import LostLeaseError
part = LedgerPart({str(tmp_path)!r})
for image in "ab":
    part.append(Row(**({row()._asdict()!r} | {{"image": image}})))
os.kill(os.getpid(), signal.SIGKILL)
"""
    result = subprocess.run([sys.executable, "-c", script])
    assert result.returncode == -9
    with Ledger(tmp_path) as ledger:
        assert len(ledger) == 2


def test_a_tail_gives_what_others_write_once(tmp_path):
    old = write(tmp_path, row("old"))
    tail = LedgerTail(tmp_path, [old])
    assert list(tail.keys()) == []
    part = LedgerPart(tmp_path)
    part.append(row("a"))
    part.append(row("b", "failed"))
    assert list(tail.keys()) == [row("a").key]
    part.append(row("c"))
    assert list(tail.keys()) == [row("c").key]
    part.close()


def test_keys_do_not_depend_on_the_order_of_settings():
    assert row_key("i", "p", "m", {"a": 1, "b": 2}) == row_key("i", "p", "m", {"b": 2, "a": 1})
    assert len(row_key("i", "p", "m", {})) == 16


def test_parts_of_one_process_have_different_names(tmp_path):
    parts = [LedgerPart(tmp_path) for _ in range(20)]
    assert len({part.path for part in parts}) == 20
    for part in parts:
        part.close()
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".jsonl")]
