from next.tracking.views.links import run_url


def test_pages_lie_behind_the_address():
    for uri in ("http://h:1", "http://h:1/"):
        assert run_url(uri, "7", "ab").startswith("http://h:1/#/experiments/7/runs/ab?")
