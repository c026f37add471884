"""moto's server on a disk that can fill up: ``ADDRESS PORT FULL``.

While the file FULL exists, nothing is written any more, as MinIO says it (``XMinioStorageFull``).
"""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import moto.server

_ANSWER = (
    b"<Error><Code>XMinioStorageFull</Code><Message>Storage backend has reached its minimum free "
    b"drive threshold. Please delete a few objects to proceed.</Message></Error>"
)


def main(address: str, port: str, full: str) -> None:
    """Serve until the process is ended."""

    class Application(moto.server.DomainDispatcherApplication):
        def __call__(self, request: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
            if request["REQUEST_METHOD"] in ("PUT", "POST") and Path(full).exists():
                request["wsgi.input"].read(int(request.get("CONTENT_LENGTH") or 0))
                start("507 Insufficient Storage", [("Content-Type", "application/xml")])
                return [_ANSWER]
            return super().__call__(request, start)

    moto.server.DomainDispatcherApplication = Application
    moto.server.main(["-H", address, "-p", port])


if __name__ == "__main__":
    main(*sys.argv[1:])
