import hashlib
import itertools
import json
from collections import Counter

import pytest

from next.captioning.requests.engine import LOST_CALLS, READ_AHEAD, Questions, Totals, run_here
from next.captioning.requests.ledger import Ledger
from next.captioning.requests.models import ModelConfig
from next.captioning.requests.spending import Budget, BudgetConfig
from next.captioning.schema.prompt import prompt_for
from next.captioning.source import Picture
from tests.captioning.scripted_endpoint import PERSONAS, TROUBLES, Script, scripted


@pytest.fixture(scope="module")
def pictures(demo_source):
    return list(itertools.islice(demo_source.pictures(), 120))


@pytest.fixture
def ask(person, tmp_path):
    """Asks about pictures; returns totals, what was reported, and how many are left."""

    def run(
        url,
        pictures,
        names=("scripted-large",),
        *,
        budget=None,
        on_report=lambda asked: None,
        **settings,
    ):
        models = [
            ModelConfig(name=name, base_url=url, **({"backoff_s": 0.01} | settings))
            for name in names
        ]
        prompts = {m: prompt_for(person, s) for m, s in person.modalities.items()}
        reported, totals = [], Totals()

        def report(asked):
            on_report(asked)
            reported.append(asked)
            totals.add(asked, len(models))

        with Ledger(tmp_path / "ledger") as ledger:
            finished = ledger.finished(lambda status: status != "failed")
            questions = Questions(prompts, models, finished)
            left = Budget(budget) if budget is not None else None
            totals.left = run_here(pictures, questions, ledger.folder, left, report)
        return totals, reported

    return run


def test_every_model_is_asked_once_about_every_image(demo_raw, pictures, ask):
    with scripted(demo_raw) as server:
        totals, reported = ask(server.url, pictures, PERSONAS, concurrency=5)
        again, _ = ask(server.url, pictures, PERSONAS, concurrency=5)
        answers = server.stats.answers
    assert len(answers) == 3 * 120
    assert set(answers.values()) == {1}
    assert totals.statuses == {"answered": 360}
    assert totals.spent.tokens == 360 * 1200
    assert Counter((one.split, one.sample, one.modality) for one in reported) == Counter(
        (one.split, one.sample, one.modality) for one in pictures
    )
    assert (again.images, again.known, again.calls) == (120, 360, 0)


def test_a_second_run_sends_nothing_at_all(demo_raw, pictures, ask):
    with scripted(demo_raw) as server:
        ask(server.url, pictures[:10])
        before = server.stats.requests
        ask(server.url, pictures[:10])
        assert server.stats.requests == before


def test_all_troubles_together_lose_no_image(demo_raw, pictures, ask):
    trouble = {kind: 0.04 for kind in TROUBLES if kind != "slow"}
    with scripted(demo_raw, Script(trouble=trouble)) as server:
        totals, reported = ask(server.url, pictures, PERSONAS)
        assert len(server.stats.troubles) == len(trouble)
    assert len(reported) == 120
    assert totals.calls == sum(totals.statuses.values()) == 360
    assert totals.statuses["answered"] > 340
    assert "failed" not in totals.statuses


def test_concurrency_is_used_and_kept(demo_raw, pictures, ask):
    with scripted(demo_raw, Script(latency=0.05)) as server:
        ask(server.url, pictures, concurrency=16)
        assert 12 <= server.stats.most_at_a_time <= 16


def test_images_are_read_as_calls_come_free(demo_raw, pictures, ask):
    read = done = most = 0

    def reading():
        nonlocal read, most
        for number, picture in enumerate(pictures * 3):
            read += 1
            most = max(most, read - done)
            yield picture if number < 120 else picture._replace(image=b"%d" % number)

    def finished(_):
        nonlocal done
        done += 1

    with scripted(demo_raw) as server:
        totals, _ = ask(server.url, reading(), on_report=finished, concurrency=4)
    assert totals.images == read == 360
    # A chunk is read while another is put into the queue, which holds two a call, beside the calls.
    assert most <= 2 * READ_AHEAD + 3 * 4


def test_one_file_under_two_names_is_asked_about_once(demo_raw, pictures, ask):
    twice = [pictures[0], pictures[0]._replace(sample="copy"), pictures[1]]
    with scripted(demo_raw, Script(latency=0.05)) as server:
        totals, reported = ask(server.url, twice)
        assert set(server.stats.answers.values()) == {1}
    assert totals.calls == 2
    assert {one.sample for one in reported} == {pictures[0].sample, "copy", pictures[1].sample}


def test_a_refused_image_is_recorded_counted_and_not_asked_about_again(demo_raw, pictures, ask):
    refused = hashlib.sha256(pictures[0].image).hexdigest()
    with scripted(demo_raw, Script(refused=frozenset([refused]))) as server:
        totals, _ = ask(server.url, pictures[:5])
        again, _ = ask(server.url, pictures[:5])
    assert totals.statuses == {"refused": 1, "answered": 4}
    assert again.calls == 0


