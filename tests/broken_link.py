"""A way to a server on loopback that breaks at chosen requests."""

import contextlib
import re
import socket
import threading
from collections.abc import Iterator

_REQUEST = re.compile(rb"(?:GET|HEAD|PUT|POST|DELETE) \S+ HTTP")


@contextlib.contextmanager
def broken_link(port: int, breaks_at: str) -> Iterator[int]:
    """The port of a forwarder to ``port`` that hangs up on every request of this pattern."""
    pattern, sockets = re.compile(breaks_at.encode()), []

    def forward(source: socket.socket, target: socket.socket, *, watched: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                request = _REQUEST.match(data) if watched else None
                if request and pattern.search(request[0]):
                    break
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection(("127.0.0.1", port))
                sockets.extend((near, far))
                for ends, watched in (((near, far), True), ((far, near), False)):
                    threads.append(
                        threading.Thread(target=forward, args=ends, kwargs={"watched": watched})
                    )
                    threads[-1].start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threads = [threading.Thread(target=accept)]
        threads[0].start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            threads[0].join()
            for each in sockets:
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join()
            for each in sockets:
                each.close()
