"""Any OpenAI-compatible chat endpoint that takes images: asked politely, and never paid twice."""

from __future__ import annotations

import asyncio
import base64
import email.utils
import io
import json
import logging
import math
import random
import re
import time
from typing import Any, Literal, NamedTuple, Protocol

import aiohttp
import httpx2
import openai
from PIL import Image

from next.addresses import reach_directly
from next.captioning.requests.ledger import Status
from next.captioning.requests.models import ModelConfig
from next.captioning.requests.spending import Spending
from next.captioning.schema.attributes import Attribute
from next.captioning.schema.parsing import parse_answer
from next.captioning.schema.prompt import Prompt, answer_schema
from next.config import near_matches

_log = logging.getLogger(__name__)

Structured = Literal["json_schema", "json_object", "none"]
"""How the form of the answer is demanded: by a JSON schema, as any JSON, or in words alone."""

LARGEST_REPLY = 2**23
"""Bytes of a reply that are read; the text of an answer is a thousandth of it."""
MOST_TOKENS = 10**8
"""Of one request; what claims more is no count."""
LONGEST_WAIT_S = 120.0
"""Most seconds before one retry, whatever the endpoint asks for."""
_PROBE_TRIES = 3
_SUBJECT = "@@@subject@@@"
"""Stands for the image's URL (or the text) where a request is encoded beforehand."""
_REASK = "Your last answer was not the JSON object that was asked for. Answer with it alone."
_REFUSAL = re.compile(
    r"\b(?:can(?:no|')t|unable to|won't|will not|not able to|decline)\b[^.]*"
    r"\b(?:assist|help|comply|describe|identify|analy[sz]e|provide)\b",
    re.IGNORECASE,
)
_LONGEST_REFUSAL = 2000
"""Characters in which a refusal is looked for: the pattern's time grows as their square."""
_NEVER_SENT = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)
"""Troubles before a request has reached the endpoint, so that nothing can have been paid. The
layers above call a line that was cut while it waited the same."""
_OVERLOADED = (408, 409, 425, 429)
_REFUSING = (400, 403, 413, 415, 422, 451)
"""What an endpoint says to an image that it will not look at."""
_NO_QUOTA = "insufficient_quota"
_MODERATED = re.compile(r"moderat|flagged|policy|safety", re.IGNORECASE)
"""Tells a 403 about an image from one about the key."""


class Outcome(NamedTuple):
    """What became of one question."""

    status: Status
    answer: str = ""
    reason: str = ""
    tokens_in: int = 0
    tokens_out: int = 0
    requests: int = 0
    lost: Spending = Spending()
    """What requests may have cost that were sent and brought nothing."""


class Meter(Protocol):
    """Holds back what each request may cost before it is sent."""

    async def hold(self) -> Spending | None:
        """Set aside what the next request may cost; None: the budget does not allow it."""

    async def settle(self, held: Spending, cost: Spending) -> None:
        """Replace what was set aside by what the request did cost."""

    def learn(self, tokens_in: int, tokens_out: int) -> None:
        """Hear what a request took."""


class Unlimited:
    """A meter without a budget; a lost request counts as what the model is expected to take."""

    def __init__(self, model: ModelConfig) -> None:
        self._expected = model.cost(model.expected_tokens_in, model.expected_tokens_out)

    async def hold(self) -> Spending | None:
        return self._expected

    async def settle(self, held: Spending, cost: Spending) -> None:
        pass

    def learn(self, tokens_in: int, tokens_out: int) -> None:
        pass


class _Sent(NamedTuple):
    """What came of sending a question until it was answered."""

    reply: dict[str, Any] | Outcome
    requests: int
    lost: Spending


