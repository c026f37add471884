"""MLflow's pages in a real browser: the links lead there, and the axes carry our names."""

import json
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote, urlencode

import numpy as np
import pytest

from next.pictures.charts import cmc_curve
from next.tracking.run import open_run
from next.tracking.views.comparison import SWEEP, experiment_tags, sweep_view
from next.tracking.views.links import run_url, view_url
from tests.tracking.conftest import child_run_ids

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
]


TRIALS = 100
NAMES = ["model.semantic.experts", "model.routing.temperature", "captions.sampling"]


@pytest.fixture(scope="module")
def sweep(server, tmp_path_factory):
    """The parent of a hundred trials; the ten best have pictures."""
    folder = tmp_path_factory.mktemp("sweep")
    place = {"uri": server.uri, "experiment": "pages"}
    with open_run(**place, name="sweep", folder=folder / "sweep") as parent:
        parent.describe_experiment(
            experiment_tags("# How to read these runs", "val/mAP")
            | sweep_view(
                "the sweep",
                parent.key,
                time.time(),
                objectives={"val/mAP": "max"},
                parameters=NAMES,
                axes=NAMES,
                numeric=NAMES[:2],
                images=["figures/cmc"],
            )
        )
        for number in range(TRIALS - 10, TRIALS):
            cmc = np.linspace(number / 2, 100, 20)
            cmc_curve(folder / f"{number}.png", {"this run": cmc})

        def run_trial(number: int) -> None:
            drawn = [1 + number % 8, 0.5 + number / 40, ["all", "subset", "split"][number % 3]]
            with open_run(
                **place,
                name=f"trial-{number}",
                folder=folder / str(number),
                parent=parent.key,
                params=dict(zip(NAMES, drawn, strict=True)),
                tags={SWEEP: parent.key},
            ) as trial:
                for step in range(5):
                    trial.log_metrics({"val/mAP": 30.0 + number * step / 10}, step=step)
                    trial.log_metrics({"train/loss": 1.0 / (step + 1)}, step=step)
                if number >= TRIALS - 10:
                    trial.log_image(folder / f"{number}.png", "figures/cmc", step=0)

        with ThreadPoolExecutor(8) as threads:
            list(threads.map(run_trial, range(TRIALS)))
    return parent


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


def test_the_view_shows_the_trials_with_our_names_on_the_axes_and_their_pictures(
    server, sweep, page
):
    page.goto(view_url(server.uri, sweep.experiment_id, sweep.key))
    page.get_by_text(f"{TRIALS} matching runs").wait_for()
    page.get_by_text("How to read these runs").wait_for()
    axes = page.locator("svg .axis-title, svg .axis-heading text, svg g.axis-heading, svg .label")
    axes.first.wait_for()
    drawn = " ".join(text.text_content() or "" for text in page.locator("svg text").all())
    assert "val/mAP" in drawn
    contour = page.locator(".js-plotly-plot .g-xtitle, .js-plotly-plot .g-ytitle")
    contour.nth(1).wait_for()
    titles = contour.all_text_contents()
    assert NAMES[0] in titles
    assert NAMES[1] in titles
    best = page.get_by_role("link", name=re.compile(r"^trial-\d+$")).first
    assert best.text_content() == f"trial-{TRIALS - 1}"

    image = page.locator("img[src^='blob:'], img[src*='get-artifact'], img[src*='artifacts']")
    page.mouse.move(1200, 900)  # over the charts, of which those in sight are drawn
    page.mouse.wheel(0, 700)
    page.get_by_text("figures/cmc").first.scroll_into_view_if_needed()
    image.nth(9).wait_for()
    widths = image.evaluate_all(
        "all => Promise.all(all.map(one => one.decode().then(() => one.naturalWidth)))"
    )
    assert len(widths) == 10
    assert all(width > 300 for width in widths)


def test_the_table_of_the_view_has_what_was_varied_as_its_columns(server, sweep, page):
    address = view_url(server.uri, sweep.experiment_id, sweep.key)
    page.goto(address.replace("compareRunsMode=CHART", "compareRunsMode=TABLE"))
    page.get_by_text(f"{TRIALS} matching runs").wait_for()
    header = page.locator(".ag-header-cell-text, .ag-header-cell")
    header.filter(has_text="val/mAP").first.wait_for()
    named = " ".join(header.all_text_contents())
    assert all(name in named for name in NAMES)


def test_the_comparison_of_all_trials_shows_what_the_sweep_varied(server, sweep, page):
    children = child_run_ids(server.uri, sweep.experiment_id, sweep.run_id)
    assert len(children) == TRIALS
    chosen = {"runs": json.dumps(children), "experiments": json.dumps([sweep.experiment_id])}
    words = urlencode(chosen | {"workflowType": "machine_learning"}, quote_via=quote)
    page.goto(f"{server.uri}/#/compare-runs?{words}")
    page.get_by_text(f"Comparing {TRIALS} Runs from 1 Experiment").wait_for()
    axes = page.locator("svg .axis-title, svg .axis-heading text, svg g.axis-heading")
    axes.first.wait_for()
    for name in (*NAMES, "val/mAP"):
        axes.filter(has_text=name).first.wait_for()  # they come one after the other


def test_a_run_page_names_its_children(server, sweep, page):
    page.goto(run_url(server.uri, sweep.experiment_id, sweep.run_id))
    page.get_by_text("Child runs", exact=True).wait_for()
    page.get_by_role("link", name=re.compile(r"^trial-\d+$")).first.wait_for()
