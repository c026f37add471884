import http.server
import socket
import threading

import pytest

from next.tracking.delivery import presence


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(presence, "SILENT_SECONDS", 0.3)
    monkeypatch.setattr(presence, "_AGAIN_SECONDS", 0.1)


class Unwilling(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_error(500)

    def log_message(self, *args):
        pass


@pytest.mark.usefixtures("quick")
def test_a_server_that_takes_connections_and_says_nothing_is_silent_until_it_answers():
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        uri = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        assert not presence.is_silent(uri)
        assert not presence.hangs(uri), "it may be starting"
        presence.note_answer(uri)
        assert presence.hangs(uri)
        assert presence.is_silent(uri)
        with pytest.raises(ConnectionError, match=r"takes connections but does not answer; start"):
            presence.require_answer(uri)
    assert presence.answers(uri), "nobody is there any more, which is told at once"
    assert not presence.is_silent(uri)
    presence.note_start(uri)
    assert not presence.hangs(uri)


@pytest.mark.usefixtures("quick")
def test_an_error_is_an_answer():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Unwilling) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        assert presence.answers(f"http://127.0.0.1:{server.server_address[1]}")
        server.shutdown()
        thread.join()