class Endpoint:
    """Asks one model. One of these belongs to one event loop.

    Args:
        model: what to ask, and how fast.
        share: the part of the rate limits that is this one's, where several processes ask.

    Raises:
        ValueError: the key is missing in the environment.
    """

    def __init__(self, model: ModelConfig, share: float = 1.0) -> None:
        self.model = model
        self.structured: Structured | None = (
            None if model.structured == "auto" else model.structured
        )
        self._key = model.key()
        self._gate = _Gate(model, share)
        self._frames: dict[tuple[str, bool, Structured | None], tuple[bytes, bytes]] = {}
        self._random = random.Random()  # jitter only: nothing that is written depends on it
        self._pattern: httpx2.Request | None = None
        self._headers: list[tuple[str, str]] = []
        reach_directly(model.base_url)
        # aiohttp's transport takes a third of the time of the default one.
        self._http = openai.DefaultAioHttpClient(
            timeout=model.timeout_s, event_hooks={"request": [self._keep_pattern]}
        )
        self._client = openai.AsyncOpenAI(
            base_url=model.base_url,
            api_key=self._key or "none",
            max_retries=0,
            timeout=model.timeout_s,
            http_client=self._http,
        )

    async def __aenter__(self) -> Endpoint:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    async def probe(self) -> None:
        """Find out with one small picture whether the endpoint is there, and how it answers.

        Raises:
            ConnectionError: it cannot be reached.
            PermissionError: it does not take the key.
            ValueError: it does not know the model, or the model takes no image.
        """
        for attempt in range(1, _PROBE_TRIES + 1):
            try:
                await self._negotiate()
                return
            except (openai.APIConnectionError, httpx2.HTTPError) as error:
                if attempt == _PROBE_TRIES:
                    raise ConnectionError(
                        f"{self.model.base_url}: the endpoint of {self.model.name} cannot be "
                        f"reached ({self._clean(error.__cause__ or error)}); start it, or mend "
                        f"base_url"
                    ) from None
            except openai.APIStatusError as error:
                self._raise_if_hopeless(error)
                if attempt == _PROBE_TRIES:
                    raise ConnectionError(
                        f"{self.model.base_url}: the endpoint of {self.model.name} answers with "
                        f"an error ({self._clean(error)}); look at its log"
                    ) from None
            await asyncio.sleep(self._jittered(attempt))

    async def ask(self, subject: bytes, prompt: Prompt, meter: Meter | None = None) -> Outcome:
        """Ask about an image (or a text); every trouble of the line or answer is an outcome.

        Args:
            subject: the encoded image, or the text in UTF-8.
            prompt: what is asked.
            meter: is asked before every request, re-asks and retries too; None: no budget.

        Raises:
            PermissionError: the key is no longer taken, or the quota is used up.
            ValueError: the model is gone.
        """
        meter = meter or Unlimited(self.model)
        so_far = Outcome("failed")
        for reask in range(self.model.reasks + 1):
            reply, sent, lost = await self._send_until_answered(subject, prompt, reask > 0, meter)
            so_far = so_far._replace(requests=so_far.requests + sent, lost=so_far.lost + lost)
            if isinstance(reply, Outcome):  # a re-ask that fails leaves the first answer's status
                return so_far if reask else reply._replace(requests=sent, lost=lost)
            tokens_in, tokens_out = self._tokens(reply)
            judged = _judge(reply, prompt)
            so_far = so_far._replace(
                status=judged.status,
                answer=_writable(judged.answer),
                reason=self._clean(judged.reason) if judged.reason else "",
                tokens_in=so_far.tokens_in + tokens_in,
                tokens_out=so_far.tokens_out + tokens_out,
            )
            if not judged.again:
                break
        return so_far

    def _tokens(self, reply: dict[str, Any]) -> tuple[int, int]:
        """Tokens of prompt and answer, as told; where they are not, as expected."""
        used = reply.get("usage")
        used = used if isinstance(used, dict) else {}
        return (
            _count(used.get("prompt_tokens"), self.model.expected_tokens_in),
            _count(used.get("completion_tokens"), self.model.expected_tokens_out),
        )

    async def _send_until_answered(
        self, subject: bytes, prompt: Prompt, again: bool, meter: Meter
    ) -> _Sent:
        reason, lost = "", Spending()
        for attempt in range(1, self.model.retries + 2):
            held = await meter.hold()
            if held is None:
                told = f"the budget is spent; before: {reason}" if reason else "the budget is spent"
                return _Sent(Outcome("failed", reason=told), attempt - 1, lost)
            cost = held  # until it is known that the endpoint did not work for it
            try:
                await self._gate.enter()
                reply = await self._post(self._body(subject, prompt, again))
                if isinstance(reply, dict) and reply.get("choices"):
                    tokens = self._tokens(reply)
                    cost = self.model.cost(*tokens)
                    meter.learn(*tokens)
                    self._gate.used(sum(tokens))
                    return _Sent(reply, attempt, lost)
                lost += cost
                reason = self._clean(f"not a chat completion: {str(reply)[:100]}")
            except openai.APIStatusError as error:
                cost = Spending()
                self._raise_if_hopeless(error)
                reason = self._clean(error)
                if error.status_code in _REFUSING:
                    return _Sent(Outcome("refused", reason=reason), attempt, lost)
                if error.status_code not in _OVERLOADED and error.status_code < 500:
                    raise ValueError(
                        f"{self.model.base_url}: {self.model.name} can no longer be asked "
                        f"({reason}); mend the endpoint or the file of models, and run again"
                    ) from None
                if error.status_code == 429 or "retry-after" in error.response.headers:
                    self._gate.pause(_retry_after(error) or self._jittered(attempt))
            except (openai.APIError, httpx2.HTTPError, ValueError, RecursionError) as error:
                causes = _causes(error)
                if any(isinstance(cause, _NEVER_SENT) for cause in causes):
                    cost = Spending()
                lost += cost
                reason = self._clean(causes[min(1, len(causes) - 1)])
            finally:
                await meter.settle(held, cost)
            if attempt <= self.model.retries:
                await asyncio.sleep(self._jittered(attempt))
        return _Sent(Outcome("failed", reason=reason), self.model.retries + 1, lost)

    async def _post(self, body: bytes) -> Any:
        """Send a body to the chat completions, and decode what comes back.

        The maintained client builds and sends the first request, a probe. The others are copies
        of it (its URL, headers, key and time-outs) with another body, and go through the same
        HTTP client: to have every one built again takes as long as all the rest of a call.
        """
        if self._pattern is None:
            return await self._client.post("/chat/completions", content=body, cast_to=object)
        response = await self._http.send(
            httpx2.Request(
                "POST",
                self._pattern.url,
                headers=self._headers,
                content=body,
                extensions=self._pattern.extensions,
            )
        )
        if response.is_success:
            if len(response.content) > LARGEST_REPLY:
                raise ValueError(f"a reply of {len(response.content):,} bytes, which is not read")
            return json.loads(response.content)
        try:
            problem = json.loads(response.content[:LARGEST_REPLY])
        except (ValueError, RecursionError):
            problem = response.text[:1000]
        raise openai.APIStatusError(
            f"Error code: {response.status_code} - {problem}",
            response=response,
            body=problem.get("error", problem) if isinstance(problem, dict) else problem,
        )

    async def _keep_pattern(self, request: httpx2.Request) -> None:
        """Remember the first request to the chat completions."""
        if request.method == "POST" and self._pattern is None:
            self._pattern = request
            self._headers = [
                (name, value)
                for name, value in request.headers.items()
                if name.lower() != "content-length"
            ]

    def _body(self, subject: bytes, prompt: Prompt, again: bool = False) -> bytes:
        """The request's JSON; all of it but the subject is encoded once."""
        key = (prompt.hash, again, self.structured)
        if key not in self._frames:
            body = json.dumps(self._request(prompt, again), ensure_ascii=False).encode()
            head, _, tail = body.partition(_SUBJECT.encode())
            self._frames[key] = head, tail
        head, tail = self._frames[key]
        filling = data_url(subject) if prompt.of == "image" else json.dumps(subject.decode())[1:-1]
        return b"".join((head, filling.encode(), tail))

    def _request(self, prompt: Prompt, again: bool = False) -> dict[str, Any]:
        text = f"{prompt.user}\n{_REASK}" if again else prompt.user
        content: Any = [
            {"type": "text", "text": text},
            {"type": "image_url", "image_url": {"url": _SUBJECT}},
        ]
        if prompt.of == "text":
            content = f"{text}\n{_SUBJECT}"
        body: dict[str, Any] = {
            "model": self.model.name,
            "messages": [
                {"role": "system", "content": prompt.system},
                {"role": "user", "content": content},
            ],
            **self.model.settings(),
        }
        if prompt.of == "text":
            return body
        if self.structured == "json_schema":
            form = {"name": "attributes", "strict": True, "schema": prompt.answer}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        elif self.structured == "json_object":
            body["response_format"] = {"type": "json_object"}
        return body

    async def _negotiate(self) -> None:
        """Settle how answers are demanded, or find that images are not taken."""
        wanted = self.structured
        modes: tuple[Structured, ...] = ("json_schema", "json_object", "none")
        refused: openai.APIStatusError | None = None
        for mode in (wanted,) if wanted is not None else modes:
            self.structured = mode
            try:
                reply = await self._post(self._body(_PROBE_IMAGE, _PROBE))
            except openai.APIStatusError as error:
                self.structured = wanted
                if error.status_code not in (400, 404, 415, 422, 501):
                    raise
                refused = error
                continue
            self._check_sight(reply)
            if mode != "json_schema":
                _log.info("%s: answers are demanded as %s", self.model.name, mode)
            return
        assert refused is not None
        await self._explain(refused)

    async def _explain(self, refused: openai.APIStatusError) -> None:
        """The picture was refused: is it the model, its name, or the picture?"""
        body = self._request(_PROBE)
        body.pop("response_format", None)
        body["messages"][1]["content"] = _PROBE.user
        try:
            await self._post(json.dumps(body).encode())
        except openai.APIStatusError as error:
            self._raise_if_hopeless(error)
            if error.status_code == 404:
                raise ValueError(
                    f"{self.model.base_url}: there is no model {self.model.name!r} "
                    f"({self._clean(error)}){await self._served()}"
                ) from None
            raise ValueError(
                f"{self.model.base_url}: {self.model.name} refuses a plain question "
                f"({self._clean(error)}); mend its settings in the file of models"
            ) from None
        raise ValueError(
            f"model {self.model.name} at {self.model.base_url} answers questions but takes no "
            f"image ({self._clean(refused)}); choose a model with image input"
        )

    async def _served(self) -> str:
        try:
            names = [model.id async for model in self._client.models.list()]
        except (openai.APIError, ValueError):
            return ""
        close = near_matches(self.model.name, names) or names[:5]
        return f"; it serves {', '.join(close)}" if close else ""

    def _check_sight(self, reply: Any) -> None:
        answer = _judge(reply, _PROBE).answer if isinstance(reply, dict) else ""
        reading = parse_answer(answer, _PROBE.attributes).readings.get("colour")
        if reading is None or reading.value != "red":
            _log.warning(
                "%s calls a red picture %r: it may not look at images at all",
                self.model.name,
                reading.value if reading else answer[:40],
            )

    def _raise_if_hopeless(self, error: openai.APIStatusError) -> None:
        moderated = error.status_code == 403 and _MODERATED.search(str(error))
        if error.status_code in (401, 403) and not moderated:
            how = f"the key in {self.model.api_key_env}" if self._key else "a call without a key"
            raise PermissionError(
                f"{self.model.base_url}: {how} was not accepted ({self._clean(error)}); "
                f"mend api_key_env of model {self.model.name}, or the key"
            ) from None
        if error.status_code == 402 or error.code == _NO_QUOTA:
            raise PermissionError(
                f"{self.model.base_url}: the account's quota is used up ({self._clean(error)}); "
                f"what was answered is in the ledger, so run again when there is more"
            ) from None

    def _jittered(self, attempt: int) -> float:
        """Seconds before a retry: between half and all of a wait that doubles each time."""
        wait = min(self.model.backoff_s * 2 ** (attempt - 1), LONGEST_WAIT_S)
        return wait * self._random.uniform(0.5, 1)

    def _clean(self, message: object) -> str:
        """A message without the key, in one short line."""
        text = _writable(" ".join(str(message)[:10_000].split())) or type(message).__name__
        if self._key:
            text = text.replace(self._key, "***")
        return re.sub(r"\b(sk-|Bearer )[\w*-]{4,}", r"\1***", text)[:300]


