"""MLflow's pages in a real browser: the links lead there, and the axes carry our names."""

import re
import shutil

import pytest

from next.tracking.links import children_url, compare_url, run_url
from next.tracking.run import child_run_ids, open_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
]


@pytest.fixture(scope="module")
def sweep(server, tmp_path_factory):
    """Experiment id, parent id and children's ids of a sweep of six trials."""
    folder = tmp_path_factory.mktemp("sweep")
    place = {"uri": server.uri, "experiment": "pages"}
    with open_run(**place, name="sweep", folder=folder / "sweep") as parent:
        for number in range(6):
            params = {
                "captions.sampling": ["all", "subset", "split"][number % 3],
                "model.semantic.experts": number,
                "model.routing.temperature": 0.5 + number / 4,
            }
            with open_run(
                **place,
                name=f"trial-{number}",
                folder=folder / str(number),
                parent=parent.key,
                params=params,
            ) as trial:
                for step in range(5):
                    trial.log_metrics({"val/mAP": 30.0 + number * step}, step=step)
    ids = child_run_ids(server.uri, parent.experiment_id, parent.run_id)
    return parent.experiment_id, parent.run_id, ids


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    page = browser.new_page(viewport={"width": 1700, "height": 1200})
    page.set_default_timeout(60_000)
    failures = []
    page.on("pageerror", lambda error: failures.append(str(error)))
    yield page
    page.close()
    assert not failures


def test_the_comparison_shows_what_the_sweep_varied(server, sweep, page):
    experiment_id, _, children = sweep
    page.goto(compare_url(server.uri, experiment_id, children))
    page.get_by_text("Comparing 6 Runs from 1 Experiment").wait_for()
    axes = page.locator("svg .axis-title, svg .axis-heading text, svg g.axis-heading")
    axes.first.wait_for()
    drawn = " ".join(axes.all_text_contents())
    for name in ("captions.sampling", "model.semantic.experts", "val/mAP"):
        assert name in drawn


def test_the_charts_show_the_children_with_the_best_first(server, sweep, page):
    experiment_id, parent_id, _ = sweep
    page.goto(children_url(server.uri, experiment_id, parent_id, "val/mAP"))
    page.get_by_text("6 matching runs").wait_for()
    page.get_by_text("val/mAP").first.wait_for()
    names = page.get_by_role("link", name=re.compile(r"^trial-\d$"))
    names.nth(5).wait_for()
    assert names.all_text_contents() == [f"trial-{number}" for number in reversed(range(6))]


def test_a_run_page_names_its_children(server, sweep, page):
    experiment_id, parent_id, _ = sweep
    page.goto(run_url(server.uri, experiment_id, parent_id))
    page.get_by_text("Child runs", exact=True).wait_for()
    page.get_by_role("link", name="trial-5").wait_for()
