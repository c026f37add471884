"""A service over HTTP, on Ray Serve: what it finds, what it refuses, what it sees while it runs."""

import io
import json
import re
import runpy
import shutil
import signal
import socket
import struct
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import numpy as np
import psutil
import pytest
from PIL import Image

from next.data.shards.reader import open_manifest
from next.retrieval.gallery import open_galleries, open_gallery
from next.serving.launch import require_free
from tests.exposure import LOOPBACK, lines_of_all_processes
from tests.serving.conftest import TOKEN, other_version, write

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture
def client(service):
    with service.client() as found:
        yield found


@pytest.fixture
def sample(demo_shards, demo_raw):
    """Images of a gallery row by modality, and its name and identity."""
    labels, row = open_manifest(demo_shards).labels("gallery"), 5
    name = str(labels.sample_id[row])
    images = {m: (demo_raw / "test" / m / f"{name}.jpg").read_bytes() for m in ("RGB", "NI", "TI")}
    return images, name, int(labels.pid[row])


def fields(images: dict[str, bytes], *modalities: str) -> dict:
    return {f"image_{m}": (f"{m}.jpg", images[m], "image/jpeg") for m in modalities or images}


def test_images_find_the_identity_that_they_show_and_answers_name_model_and_gallery(
    client, sample, place
):
    images, name, pid = sample
    answer = client.post("/search?top=3&images=true", files=fields(images, "RGB", "TI")).json()
    first, *_ = answer["results"]
    assert (first["pid"], first["sample_id"], first["rank"]) == (pid, name, 1)
    assert first["score"] == pytest.approx(1, abs=1e-3), "over what both have"
    assert len(answer["results"]) == 3
    assert set(first["images"]) == {"RGB", "NI", "TI"}
    assert first["images"]["RGB"].startswith("data:image/jpeg;base64,")
    gallery = open_gallery(place / "galleries" / "first")
    assert answer["model"] == gallery.facts.model
    assert answer["gallery"] == first["gallery"] == gallery.digest
    assert answer["rows"] == len(gallery)
    ready = client.get("/health/ready").json()
    assert (ready["model"], ready["gallery"]) == (answer["model"], answer["gallery"])


def test_the_card_s_rule_leaves_out_the_query_s_own_camera(client, sample, place):
    images, name, pid = sample
    known = open_gallery(place / "galleries" / "first").labels()
    camera = int(known.camera[known.sample_id.tolist().index(name)])
    data = {"pid": str(pid), "camera": str(camera)}
    answer = client.post("/search?top=50", files=fields(images), data=data).json()
    assert answer["removed_by_rule"] == np.sum((known.pid == pid) & (known.camera == camera))
    assert name not in [one["sample_id"] for one in answer["results"]]


def test_requests_that_come_together_get_what_each_would_get_alone(
    client, sample, trained_embedder
):
    images, _, _ = sample
    sets = [("RGB",), ("RGB", "TI"), ("NI",), ("RGB", "NI", "TI")] * 6
    captions = [{}, {"caption_RGB": "An adult male in a red jacket."}] * 12

    def ask(place):
        files, data = fields(images, *sets[place]), captions[place]
        return client.post("/embed", files=files, data=data).json()

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(ask, range(len(sets))))
    for place, answer in enumerate(answers):
        columns = {f"image_{m}": [images[m]] for m in sets[place]}
        columns |= {name: [text] for name, text in captions[place].items()}
        [expected] = trained_embedder.embed(columns)
        np.testing.assert_allclose(answer["embedding"], expected, atol=1e-5)
        assert answer["model"] == trained_embedder.digest
        assert answer["modalities"] == [m for m in ("RGB", "NI", "TI") if m in sets[place]]
        assert answer["width"] == trained_embedder.width == len(answer["embedding"])


def picture(size: tuple[int, int], kind: str = "PNG", mode: str = "L") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind)
    return file.getvalue()


def claiming(width: int, height: int) -> bytes:
    """A small PNG whose header promises more pixels than it has."""
    whole = bytearray(picture((8, 8)))
    whole[16:24] = struct.pack(">II", width, height)
    whole[29:33] = struct.pack(">I", zlib.crc32(whole[12:29]))
    return bytes(whole)