class _Gate:
    """Spaces calls evenly to the limits of a model, and holds all of them back after a 429."""

    def __init__(self, model: ModelConfig, share: float) -> None:
        calls, tokens = model.requests_per_minute, model.tokens_per_minute
        self._per_call = 60 / (calls * share) if calls else 0.0
        self._per_token = 60 / (tokens * share) if tokens else 0.0
        self._tokens = float(model.expected_tokens_in + model.expected_tokens_out)
        self._turn = 0.0
        self._paused = 0.0

    async def enter(self) -> None:
        """Wait for one's turn."""
        turn = max(time.monotonic(), self._turn)
        self._turn = turn + max(self._per_call, self._per_token * self._tokens)
        while (wait := max(turn, self._paused) - time.monotonic()) > 0:
            await asyncio.sleep(wait)

    def used(self, tokens: int) -> None:
        """Learn what a call takes."""
        self._tokens += 0.1 * (tokens - self._tokens)

    def pause(self, seconds: float) -> None:
        """Nobody enters before so many seconds have passed."""
        self._paused = max(self._paused, time.monotonic() + min(seconds, LONGEST_WAIT_S))


def data_url(image: bytes) -> str:
    """The image as a URL that holds it."""
    kinds = [kind for start, kind in _KINDS.items() if image.startswith(start)]
    kind = kinds[0] if kinds else "webp" if image[8:12] == b"WEBP" else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


