import time

from next.tracking.run import open_run, read_metrics


def test_system_metrics_come_by_themselves_under_mlflows_names(tmp_path):
    with open_run(
        uri=None, experiment="e", name="r", folder=tmp_path / "run", system_seconds=0.1
    ) as run:
        deadline = time.monotonic() + 20
        while len(read_metrics(run.folder)) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
    lines = read_metrics(run.folder)
    assert len(lines) >= 3
    assert {
        "system/cpu_utilization_percentage",
        "system/system_memory_usage_megabytes",
        "system/system_memory_usage_percentage",
        "system/process_cpu_percentage",
        "system/process_memory_megabytes",
    } <= set(lines[0]["values"])
    assert 0 < lines[-1]["values"]["system/system_memory_usage_percentage"] <= 100
    assert 10 < lines[-1]["values"]["system/process_memory_megabytes"] < 100_000
    steps = [line["step"] for line in lines]
    assert steps == sorted(steps)
    assert 0 <= steps[0] <= 21
    before = len(lines)
    time.sleep(0.3)
    assert len(read_metrics(run.folder)) == before, "a closed run takes no samples"


def test_a_run_that_goes_on_counts_seconds_from_its_first_beginning(tmp_path):
    place = {"uri": None, "experiment": "e", "name": "r", "folder": tmp_path / "run"}
    open_run(**place).close()
    time.sleep(1.1)
    with open_run(**place, system_seconds=0.1) as run:
        deadline = time.monotonic() + 20
        while not read_metrics(run.folder) and time.monotonic() < deadline:
            time.sleep(0.05)
    assert read_metrics(run.folder)[0]["step"] >= 1


def test_without_a_period_no_sample_is_taken(tmp_path):
    with open_run(uri=None, experiment="e", name="r", folder=tmp_path / "run"):
        time.sleep(0.2)
    assert read_metrics(tmp_path / "run") == []