SMALL = ("a.png", picture((8, 8)), "image/png")
BAD = {
    "no image": ({}, {"camera": "1"}, 422, "must have an image in one of the fields image_RGB, im"),
    "text": ({"image_RGB": ("a.jpg", b"hello", "image/jpeg")}, {}, 422, "image_RGB: is no image"),
    "empty": ({"image_RGB": ("a.jpg", b"", "image/jpeg")}, {}, 422, "image_RGB: is empty (0 byte"),
    "cut": (
        {"image_TI": ("a.png", picture((300, 300))[:60], "image/png")},
        {},
        422,
        "image_TI: cannot be decoded",
    ),
    "pixels": (
        {"image_RGB": ("a.png", claiming(1200, 1000), "image/png")},
        {},
        413,
        "image_RGB: has 1200 x 1000 pixels, but at most 1 million are taken",
    ),
    "bomb": (
        {"image_RGB": ("a.png", claiming(20000, 20000), "image/png")},
        {},
        413,
        "image_RGB: has 400,000,000 pixels, but at most",
    ),
    "depth": (
        {"image_RGB": ("a.png", picture((9, 9), mode="I;16"), "image/png")},
        {},
        422,
        "image_RGB: has more than 8 bits a channel, and the gallery's card states no depth",
    ),
    "modality": ({"image_SAR": SMALL}, {}, 422, "there is no field 'image_SAR'; there are image_R"),
    "near": ({"image_RBG": SMALL}, {}, 422, "did you mean image_RGB?"),
    "twice": (
        [("image_RGB", SMALL), ("image_RGB", SMALL)],
        {},
        422,
        "image_RGB must be given once",
    ),
    "text as image": ({"image_RGB": SMALL}, {"image_TI": "a"}, 422, "image_TI must be a file"),
    "image as text": ({"image_RGB": SMALL, "caption_RGB": SMALL}, {}, 422, "must be a text"),
    "number": ({"image_RGB": SMALL}, {"camera": "-1"}, 422, "camera must be a number, but is '-1'"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_used_is_refused_in_words_and_the_service_goes_on(client, sample, case):
    files, data, status, said = BAD[case]
    if not files:
        files = {"camera": (None, "1")}
        data = {}
    answer = client.post("/search", files=files, data=data)
    assert answer.status_code == status
    assert said in answer.json()["detail"]
    images, _, pid = sample
    good = client.post("/search", files=fields(images))
    assert good.json()["results"][0]["pid"] == pid


def test_a_request_that_is_too_long_is_refused_before_it_is_read(client, service, sample):
    long = {"image_RGB": ("a.jpg", bytes(3 * 2**20), "image/jpeg")}
    answer = client.post("/search", files=long)
    assert answer.status_code == 413
    assert "at most 2 MiB" in answer.json()["detail"]

    def endless():
        head = b'--b\r\nContent-Disposition: form-data; name="image_RGB"; filename="a"\r\n\r\n'
        yield head
        for _ in range(48):
            yield bytes(65536)

    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    answer = client.post("/search", content=endless(), headers=kind)
    assert answer.status_code == 413
    assert client.post("/embed", files=fields(sample[0])).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        (
            "/search",
            {"json": {"image": 1}},
            415,
            "must be multipart/form-data, but is application/",
        ),
        ("/search?top=0", {"files": {"image_RGB": SMALL}}, 422, "greater than or equal to 1"),
        ("/search?top=101", {"files": {"image_RGB": SMALL}}, 422, "less than or equal to 100"),
        ("/nowhere", {}, 404, "Not Found"),
    ],
)
def test_a_request_of_another_form_is_refused(client, path, body, status, said):
    answer = client.post(path, **body)
    assert answer.status_code == status
    assert said in json.dumps(answer.json()["detail"])


@pytest.mark.parametrize("token", [None, "wrong", TOKEN[:-1], "é" * 20])
def test_who_does_not_know_the_token_gets_nothing_but_health_and_the_page(service, sample, token):
    headers = [] if token is None else [("Authorization", f"Bearer {token}".encode())]
    with service.client(None) as client:
        for method, path in [("POST", "/search"), ("POST", "/embed"), ("GET", "/state")]:
            files = fields(sample[0]) if method == "POST" else None
            answer = client.request(method, path, files=files, headers=headers)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert "Bearer TOKEN" in answer.json()["detail"]
        assert client.get("/health/live").json() == {"status": "alive"}
        assert client.get("/health/ready").status_code == 200