_KINDS = {
    b"\xff\xd8": "jpeg", b"\x89PNG": "png", b"GIF8": "gif", b"BM": "bmp",
    b"II*\x00": "tiff", b"MM\x00*": "tiff",
}  # fmt: skip


class _Judged(NamedTuple):
    """What a chat completion says."""

    status: Status
    answer: str
    reason: str = ""
    again: bool = False
    """Whether the model may do better if it is asked once more: it wrote to its end, and what it
    wrote could not be read."""


def _judge(reply: dict[str, Any], prompt: Prompt) -> _Judged:
    """Status, answer and reason of what came as a chat completion, whatever it is; never raises.

    Servers that part thoughts from answers give the whole as ``reasoning_content`` where the
    model does not end its thought, and no content.
    """
    choices = reply.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        return _Judged("garbled", "", f"no message in the completion: {str(choices)[:100]}")
    content = _text(message.get("content"))
    answer = content or _text(message.get("reasoning_content"))
    cut = choice.get("finish_reason") == "length"
    if message.get("refusal"):
        return _Judged("refused", answer, str(message["refusal"])[:300])
    if choice.get("finish_reason") == "content_filter":
        return _Judged("refused", answer, "content filter")
    if prompt.of == "text":
        told = bool(content.strip())
        return _Judged("answered", content) if told else _Judged("garbled", answer, "no text")
    parsed = parse_answer(answer, prompt.attributes)
    if parsed.usable(prompt.attributes):
        return _Judged("answered", answer)
    if not parsed.readings and "{" not in answer and _REFUSAL.search(answer[:_LONGEST_REFUSAL]):
        return _Judged("refused", answer, answer[:200])
    problems = ["cut at its longest (max_tokens)"] if cut else []
    problems += ["no text"] if not answer.strip() else []
    reason = "; ".join([*problems, *parsed.problems[:4]])
    return _Judged("garbled", answer, reason, again=bool(content.strip()) and not cut)


