"""A server that speaks the OpenAI chat protocol, answers from a known truth, and misbehaves.

It is a real HTTP server on loopback: started in a thread by tests, or as a process of its own:

    python tests/captioning/scripted_endpoint.py --source DEMO --port 0 --latency 0.05

It knows an image by its bytes, so it draws its answer from the true attributes of that sample; what
it answers depends on nothing but model and image. Of an image that it does not know it says
anything that the demanded form allows. ``GET /stats`` gives what was asked and answered.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import hashlib
import io
import json
import random
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from next.captioning.schema.attributes import NOT_VISIBLE, OTHER, load_schema
from next.captioning.schema.labels import demo_labels
from next.captioning.schema.prompt import prompt_for

SPECTRA = {"RGB": "visible", "NI": "near_infrared", "TI": "thermal"}
REASONS = {
    200: "OK", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 429: "Too Many Requests",
    500: "Internal Server Error", 503: "Service Unavailable",
}  # fmt: skip


@dataclass(frozen=True)
class Persona:
    """How one model errs."""

    error: float = 0.06
    """Probability of a wrong value in a good image."""
    blind_error: float = 0.2
    """The same where the image fails (dark, glare, thermal crossover)."""
    unseen: float = 0.08
    """Probability of not_visible in a good image."""
    blind_unseen: float = 0.45
    """The same where the image fails."""
    sure_right: tuple[float, float] = (0.75, 0.99)
    """Range of the confidence of right values."""
    sure_wrong: tuple[float, float] = (0.4, 0.85)
    """Range of the confidence of wrong values."""
    shared: float = 0.3
    """Probability that it errs as the other models do: all take the same thing for the same."""
    images: bool = True
    """Whether it takes images."""
    sees: bool = True
    """Whether it looks at the images that it takes."""
    structured: bool = True
    """Whether it takes response_format json_schema."""


PERSONAS = {
    "scripted-large": Persona(error=0.04, blind_error=0.14, unseen=0.06, blind_unseen=0.35),
    "scripted-small": Persona(error=0.08, blind_error=0.22, sure_wrong=(0.5, 0.95)),
    "scripted-other": Persona(error=0.07, blind_error=0.2, unseen=0.1, sure_right=(0.6, 0.95)),
}
ERRORS = {
    "400": "This model's maximum context length is 2048 tokens, but your messages took 5123",
    "402": "Insufficient credits",
    "403": "Your input was flagged by moderation",
    "404": "The model has been unloaded",
    "500": "The server had an error",
}
TROUBLES = (
    "429", "500", "slow", "cut_before", "cut_within", "broken_json", "wrong_schema",
    "copied_prompt", "not_a_completion", "fenced",
)  # fmt: skip


@dataclass
class Script:
    """What the server does."""

    personas: Mapping[str, Persona] = field(default_factory=lambda: dict(PERSONAS))
    latency: float = 0.0
    """Seconds before each answer."""
    retry_after: str = "0.05"
    """Seconds that a 429 asks for."""
    slow: float = 30.0
    """Seconds before a slow answer."""
    key: str | None = None
    """The only key that is accepted; None: any or none."""
    trouble: Mapping[str, float] = field(default_factory=dict)
    """Probability of each kind of trouble, for each request."""
    always: str | None = None
    """A trouble that befalls every request about a known image."""
    refused: frozenset[str] = frozenset()
    """sha256 of images that are refused with status 400."""
    declined: frozenset[str] = frozenset()
    """sha256 of images that the models decline to describe."""
    reply: bytes | None = None
    """Sent in place of every answer about a known image, as it is."""
    prompt_tokens: int = 900
    completion_tokens: int = 300


@dataclass
class Stats:
    """What happened."""

    requests: int = 0
    clients: set[str] = field(default_factory=set)
    """Addresses of the machines that asked."""
    answers: Counter[str] = field(default_factory=Counter)
    """Complete answers that were sent, by model and image: what a real endpoint would bill."""
    troubles: Counter[str] = field(default_factory=Counter)
    keys: set[str] = field(default_factory=set)
    most_at_a_time: int = 0
    at_a_time: int = 0

    def as_dict(self) -> dict[str, Any]:
        return {
            "requests": self.requests,
            "answers": dict(self.answers),
            "troubles": dict(self.troubles),
            "most_at_a_time": self.most_at_a_time,
        }


class ScriptedEndpoint:
    """The server; ``with scripted(...) as endpoint`` runs it in a thread."""

    def __init__(
        self, source: Path | None, script: Script | None = None, host: str = "127.0.0.1"
    ) -> None:
        self.script = script or Script()
        self.host = host
        self.stats = Stats()
        self.port = 0
        self._truth: dict[str, tuple[str, str, dict[str, str]]] = {}
        if source is not None:
            self._learn(source)
        schema = load_schema("person")
        self._attributes = {
            modality: prompt_for(schema, spectrum).attributes
            for modality, spectrum in SPECTRA.items()
        }
        self._tries: Counter[str] = Counter()
        self._cache: dict[str, bytes] = {}

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}/v1"

    def _learn(self, source: Path) -> None:
        """Every image's bytes, with its modality, whether the modality fails, and the truth."""
        truth = json.loads((source / "attributes.json").read_text())
        blind = {"RGB": "dark", "NI": "glare", "TI": "crossover"}
        for split, folder in (("train", "train"), ("gallery", "test")):
            labels = demo_labels(truth)[split]
            for item, shot in truth["samples"][folder].items():
                for modality, cause in blind.items():
                    data = (source / folder / modality / item).read_bytes()
                    values = {
                        name: value if isinstance(value, str) else value[modality]
                        for name, value in labels[Path(item).stem].items()
                    }
                    state = "blind" if shot[cause] else "good"
                    self._truth[hashlib.sha256(data).hexdigest()] = (modality, state, values)

    def warm(self, model: str) -> None:
        """Draw all answers of a model, so that a measurement of speed does not wait for it."""
        for digest in self._truth:
            self._answer(model, self.script.personas[model], digest, {}, None)

    async def serve(self, port: int = 0) -> asyncio.Server:
        server = await asyncio.start_server(self._connection, self.host, port, limit=2**24)
        self.port = server.sockets[0].getsockname()[1]
        return server

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                lines = head.decode("latin-1").split("\r\n")
                method, path, _ = lines[0].split(" ", 2)
                headers = {
                    name.lower(): value.strip()
                    for name, _, value in (line.partition(":") for line in lines[1:])
                }
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                self.stats.requests += 1
                self.stats.clients.add(writer.get_extra_info("peername")[0])
                self.stats.at_a_time += 1
                self.stats.most_at_a_time = max(self.stats.most_at_a_time, self.stats.at_a_time)
                try:
                    if not await self._respond(writer, method, path, headers, body):
                        break
                finally:
                    self.stats.at_a_time -= 1
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _respond(
        self,
        writer: asyncio.StreamWriter,
        method: str,
        path: str,
        headers: dict[str, str],
        body: bytes,
    ) -> bool:
        """Answer one request; False: the line is to be cut."""
        if path == "/stats":
            return await self._send(writer, 200, json.dumps(self.stats.as_dict()).encode())
        key = headers.get("authorization", "").removeprefix("Bearer ")
        self.stats.keys.add(key)
        if self.script.key is not None and key != self.script.key:
            return await self._error(writer, 401, f"Incorrect API key provided: {key}")
        if method == "GET" and path == "/v1/models":
            models = [{"id": name, "object": "model"} for name in self.script.personas]
            return await self._send(writer, 200, json.dumps({"data": models}).encode())
        if method != "POST" or path != "/v1/chat/completions":
            return await self._error(writer, 404, f"no such path: {path}")
        return await self._chat(writer, json.loads(body))

    async def _chat(self, writer: asyncio.StreamWriter, request: dict[str, Any]) -> bool:
        model = request["model"]
        persona = self.script.personas.get(model)
        if persona is None:
            return await self._error(writer, 404, f"The model `{model}` does not exist.")
        image = image_of(request)
        if image is not None and not persona.images:
            return await self._error(writer, 400, f"{model} does not support image input")
        form = request.get("response_format", {}).get("type")
        if form == "json_schema" and not persona.structured:
            return await self._error(writer, 400, "response_format json_schema is not supported")
        digest = hashlib.sha256(image or b"").hexdigest()
        if digest in self.script.refused:
            return await self._error(writer, 400, "Image rejected by the content policy")
        if image is None or digest not in self._truth:
            answer = self._beside_the_truth(model, persona, image, request)
            return await self._send(writer, 200, self._completion(model, answer))
        return await self._describe(writer, model, persona, digest, request)

    def _beside_the_truth(
        self, model: str, persona: Persona, image: bytes | None, request: dict[str, Any]
    ) -> str:
        """The answer to a probe, a sentence in other words, or what a stranger may look like."""
        if image is None and "Rewrite" in request["messages"][1]["content"]:
            return self._rewritten(model, request["messages"][1]["content"])
        form = request.get("response_format", {}).get("json_schema", {}).get("schema")
        if image is not None and form is not None and list(form["properties"]) != ["colour"]:
            digest = hashlib.sha256(image).hexdigest()
            self.stats.answers[f"{model} {digest}"] += 1
            return json.dumps(anything(form, f"{model} {digest}"))
        colour = colour_of(image) if persona.sees else "green"
        return json.dumps({"colour": {"value": colour, "confidence": 1.0}})

    async def _describe(
        self,
        writer: asyncio.StreamWriter,
        model: str,
        persona: Persona,
        digest: str,
        request: dict[str, Any],
    ) -> bool:
        """The answer about a known image."""
        if self.script.latency:
            await asyncio.sleep(self.script.latency)
        name = f"{model} {digest}"
        self._tries[name] += 1
        trouble = self.script.always or self._trouble(name)
        if trouble is not None:
            self.stats.troubles[trouble] += 1
            if trouble.isdigit() or trouble in ("slow", "cut_before", "not_a_completion"):
                return await self._lose(writer, trouble)
        if digest in self.script.declined:
            return await self._send(
                writer, 200, self._completion(model, None, refusal="I can't help with that image.")
            )
        data = self.script.reply or self._answer(model, persona, digest, request, trouble)
        self.stats.answers[name] += 1
        if trouble == "cut_within":
            writer.write(head_of(200, len(data)) + data[: len(data) // 2])
            await writer.drain()
            return False
        return await self._send(writer, 200, data)

    def _rewritten(self, model: str, question: str) -> str:
        """A sentence in other words; one in three is spoilt."""
        sentence = question.rsplit("\n", 1)[-1]
        digest = hashlib.sha256(sentence.encode()).hexdigest()
        self.stats.answers[f"{model} {digest}"] += 1
        if digest[0] in "01234":
            return sentence.replace(".", " on a sunny day.")
        return (
            sentence.replace(" is wearing ", " wears ").replace(" are wearing ", " wear ")
            .replace(" seen from ", " pictured from ")
        )  # fmt: skip

    def _trouble(self, name: str) -> str | None:
        rng = random.Random(f"{name} {self._tries[name]}")
        for kind, rate in self.script.trouble.items():
            if rng.random() < rate:
                return kind
        return None

    async def _lose(self, writer: asyncio.StreamWriter, trouble: str) -> bool:
        """Troubles that nobody would pay for."""
        if trouble == "429":
            return await self._error(
                writer, 429, "Rate limit reached", {"retry-after": self.script.retry_after}
            )
        if trouble.isdigit():
            return await self._error(writer, int(trouble), ERRORS[trouble])
        if trouble == "slow":
            await asyncio.sleep(self.script.slow)
            return False
        if trouble == "not_a_completion":
            return await self._send(writer, 200, b'{"error": "busy"}')
        return False

    def _answer(
        self,
        model: str,
        persona: Persona,
        digest: str,
        request: dict[str, Any],
        trouble: str | None,
    ) -> bytes:
        name = f"{model} {digest} {trouble or ''}"
        if name not in self._cache:
            self._cache[name] = self._completion(
                model, disturbed(self._readings(model, persona, digest), trouble, request)
            )
        return self._cache[name]

    def _readings(self, model: str, persona: Persona, digest: str) -> dict[str, dict[str, Any]]:
        modality, state, truth = self._truth[digest]
        blind = state == "blind"
        error = persona.blind_error if blind else persona.error
        unseen = persona.blind_unseen if blind else persona.unseen
        answers = {}
        for attribute in self._attributes[modality]:
            rng = random.Random(f"{model} {digest} {attribute.name}")
            if rng.random() < persona.shared:
                rng = random.Random(f"{digest} {attribute.name}")
            true = truth[attribute.name]
            if rng.random() < unseen:
                value, bounds = NOT_VISIBLE, (0.5, 0.9)
            elif rng.random() < error or true == NOT_VISIBLE:
                value = rng.choice([one for one in attribute.values if one != true])
                bounds = persona.sure_wrong
            else:
                value, bounds = true, persona.sure_right
            answers[attribute.name] = {
                "value": value,
                **({"other": ""} if attribute.other else {}),
                "confidence": round(rng.uniform(*bounds), 2),
            }
        return answers

    def _completion(self, model: str, answer: str | None, refusal: str | None = None) -> bytes:
        message = {"role": "assistant", "content": answer, "refusal": refusal}
        used = (self.script.prompt_tokens, self.script.completion_tokens)
        reply = {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1,
            "model": model,
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
            "usage": {
                "prompt_tokens": used[0],
                "completion_tokens": used[1],
                "total_tokens": sum(used),
            },
        }
        return json.dumps(reply).encode()

    async def _error(
        self,
        writer: asyncio.StreamWriter,
        status: int,
        message: str,
        headers: dict[str, str] | None = None,
    ) -> bool:
        error = {"error": {"message": message, "type": "error", "code": None}}
        return await self._send(writer, status, json.dumps(error).encode(), headers)

    async def _send(
        self,
        writer: asyncio.StreamWriter,
        status: int,
        data: bytes,
        headers: dict[str, str] | None = None,
    ) -> bool:
        writer.write(head_of(status, len(data), headers) + data)
        await writer.drain()
        return True


def anything(form: dict[str, Any], key: str) -> dict[str, dict[str, Any]]:
    """An answer of the form of a JSON schema, drawn from a key."""
    answers = {}
    for name, answer in form["properties"].items():
        rng = random.Random(f"{key} {name}")
        choices = [one for one in answer["properties"]["value"]["enum"] if one != OTHER]
        other = {OTHER: ""} if OTHER in answer["properties"] else {}
        answers[name] = {"value": rng.choice(choices), **other, "confidence": rng.random()}
    return answers


def disturbed(
    answers: dict[str, dict[str, Any]], trouble: str | None, request: dict[str, Any]
) -> str:
    """The answer's text, spoilt in one way."""
    text = json.dumps(answers)
    if trouble == "broken_json":
        return text[: len(text) // 4]
    if trouble == "wrong_schema":
        return json.dumps({"caption": "a person", "score": 3})
    if trouble == "copied_prompt":
        copied = {name: {"value": "one of the listed values", "confidence": 1} for name in answers}
        return json.dumps(copied) + "\n" + request["messages"][1]["content"][0]["text"]
    if trouble == "fenced":
        return f"Here you are:\n```json\n{text}\n```"
    return text


def head_of(status: int, length: int, headers: Mapping[str, str] | None = None) -> bytes:
    lines = [
        f"HTTP/1.1 {status} {REASONS.get(status, 'Status')}",
        "content-type: application/json",
        f"content-length: {length}",
        *(f"{name}: {value}" for name, value in (headers or {}).items()),
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def image_of(request: dict[str, Any]) -> bytes | None:
    """The image of a chat request, decoded from its data URL."""
    for message in request["messages"]:
        for part in message["content"] if isinstance(message["content"], list) else []:
            if part["type"] == "image_url":
                return base64.b64decode(part["image_url"]["url"].partition("base64,")[2])
    return None


def colour_of(image: bytes | None) -> str:
    """The strongest channel of an image, which is what a probe asks for."""
    if image is None:
        return "red"
    try:
        with Image.open(io.BytesIO(image)) as opened:
            pixel = opened.convert("RGB").resize((1, 1)).getpixel((0, 0))
    except OSError:
        return "green"
    return ("red", "green", "blue")[pixel.index(max(pixel))]


@contextlib.contextmanager
def scripted(
    source: Path | None, script: Script | None = None, host: str = "127.0.0.1"
) -> Iterator[ScriptedEndpoint]:
    """The server in a thread of its own."""
    endpoint = ScriptedEndpoint(source, script, host)
    loop = asyncio.new_event_loop()
    ready = threading.Event()

    async def run() -> None:
        server = await endpoint.serve()
        ready.set()
        async with server:
            with contextlib.suppress(asyncio.CancelledError):
                await server.serve_forever()

    task: list[asyncio.Task[None]] = []

    def thread() -> None:
        asyncio.set_event_loop(loop)
        task.append(loop.create_task(run()))
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(task[0])
        for other in asyncio.all_tasks(loop):
            other.cancel()
        loop.run_until_complete(asyncio.gather(*asyncio.all_tasks(loop), return_exceptions=True))
        loop.close()

    runner = threading.Thread(target=thread, daemon=True)
    runner.start()
    ready.wait(10)
    try:
        yield endpoint
    finally:
        loop.call_soon_threadsafe(task[0].cancel)
        runner.join(10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--latency", type=float, default=0.0)
    parser.add_argument("--warm", help="model whose answers are drawn beforehand")
    options = parser.parse_args()
    endpoint = ScriptedEndpoint(options.source, Script(latency=options.latency))
    if options.warm is not None:
        endpoint.warm(options.warm)

    async def run() -> None:
        server = await endpoint.serve(options.port)
        sys.stdout.write(f"{endpoint.url}\n")
        sys.stdout.flush()
        await server.serve_forever()

    asyncio.run(run())


if __name__ == "__main__":
    main()