def test_the_interface_is_described_with_the_model_s_own_modalities(client):
    described = client.get("/openapi.json").json()
    [body] = described["paths"]["/search"]["post"]["requestBody"]["content"].values()
    assert {"image_RGB", "image_NI", "image_TI", "caption_TI"} <= set(body["schema"]["properties"])
    answer = described["paths"]["/search"]["post"]["responses"]["200"]["content"]
    assert answer["application/json"]["schema"]["$ref"].endswith("/Search")
    page = client.get("/docs")
    for word in ("POST /search", "image_TI", "removed_by_rule", "at most 100"):
        assert word in page.text


def test_the_pages_load_nothing_from_elsewhere_and_their_policy_says_so(client):
    for path in ("/", "/docs"):
        page = client.get(path)
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert not re.search(r"(src|href)=[\"']?(https?:)?//", page.text)


def test_it_listens_on_loopback_alone_and_its_token_is_on_no_command_line(service):
    processes = [service.process, *psutil.Process(service.process.pid).children(recursive=True)]
    places = set()
    for process in processes:
        for one in psutil.Process(process.pid).net_connections("tcp"):
            if one.status == psutil.CONN_LISTEN:
                places.add(one.laddr)
    assert int(service.address.rsplit(":", 1)[1]) in {port for _, port in places}
    assert {ip for ip, _ in places} <= LOOPBACK
    assert not any(TOKEN in line for line in lines_of_all_processes())


def test_a_second_service_on_the_port_is_one_line(service, place, monkeypatch, capsys):
    port = service.address.rsplit(":", 1)[1]
    words = ("--model", place / "model", "--gallery", place / "galleries", "--port", port)
    monkeypatch.setenv("NEXT_REID_TOKEN", TOKEN)
    monkeypatch.setattr(sys, "argv", ["serve.py", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "jobs" / "serve.py"), run_name="__main__")
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        f"error: --port {port} of 127.0.0.1 is in use by another program; give another --port, or "
        f"stop that program\n"
    )


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_a_person_drops_images_and_sees_the_identity_first_also_on_a_telephone(
    service, sample, demo_raw, tmp_path
):
    from playwright.sync_api import sync_playwright

    _, name, pid = sample
    files = []
    for modality in ("TI", "RGB"):
        files.append(tmp_path / f"query-{modality}.jpg")
        shutil.copy(demo_raw / "test" / modality / f"{name}.jpg", files[-1])
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": 390, "height": 844})
        page.set_default_timeout(60_000)
        wrong = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
        page.goto(f"{service.address}/#token={TOKEN}")
        page.get_by_text("sightings can be searched").wait_for()
        assert TOKEN not in page.url
        dropped(page, files)
        page.locator(".slot[data-modality=RGB] .name", has_text="query-RGB.jpg").wait_for()
        page.keyboard.press("Tab")
        page.get_by_role("button", name="Search").focus()
        page.keyboard.press("Enter")
        first = page.locator("#results li").first
        first.wait_for()
        text = first.inner_text()
        assert f"1. identity {pid}" in text
        assert re.search(r"camera \d", text)
        assert re.search(r"\d\.\d{3}", text)
        assert first.locator("th").all_inner_texts() == ["RGB", "NI", "TI"]
        widths = page.locator("#results img").evaluate_all(
            "all => Promise.all(all.map(one => one.decode().then(() => one.naturalWidth)))"
        )
        assert len(widths) == 30
        assert min(widths) > 0
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert wrong == []
        bad = tmp_path / "bad.jpg"
        bad.write_bytes(b"no image")
        page.locator(".slot[data-modality=NI] input").set_input_files(bad)
        page.get_by_role("button", name="Search").click()
        page.locator("#said.wrong", has_text="image_NI: is no image of a kind").wait_for()
        browser.close()


def dropped(page, files) -> None:
    """Drop files on the page, as a person does."""
    import base64

    content = [[file.name, base64.b64encode(file.read_bytes()).decode()] for file in files]
    page.evaluate(
        """content => {
            const dropped = new DataTransfer();
            for (const [name, text] of content) {
                const bytes = Uint8Array.from(atob(text), one => one.charCodeAt(0));
                dropped.items.add(new File([bytes], name, {type: "image/jpeg"}));
            }
            const event = new DragEvent("drop", {dataTransfer: dropped, bubbles: true});
            document.querySelector("#slots").dispatchEvent(event);
        }""",
        content,
    )