def _text(content: Any) -> str:
    """The text of a message's content, which may come in parts; empty where there is none."""
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        return "".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else ""


def _writable(text: str) -> str:
    """A text that can be written: half a character, which JSON may name, is a question mark."""
    return text.encode("utf-8", "replace").decode()


def _causes(error: BaseException) -> list[BaseException]:
    """An error and what it was raised from, the outermost first."""
    found = [error]
    while found[-1].__cause__ is not None:
        found.append(found[-1].__cause__)
    return found


def _count(given: Any, otherwise: int) -> int:
    if isinstance(given, bool) or not isinstance(given, int) or not 0 <= given <= MOST_TOKENS:
        return otherwise
    return given


def _red_picture() -> bytes:
    picture = io.BytesIO()
    Image.new("RGB", (64, 64), (220, 20, 20)).save(picture, "JPEG")
    return picture.getvalue()


def _probe() -> Prompt:
    colour = Attribute(name="colour", question="", values=("red", "green", "blue"))
    user = 'Answer with JSON only: {"colour": {"value": "red", "green" or "blue", "confidence": 1}}'
    system = "You name the colour that fills the image."
    return Prompt((colour,), system, user, answer_schema((colour,)), "probe")


_PROBE_IMAGE, _PROBE = _red_picture(), _probe()


def _retry_after(error: openai.APIStatusError) -> float | None:
    given = error.response.headers.get("retry-after")
    if given is None:
        return None
    try:
        seconds = float(given)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(given).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return None if math.isnan(seconds) else max(seconds, 0.0)
