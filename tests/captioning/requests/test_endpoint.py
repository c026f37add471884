import asyncio
import hashlib
import itertools
import json
import logging
import socket
import time

import pytest

from next.captioning.requests.endpoint import LARGEST_REPLY, Endpoint, data_url
from next.captioning.requests.models import ModelConfig
from next.captioning.schema.parsing import parse_answer
from next.captioning.schema.prompt import prompt_for
from tests.captioning.scripted_endpoint import ERRORS, PERSONAS, Persona, Script, scripted

LARGE = "scripted-large"


@pytest.fixture(scope="module")
def pictures(demo_source):
    return list(itertools.islice(demo_source.pictures(), 12))


def model(url, **settings):
    defaults = {"name": LARGE, "backoff_s": 0.01, "timeout_s": 5.0}
    return ModelConfig(base_url=url, **(defaults | settings))


def ask(config, schema, pictures, *, probe=False):
    """What becomes of a question about each picture."""

    async def run():
        async with Endpoint(config) as endpoint:
            if probe:
                await endpoint.probe()
            prompts = [prompt_for(schema, schema.spectrum(one.modality)) for one in pictures]
            calls = [
                endpoint.ask(picture.image, prompt)
                for picture, prompt in zip(pictures, prompts, strict=True)
            ]
            return await asyncio.gather(*calls)

    return asyncio.run(run())


def probe(config):
    async def run():
        async with Endpoint(config) as endpoint:
            await endpoint.probe()
            return endpoint.structured

    return asyncio.run(run())


def test_a_proxy_of_the_environment_is_not_asked_for_what_is_on_this_machine(
    demo_raw, person, pictures, monkeypatch
):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "elsewhere.invalid")
    with scripted(demo_raw) as server:
        outcomes = ask(model(server.url), person, pictures[:1], probe=True)
    assert {one.status for one in outcomes} == {"answered"}


def test_answers_come_with_their_tokens(demo_raw, person, pictures):
    with scripted(demo_raw) as server:
        outcomes = ask(model(server.url), person, pictures, probe=True)
    assert {one.status for one in outcomes} == {"answered"}
    assert {(one.tokens_in, one.tokens_out, one.requests) for one in outcomes} == {(900, 300, 1)}
    parsed = parse_answer(outcomes[0].answer, prompt_for(person, "visible").attributes)
    assert len(parsed.readings) == 16
    assert parsed.problems == ()


@pytest.mark.parametrize("trouble", ["429", "500", "cut_before", "cut_within", "not_a_completion"])
def test_a_lost_call_is_sent_again(demo_raw, person, pictures, trouble):
    with scripted(demo_raw, Script(trouble={trouble: 0.5})) as server:
        outcomes = ask(model(server.url, retries=12), person, pictures)
        assert server.stats.troubles[trouble] > 0
    assert {one.status for one in outcomes} == {"answered"}
    assert sum(one.requests for one in outcomes) == 12 + server.stats.troubles[trouble]
    assert {one.tokens_in for one in outcomes} == {900}


def test_a_call_that_takes_too_long_is_sent_again(demo_raw, person, pictures):
    with scripted(demo_raw, Script(trouble={"slow": 0.4})) as server:
        outcomes = ask(model(server.url, timeout_s=0.5), person, pictures)
        assert server.stats.troubles["slow"] > 0
    assert {one.status for one in outcomes} == {"answered"}


def test_a_call_that_never_succeeds_has_failed_and_cost_nothing(demo_raw, person, pictures):
    with scripted(demo_raw, Script(always="500")) as server:
        (outcome,) = ask(model(server.url, retries=2), person, pictures[:1])
    assert outcome.status == "failed"
    assert outcome.requests == 3
    assert outcome.tokens_in == 0
    assert "The server had an error" in outcome.reason


@pytest.mark.parametrize("trouble", ["broken_json", "wrong_schema", "copied_prompt"])
def test_an_answer_that_cannot_be_read_is_asked_for_once_more(demo_raw, person, pictures, trouble):
    with scripted(demo_raw, Script(always=trouble)) as server:
        (outcome,) = ask(model(server.url), person, pictures[:1])
    assert outcome.status == "garbled"
    assert outcome.requests == 2
    assert (outcome.tokens_in, outcome.tokens_out) == (1800, 600)