def test_an_undecodable_image_is_refused_by_the_endpoint_and_stops_nobody(demo_raw, pictures, ask):
    broken = Picture("train", "broken", "RGB", b"no image at all")
    refused = hashlib.sha256(broken.image).hexdigest()
    with scripted(demo_raw, Script(refused=frozenset([refused]))) as server:
        totals, _ = ask(server.url, [*pictures[:3], broken])
    assert totals.statuses == {"refused": 1, "answered": 3}


def test_failed_calls_are_asked_again_by_the_next_run(demo_raw, pictures, ask):
    with scripted(demo_raw, Script(always="500")) as server:
        totals, _ = ask(server.url, pictures[:5], retries=0)
        assert totals.statuses == {"failed": 5}
        server.script.always = None
        again, _ = ask(server.url, pictures[:5])
    assert again.statuses == {"answered": 5}


def test_a_run_is_given_up_when_the_endpoint_goes_away(demo_raw, pictures, ask):
    with scripted(demo_raw, Script(always="cut_before")) as server:
        with pytest.raises(ConnectionError, match=f"last {LOST_CALLS} calls .* run again"):
            ask(server.url, pictures, retries=0)
        server.script.always = None
        totals, _ = ask(server.url, pictures)
    assert totals.calls == 120


MOST = 900 + 1500
"""Tokens that a request may take: a prompt as seen, an answer as long as may be."""


@pytest.mark.parametrize(
    "budget", [{"tokens": 19 * 1200 + MOST}, {"money": (19 * 1200 + MOST) * 1e-6}]
)
def test_a_budget_ends_a_run_cleanly_and_is_not_overspent(demo_raw, pictures, ask, budget):
    prices = {"price_in": 1.0, "price_out": 1.0}
    with scripted(demo_raw, Script(latency=0.01)) as server:
        totals, reported = ask(server.url, pictures, budget=BudgetConfig(**budget), **prices)
        assert sum(server.stats.answers.values()) == 20
        rest, _ = ask(server.url, pictures, **prices)
        assert set(server.stats.answers.values()) == {1}
    assert totals.calls == 20
    assert totals.left == 100
    assert totals.spent.tokens == 20 * 1200
    assert len(reported) == 120
    assert rest.calls == 100


def test_what_is_read_ahead_is_bounded(demo_raw, pictures, ask):
    """While the first answers are outstanding, no more than the queues hold has been read."""
    read = []

    def reading():
        for picture in pictures:
            read.append(picture)
            yield picture

    with scripted(demo_raw, Script(latency=30)) as server, pytest.raises(ConnectionError):
        ask(server.url, reading(), concurrency=1, retries=0, timeout_s=0.02, backoff_s=0.001)
    # LOST_CALLS were taken; the queue holds two a call, and one chunk is read beside it.
    assert len(read) <= LOST_CALLS + 1 + 2 + 2 * READ_AHEAD


@pytest.mark.parametrize("trouble", ["wrong_schema", "copied_prompt"])
def test_asking_again_is_held_to_the_budget_too(demo_raw, pictures, ask, trouble):
    budget = BudgetConfig(tokens=19 * 1200 + MOST)
    with scripted(demo_raw, Script(always=trouble, latency=0.01)) as server:
        totals, _ = ask(server.url, pictures, budget=budget)
        sent = sum(server.stats.answers.values())
    assert sent == 20
    assert totals.spent.tokens == sent * 1200 <= budget.tokens
    assert totals.left > 100


@pytest.mark.parametrize("trouble", ["slow", "cut_before", "cut_within"])
def test_requests_that_brought_nothing_are_held_to_the_budget_too(demo_raw, pictures, ask, trouble):
    """Each may have been answered after all, and be billed."""
    budget = BudgetConfig(tokens=10 * (1500 + 1500))
    with scripted(demo_raw, Script(always=trouble, slow=3)) as server:
        totals, _ = ask(
            server.url, pictures[:40], budget=budget, timeout_s=0.5, retries=2, concurrency=4
        )
        assert server.stats.troubles[trouble] <= 10
    assert totals.spent.tokens <= budget.tokens
    assert totals.statuses.keys() == {"failed"}


def test_until_a_prompt_has_told_what_it_takes_no_other_is_sent(demo_raw, pictures, ask):
    """A guess that is far too low is paid for once, and not by every call under way."""
    budget = BudgetConfig(tokens=19_000)
    script = Script(latency=0.05, prompt_tokens=9000)
    with scripted(demo_raw, script) as server:
        totals, _ = ask(server.url, pictures, budget=budget, concurrency=16)
    assert totals.spent.tokens == 9300
    assert totals.calls == 1


def test_rows_of_before_are_read_as_having_lost_nothing(demo_raw, pictures, ask, tmp_path):
    with scripted(demo_raw) as server:
        ask(server.url, pictures[:2])
    (part,) = (tmp_path / "ledger").glob("*.jsonl")
    rows = [json.loads(line) for line in part.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        del row["lost_tokens"], row["lost_money"], row["sha256"]
    part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with Ledger(tmp_path / "ledger", look=True) as ledger:
        assert [row.lost_tokens for row in ledger.rows()] == [0, 0]
