from next import demo


def test_a_benchmark_draws_its_data_only_where_none_are_named(monkeypatch):
    drawn = []
    monkeypatch.setattr(
        demo, "demo_shards", lambda folder, variant: drawn.append(variant) or folder
    )
    for argv in (["--data", "x"], ["--data=x"], ["--help"]):
        assert demo.with_demo_data(argv) == argv
    assert drawn == []
    assert demo.with_demo_data(["--seeds", "1"]) == ["--seeds", "1", "--data", "demo"]
    assert demo.with_demo_data(["--benchmark", "large"])[-2:] == ["--data", "demo"]
    assert drawn == ["demo", "large"]