def test_an_answer_in_a_fence_is_read(demo_raw, person, pictures):
    with scripted(demo_raw, Script(always="fenced")) as server:
        outcomes = ask(model(server.url), person, pictures)
    assert {(one.status, one.requests) for one in outcomes} == {("answered", 1)}


def test_an_image_that_is_refused_is_not_sent_again(demo_raw, person, pictures):
    refused, declined = (hashlib.sha256(one.image).hexdigest() for one in pictures[:2])
    script = Script(refused=frozenset([refused]), declined=frozenset([declined]))
    with scripted(demo_raw, script) as server:
        outcomes = ask(model(server.url), person, pictures[:3])
    assert [one.status for one in outcomes] == ["refused", "refused", "answered"]
    assert [one.requests for one in outcomes] == [1, 1, 1]
    assert "content policy" in outcomes[0].reason
    assert "can't help" in outcomes[1].reason


def test_a_403_about_the_image_is_a_refusal(demo_raw, person, pictures):
    with scripted(demo_raw, Script(always="403")) as server:
        (outcome,) = ask(model(server.url), person, pictures[:1])
    assert (outcome.status, outcome.requests) == ("refused", 1)


@pytest.mark.parametrize(
    ("trouble", "error", "message"),
    [("402", PermissionError, "quota is used up"), ("404", ValueError, "can no longer be asked")],
)
def test_what_no_retry_can_mend_ends_the_run(demo_raw, person, pictures, trouble, error, message):
    with (
        scripted(demo_raw, Script(always=trouble)) as server,
        pytest.raises(error, match=message),
    ):
        ask(model(server.url), person, pictures[:1])


@pytest.mark.parametrize("kind", ["sk-", ""])
def test_the_key_comes_from_the_environment_and_is_written_nowhere(
    demo_raw, person, pictures, monkeypatch, caplog, kind
):
    monkeypatch.setenv("CAPTION_KEY", f"{kind}secret-123")
    caplog.set_level(logging.DEBUG)
    with scripted(demo_raw, Script(key=f"{kind}secret-123")) as server:
        config = model(server.url, api_key_env="CAPTION_KEY")
        assert {one.status for one in ask(config, person, pictures)} == {"answered"}
        assert server.stats.keys == {f"{kind}secret-123"}
        monkeypatch.setenv("CAPTION_KEY", f"{kind}wrong-456")
        with pytest.raises(PermissionError, match="key in CAPTION_KEY was not accepted") as error:
            ask(config, person, pictures)
    written = caplog.text + str(error.value) + repr(config) + str(config.settings())
    assert "secret-123" not in written
    assert "wrong-456" not in written


@pytest.mark.parametrize("other", ["sk-other-123", "Bearer other-123"])
def test_what_looks_like_a_key_of_somebody_else_is_not_repeated_either(
    demo_raw, person, pictures, monkeypatch, other
):
    """A proxy's own key, in what it says of its trouble upstream."""
    monkeypatch.setitem(ERRORS, "500", f"upstream refused {other}")
    with scripted(demo_raw, Script(always="500")) as server:
        [outcome] = ask(model(server.url, retries=0), person, pictures[:1])
    assert "upstream refused" in outcome.reason
    assert "other-123" not in outcome.reason


def test_a_missing_key_is_an_error_before_anything_is_sent(monkeypatch):
    monkeypatch.delenv("CAPTION_KEY", raising=False)
    with pytest.raises(ValueError, match="environment variable CAPTION_KEY must hold the key"):
        Endpoint(model("http://127.0.0.1:1/v1", api_key_env="CAPTION_KEY"))


def test_an_endpoint_that_is_down_is_an_error_at_the_start():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(ConnectionError, match=r"cannot be reached .*; start it, or mend base_url"):
        probe(model(url))


def test_a_model_without_image_input_is_an_error_at_the_start():
    message = r"answers questions but takes no image .*choose a model with image input"
    with (
        scripted(None, Script(personas={LARGE: Persona(images=False)})) as server,
        pytest.raises(ValueError, match=message),
    ):
        probe(model(server.url))