def until(true, seconds: float = 120) -> None:
    """Wait until something is true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.2)


def test_a_gallery_that_is_added_is_seen_by_every_replica(
    service, client, place, trained_embedder, demo_shards
):
    before = client.get("/health/ready").json()
    added = write(trained_embedder, demo_shards, "train", place / "galleries" / "second")

    def seen() -> bool:
        rows = {client.get("/health/ready").json()["rows"] for _ in range(8)}
        return rows == {before["rows"] + len(added)}

    until(seen)
    after = client.get("/state").json()
    assert after["gallery"] != before["gallery"]
    assert [one["name"] for one in after["galleries"]] == ["first", "second"]
    own = added.known([0])[0].sample_id
    manifest = open_manifest(demo_shards)
    row = manifest.take("train", [0])[0]
    images = dict(zip(("RGB", "NI", "TI"), row.images, strict=True))
    found = client.post("/search", files=fields(images)).json()["results"][0]
    assert (found["sample_id"], found["gallery"]) == (own, added.digest)


def test_a_new_version_of_the_model_is_taken_when_its_galleries_are_all_there(
    service, client, place, sample, trained_checkpoint, monkeypatch, capsys
):
    images, _, pid = sample
    before = client.get("/health/ready").json()
    newer = other_version(trained_checkpoint, place / "newer")
    shutil.move(place / "model", place / "older")
    shutil.move(newer, place / "model")
    until(lambda: "are not embedded by it yet" in (client.get("/state").json()["trouble"] or ""))
    assert client.get("/health/ready").json() == before
    seen, over = [], threading.Event()

    def ask() -> None:
        with service.client() as other:
            while not over.is_set():
                answer = other.post("/search", files=fields(images))
                assert answer.status_code == 200
                body = answer.json()
                assert body["results"][0]["pid"] == pid
                seen.append((body["model"], body["gallery"], body["rows"]))

    with ThreadPoolExecutor(1) as thread:
        asking = thread.submit(ask)
        try:
            words = ("--again", place / "galleries", "--model", place / "model")
            monkeypatch.setattr(sys, "argv", ["embed.py", *map(str, words)])
            with pytest.raises(SystemExit) as end:
                runpy.run_path(str(ROOT / "jobs" / "embed.py"), run_name="__main__")
            assert end.value.code == 0, capsys.readouterr().err

            def switched() -> bool:
                found = {client.get("/health/ready").json()["model"] for _ in range(8)}
                return before["model"] not in found

            until(switched)
        finally:
            over.set()
        asking.result()
    assert len({model for model, _, _ in seen}) == 2
    assert len(set(seen)) == 2, "a model answers with its own galleries alone"
    until(lambda: client.get("/state").json()["trouble"] is None)
    galleries = open_galleries(place / "galleries")
    assert len(galleries) == 4
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "jobs" / "embed.py"), run_name="__main__")
    assert end.value.code == 2
    assert "has nothing that this model did not embed yet" in capsys.readouterr().err


def test_a_service_that_is_stopped_answers_what_is_in_flight_and_ends_with_code_75(service, sample):
    images, _, pid = sample
    request = httpx2.Request(
        "POST",
        f"{service.address}/search",
        files=fields(images),
        headers={"Authorization": f"Bearer {TOKEN}"},
    )
    body = request.read()
    head = f"POST /search HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n"
    head += f"Content-Type: {request.headers['content-type']}\r\nContent-Length: {len(body)}\r\n"
    port = int(service.address.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port), timeout=120) as flying:
        flying.sendall(head.encode() + b"Connection: close\r\n\r\n" + body[:100])
        time.sleep(1)
        service.process.send_signal(signal.SIGTERM)
        time.sleep(2)
        assert service.process.poll() is None, "it waits for the request"
        flying.sendall(body[100:])
        answer = b"".join(iter(lambda: flying.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 200")
    assert f'"pid":{pid},' in answer.decode()
    assert service.process.wait(timeout=120) == 75
    said = service.log.read_text().splitlines()[-1]
    assert said == "stopped; requests in flight were answered, and the same command goes on"
    require_free("127.0.0.1", port)
