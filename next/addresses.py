"""Addresses of servers and stores: parsed, told and checked in one place.

An address is logged, written to files, sent to workers and shown on pages, so it must hold no
secret. One that does is refused before anything is written, and what to use instead is named;
:func:`redacted` is how an address is repeated in a message.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
import urllib.request
from urllib.parse import SplitResult, parse_qsl, urlsplit

STORE_OPTIONS = ("endpoint_override", "scheme", "region")
"""What may follow the question mark of ``s3://bucket/prefix``."""
_STORES = ("s3", "gs", "gcs", "file")
"""Arrow knows more; of those some abort the process (``abfs``), and none is tested."""
_TRACKING = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN,"
_GOOGLE = "GOOGLE_APPLICATION_CREDENTIALS"
_INSTEAD = {
    "http": _TRACKING,
    "https": _TRACKING,
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": _GOOGLE,
    "gcs": _GOOGLE,
}
"""Environment variables that hold the secrets of each kind of server."""
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://\S*")
_PLAIN = re.compile(r"[\w.:/\[\]-]*")
"""What a store's option may be; one that is encoded may hold a secret."""
_HIDDEN = "***"


def is_address(text: str) -> bool:
    """Whether a text is an address and no local path."""
    return "://" in text


def redacted(text: str) -> str:
    """A text whose addresses say no user, no password, and no parameter but a store's options.

    A text that begins with an address is one address to its end, whatever stands in it.
    """
    if _ADDRESS.match(text):
        return _redacted(text)
    return _ADDRESS.sub(lambda found: _redacted(found[0]), text)


def require_no_secret(address: str, name: str = "", *, instead: str | None = None) -> None:
    """Refuse an address that holds a user, a password or a key; a local path is fine.

    Args:
        address: what was given.
        name: the setting, flag or variable that it was given by; empty: the caller says it.
        instead: how the server is told secrets; None: as its kind of server is.

    Raises:
        ValueError: it holds one; the message does not repeat it.
    """
    if not is_address(address):
        return
    parts = _split(address)
    if parts is None or _holds_secret(parts):
        scheme = address.partition("://")[0].lower()
        how = instead or _INSTEAD.get(scheme, "the environment variables of that server")
        raise ValueError(
            f"{name} must hold no user, no password and no key, since it is logged and written to "
            f"files, but got {redacted(address)}; set {how} instead".lstrip()
        )


def require_store(address: str, name: str = "") -> None:
    """Refuse what is neither a local path nor the URI of a store that is known; as above.

    Raises:
        ValueError: it holds a secret, or its scheme or one of its options is not known.
    """
    require_no_secret(address, name)
    if not is_address(address):
        return
    parts, shown = urlsplit(address), redacted(address)
    if parts.scheme not in _STORES:
        raise ValueError(
            f"{name} must be a local path or an s3:// URI, but got {shown}; a store of another "
            f"kind is given by its S3 endpoint (s3://bucket/prefix?endpoint_override=HOST), or "
            f"mounted as a folder".lstrip()
        )
    for option, _ in parse_qsl(parts.query, keep_blank_values=True):
        if parts.scheme == "s3" and option not in STORE_OPTIONS:
            close = difflib.get_close_matches(option, STORE_OPTIONS, 1, 0.4) or STORE_OPTIONS
            raise ValueError(
                f"{name} must have no options but {', '.join(STORE_OPTIONS)}, but got {option!r} "
                f"in {shown}; did you mean {close[0]}?".lstrip()
            )


def server_address(address: str, name: str = "", *, instead: str | None = None) -> str:
    """The ``http(s)://`` address of a server, without a slash at its end; as above.

    Raises:
        ValueError: it is no such address, or holds a secret.
    """
    require_no_secret(address, name, instead=instead)
    parts = _split(address)
    if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(
            f"{name} must be an http:// or https:// address, but got {redacted(address)!r}".lstrip()
        )
    return address.rstrip("/")


def tracking_uri(address: str) -> str:
    """An address of MLflow, as ``tracking.uri`` may name it; as :func:`server_address`.

    Raises:
        ValueError: it is no such address, or holds a secret.
    """
    try:
        return server_address(address, "tracking.uri")
    except ValueError as error:
        raise ValueError(
            f"{error}; leave it unset to get a local server (workers never open a database file)"
        ) from None


def is_loopback(address: str) -> bool:
    """Whether a server's address means this machine and no other."""
    host = urlsplit(address).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def reach_directly(address: str) -> None:
    """Let this process, and what it starts, reach a server on loopback without a proxy.

    A proxy of the environment (``http_proxy``) is another machine, whose loopback is another one.
    Whoever asks is told by ``no_proxy``, as libraries read it in small letters or in capitals.
    """
    proxies = urllib.request.getproxies_environment()
    if not (proxies.keys() - {"no"}) or not is_loopback(address):
        return
    spared = [host.strip() for host in proxies.get("no", "").split(",") if host.strip()]
    host = str(urlsplit(address).hostname)
    if "*" not in spared and host not in spared:
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join([*spared, host])


def _split(address: str) -> SplitResult | None:
    """None: it cannot be parsed, as where a password holds what an address may not."""
    try:
        parts = urlsplit(address)
        _ = parts.port
    except ValueError:
        return None
    return parts


def _holds_secret(parts: SplitResult) -> bool:
    if parts.scheme in ("http", "https"):
        return "@" in parts.geturl() or bool(parts.query or parts.fragment)
    if "@" in parts.netloc or ":" in parts.netloc:  # no bucket has a colon
        return True
    return any("@" in value for _, value in parse_qsl(parts.query, keep_blank_values=True))


def _redacted(address: str) -> str:
    scheme, _, rest = address.partition("://")
    # A password may hold anything, so all is hidden up to the last sign of its end.
    before, _, after = rest.rpartition("@")
    place, question, query = after.partition("#")[0].partition("?")
    shown = []
    for pair in query.split("&") if question else []:
        option, equals, value = pair.partition("=")
        plain = option in STORE_OPTIONS and _PLAIN.fullmatch(value)
        shown.append(f"{option}={value if plain else _HIDDEN}" if equals else _HIDDEN)
    tail = f"?{'&'.join(shown)}" if shown else ""
    return f"{scheme}://{_HIDDEN + '@' if before else ''}{place}{tail}"