def test_a_model_that_is_not_there_is_an_error_at_the_start():
    message = r"no model 'scripted-larg' .*it serves scripted-large"
    with scripted(None) as server, pytest.raises(ValueError, match=message):
        probe(model(server.url, name="scripted-larg"))


def test_a_model_that_does_not_look_at_images_is_warned_of(caplog):
    with scripted(None, Script(personas={LARGE: Persona(sees=False)})) as server:
        probe(model(server.url))
    assert "calls a red picture 'green'" in caplog.text


def test_the_strictest_form_that_the_endpoint_takes_is_demanded(demo_raw, person, pictures):
    personas = {LARGE: Persona(structured=False), "scripted-small": PERSONAS["scripted-small"]}
    with scripted(demo_raw, Script(personas=personas)) as server:
        assert probe(model(server.url, name="scripted-small")) == "json_schema"
        assert probe(model(server.url)) == "json_object"
        assert probe(model(server.url, structured="none")) == "none"
        outcomes = ask(model(server.url), person, pictures, probe=True)
    assert {one.status for one in outcomes} == {"answered"}


@pytest.mark.parametrize(
    "limit", [{"requests_per_minute": 1200}, {"tokens_per_minute": 1200 * 1200}]
)
def test_calls_are_spaced_to_the_limits(demo_raw, person, pictures, limit):
    with scripted(demo_raw) as server:
        config = model(server.url, expected_tokens_in=900, expected_tokens_out=300, **limit)
        began = time.monotonic()
        ask(config, person, pictures)
    assert time.monotonic() - began > 11 * 0.05


def test_all_calls_wait_when_one_is_told_to(demo_raw, person, pictures):
    with scripted(demo_raw, Script(trouble={"429": 0.3}, retry_after="0.4")) as server:
        began = time.monotonic()
        outcomes = ask(model(server.url, retries=12), person, pictures)
        assert server.stats.troubles["429"] > 0
    assert time.monotonic() - began > 0.4
    assert {one.status for one in outcomes} == {"answered"}


def test_an_image_is_sent_as_what_it_is():
    assert data_url(b"\xff\xd8\xff").startswith("data:image/jpeg;base64,")
    assert data_url(b"\x89PNG\r\n").startswith("data:image/png;base64,")
    assert data_url(b"RIFF\0\0\0\0WEBPVP8").startswith("data:image/webp;base64,")


def completion(message, finish="stop", **fields):
    """The bytes of a chat completion with one choice."""
    choice = {"index": 0, "finish_reason": finish, "message": message}
    return json.dumps({"choices": [choice]} | fields).encode()


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (b'{"choices": ["x"]}', "no message in the completion"),
        (b'{"choices": "x"}', "no message in the completion"),
        (b'{"choices": {"a": 1}}', "no message in the completion"),
        (b'{"choices": [null]}', "no message in the completion"),
        (b'{"choices": [{"message": "x"}]}', "no message in the completion"),
        (b'{"choices": [[1, 2]], "usage": 7}', "no message in the completion"),
        (completion({"content": None}), "no text; no JSON object"),
        (completion({"content": {"a": 1}}), "no text; no JSON object"),
        (completion({"content": [1, "x", {"text": None}]}), "no JSON object"),
        (completion({"content": None, "reasoning_content": "Hmm."}, "length"), "cut at its long"),
        (completion({"content": '{"gender": {"val'}, "length"), "cut at its longest"),
    ],
)
def test_a_malformed_completion_is_an_outcome_and_paid_once(
    demo_raw, person, pictures, reply, reason
):
    with scripted(demo_raw, Script(reply=reply)) as server:
        (outcome,) = ask(model(server.url), person, pictures[:1])
    assert (outcome.status, outcome.requests) == ("garbled", 1)
    assert reason in outcome.reason
    assert outcome.tokens_in == 1500  # as expected, since nobody told


def whole(person, picture):
    prompt = prompt_for(person, person.spectrum(picture.modality))
    return json.dumps(
        {one.name: {"value": one.values[0], "confidence": 1} for one in prompt.attributes}
    )


def test_an_answer_among_the_thoughts_counts(demo_raw, person, pictures):
    message = {"content": None, "reasoning_content": f"So it is {whole(person, pictures[0])}"}
    with scripted(demo_raw, Script(reply=completion(message))) as server:
        (outcome,) = ask(model(server.url), person, pictures[:1])
    assert (outcome.status, outcome.requests) == ("answered", 1)


@pytest.mark.parametrize(
    "usage",
    [[1], "many", 7, None, {"prompt_tokens": "x"}, {"prompt_tokens": True}, {"prompt_tokens": -1},
     {"prompt_tokens": 1e9, "completion_tokens": 10**12}],
)  # fmt: skip
def test_tokens_that_are_none_count_as_expected(demo_raw, person, pictures, usage):
    reply = completion({"content": whole(person, pictures[0])}, usage=usage)
    with scripted(demo_raw, Script(reply=reply)) as server:
        (outcome,) = ask(model(server.url, tokens_per_minute=1e9), person, pictures[:1])
    assert (outcome.status, outcome.requests) == ("answered", 1)
    assert (outcome.tokens_in, outcome.tokens_out) == (1500, 600)


@pytest.mark.parametrize("reply", [b"[" * 100_000, b"\xff\xfe{", b"not JSON", b'{"choices": []}'])
def test_what_is_no_completion_is_asked_for_again_and_may_have_cost(
    demo_raw, person, pictures, reply
):
    with scripted(demo_raw, Script(reply=reply)) as server:
        (outcome,) = ask(model(server.url, retries=2), person, pictures[:1])
    assert (outcome.status, outcome.requests) == ("failed", 3)
    assert outcome.lost.tokens == 3 * 2100


def test_a_reply_of_no_measure_is_not_read(demo_raw, person, pictures):
    """But for the first, which the maintained client reads itself, and which is garbled."""
    reply = completion({"content": "x" * LARGEST_REPLY})

    async def run(config):
        async with Endpoint(config) as endpoint:
            prompt = prompt_for(person, person.spectrum(pictures[0].modality))
            return [await endpoint.ask(one.image, prompt) for one in pictures[:2]]

    with scripted(demo_raw, Script(reply=reply)) as server:
        first, second = asyncio.run(run(model(server.url, retries=0, reasks=0)))
    assert (first.status, first.reason) == ("garbled", f"longer than {2**17} characters")
    assert second.status == "failed"
    assert "bytes, which is not read" in second.reason


def test_half_a_character_of_an_answer_can_be_written(demo_raw, person, pictures):
    spoilt = whole(person, pictures[0])[:-1] + ', "note": "\ud83d"}'
    with scripted(demo_raw, Script(reply=completion({"content": spoilt}))) as server:
        (outcome,) = ask(model(server.url), person, pictures[:1])
    assert outcome.status == "answered"
    assert '"note": "?"' in outcome.answer.encode().decode()


@pytest.mark.parametrize(
    ("trouble", "lost"), [("slow", 3), ("cut_before", 3), ("cut_within", 3), ("500", 0), ("429", 0)]
)
def test_what_was_sent_and_brought_nothing_counts_as_expected(
    demo_raw, person, pictures, trouble, lost
):
    with scripted(demo_raw, Script(always=trouble, retry_after="0")) as server:
        config = model(server.url, retries=2, timeout_s=0.5 if trouble == "slow" else 5)
        (outcome,) = ask(config, person, pictures[:1])
    assert (outcome.status, outcome.requests) == ("failed", 3)
    assert outcome.lost.tokens == lost * 2100
    assert (outcome.tokens_in, outcome.tokens_out) == (0, 0)


def test_an_endpoint_that_was_never_reached_cost_nothing(person, pictures):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    (outcome,) = ask(model(url, retries=1), person, pictures[:1])
    assert (outcome.status, outcome.requests, outcome.lost.tokens) == ("failed", 2, 0)


@pytest.mark.parametrize("wait", ["nan", "never", "-5", "Wed, 21 Oct 2015 07:28:00 GMT"])
def test_a_wait_that_is_none_holds_nobody_back(demo_raw, person, pictures, wait):
    with scripted(demo_raw, Script(trouble={"429": 0.4}, retry_after=wait)) as server:
        outcomes = ask(model(server.url, retries=12), person, pictures)
        assert server.stats.troubles["429"] > 0
    assert {one.status for one in outcomes} == {"answered"}
