"""Folders on this machine or in an object store, read and written the same way.

``s3://bucket/prefix`` is any server that speaks S3. Credentials, region and endpoint come from the
environment as every AWS tool reads them (``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``,
``AWS_SESSION_TOKEN``, ``AWS_REGION``, ``AWS_ENDPOINT_URL``, the files in ``~/.aws``); endpoint and
region also from the URI: ``s3://bucket/prefix?endpoint_override=host:9000&scheme=http&region=x``.

What can be relied on:

* A **file** appears whole, under its name, or not at all, and until then the older one stays:
  locally by a draft beside it and a rename (:func:`drafting`; :func:`replacing` and
  :func:`write_whole` for files that are written piece by piece or at once), in an object store
  because an object is there only when its upload is complete. An upload that fails is never
  completed; what was sent of it is no object, and goes when the bucket's rule for incomplete
  uploads says so.
* What has its name is on the disk: a power cut leaves the older one or the new one. Drafts are
  told apart from those of other threads, processes and machines, so two may write one file: both
  succeed, and the later one stays.
* A **folder** appears whole only on this machine (:func:`drafting`). An object store knows no
  folders and cannot rename them, so whoever writes several files writes last the one that says
  that the others are there (a manifest, a marker; ``last`` of :meth:`Folder.upload`), and whoever
  reads looks for that one first.
* Nothing waits for long: an endpoint that does not answer is an error within a minute.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import parse_qsl, urlencode, urlsplit

import pyarrow as pa
import pyarrow.fs

from next.addresses import is_address, redacted, require_no_secret, require_store
from next.config import near_matches

CONNECT_SECONDS = 5.0
"""How long a connection may take."""
SILENT_SECONDS = 15.0
"""How long a server may say nothing."""
ATTEMPTS = 3
"""How often a request is tried in all."""
THREADS = 8
"""Files that are copied at a time."""
_BLOCK = 8 * 2**20
_DRAFT = re.compile(r"\..+\.[0-9a-f]{32}\.partial", re.DOTALL)
_MOUNTS = Path("/proc/self/mountinfo")
_NETWORK = frozenset(
    (
        *("nfs", "nfs4", "cifs", "smb3", "smbfs", "ceph", "glusterfs", "lustre", "gpfs", "beegfs"),
        *("afs", "9p", "virtiofs", "fuse"),
    )
)
"""Beside all of FUSE, by which buckets and other machines are mounted. ``9p`` and ``virtiofs`` are
folders of the machine that this virtual one runs on."""
_FULL = {
    errno.EFBIG: "it is larger than a file may be here; raise the limit (ulimit -f), or write to "
    "another file system",
    errno.ENOSPC: "the disk is full; make room, or write elsewhere",
    errno.EDQUOT: "the quota is used up; make room, or write elsewhere",
}
_KEYS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
_REFUSED = ("ACCESS_DENIED", "SIGNATURE_DOES_NOT_MATCH", "INVALID_ACCESS_KEY_ID", "EXPIRED_TOKEN")
"""Arrow's names for what a server says to credentials, in the order of rising precision."""


@dataclass(frozen=True)
class Folder:
    """A local folder or the prefix of an object store; paths below it have forward slashes.

    All methods raise, beside what they name:

    * ``FileNotFoundError``: the bucket does not exist;
    * ``PermissionError``: credentials are refused, or do not allow it, or the folder is read-only;
    * ``ConnectionError``: the endpoint cannot be reached or does not answer.
    """

    filesystem: Any
    """``pyarrow.fs.FileSystem``."""
    base: str
    """Path on that file system."""
    uri: str
    """How the folder is named to users: an absolute path or ``s3://bucket/prefix``."""
    options: str = ""
    """Endpoint and region of an object store, as they follow a URI's question mark."""

    @property
    def is_local(self) -> bool:
        """Whether it lies on this machine (or looks so: a mounted share), so that paths work."""
        return isinstance(self.filesystem, pa.fs.LocalFileSystem)

    @property
    def address(self) -> str:
        """What :func:`open_folder` opens this folder from, on any machine that sees it."""
        return f"{self.uri}?{self.options}" if self.options else self.uri

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as its address, without credentials: who unpickles it brings their own."""
        return open_folder, (self.address,)

    def below(self, path: str) -> Folder:
        """The folder at a path below this one."""
        return Folder(self.filesystem, self._path(path), f"{self.uri}/{path}", self.options)

    def walk(self, below: str = "") -> dict[str, int]:
        """Size in bytes of each file at any depth of a folder, by path from there, sorted.

        Raises:
            FileNotFoundError: there is no such folder; the message names its neighbours.
        """
        return {path: info.size for path, info in self.infos(below).items()}

    def infos(self, below: str = "", *, deep: bool = True) -> dict[str, Any]:
        """The same with ``pyarrow.fs.FileInfo``: ``size`` and ``mtime_ns``.

        Args:
            below: folder to look into.
            deep: at any depth, or files directly in it alone.
        """
        root = self._path(below)
        with self._errors(below):
            try:
                found = self.filesystem.get_file_info(pa.fs.FileSelector(root, recursive=deep))
            except (FileNotFoundError, NotADirectoryError):
                raise FileNotFoundError(
                    f"{self._name(below)}: there is no such folder{self._neighbours(below)}"
                ) from None
        prefix = len(root.rstrip("/")) + 1
        try:
            files = sorted(((info.path, info) for info in found if info.is_file), key=itemgetter(0))
        except UnicodeDecodeError:
            raise self._misnamed(below) from None
        return {path[prefix:]: info for path, info in files}

    def names(self, below: str = "") -> list[str]:
        """Files and folders directly in a folder, sorted; none if there is no such folder."""
        with self._errors(below):
            try:
                found = self.filesystem.get_file_info(pa.fs.FileSelector(self._path(below)))
            except FileNotFoundError:  # with allow_not_found a missing bucket would be none, too
                return []
        try:
            return sorted(info.base_name for info in found)
        except UnicodeDecodeError:
            raise self._misnamed(below) from None

    def size(self, path: str) -> int | None:
        """Bytes of a file; None: there is no such file."""
        with self._errors(path):
            info = self.filesystem.get_file_info(self._path(path))
        return int(info.size) if info.is_file else None

    def read(self, path: str) -> bytes:
        """The bytes of a file.

        Raises:
            FileNotFoundError: there is no such file; the message names its neighbours.
        """
        with self.opened(path) as file:
            data: bytes = file.read()
        return data

    @contextmanager
    def opened(self, path: str) -> Iterator[Any]:
        """A file to read from in any order, as ``pyarrow.NativeFile``.

        Raises:
            FileNotFoundError: there is no such file; the message names its neighbours.
        """
        with self._errors(path):
            try:
                file = self.filesystem.open_input_file(self._path(path))
            except FileNotFoundError:
                raise FileNotFoundError(
                    f"{self._name(path)}: there is no such file{self._neighbours(path)}"
                ) from None
            with file:
                yield file

    @contextmanager
    def writing(self, path: str) -> Iterator[Any]:
        """A file to write to; it appears at the end of the block, whole, or not at all.

        An older one of its name is replaced. Nothing of what a failed block wrote is left.
        """
        with self._errors(path, writing=True), self._replacing(path) as file:
            yield file

    def write(self, path: str, data: bytes) -> None:
        """Write a file, whole or not at all; an older one of its name is replaced."""
        with self.writing(path) as file:
            file.write(data)

    def require_writable(self) -> None:
        """Write and remove a file, so that work that could not be kept is not begun."""
        probe = f".writable-{uuid.uuid4().hex}"
        with self._errors("", writing=True), self._replacing(probe) as file:
            file.write(b"")
        self.delete(probe)

    def delete(self, path: str) -> None:
        """Remove a file; none of that name is no error."""
        with self._errors(path, writing=True):
            try:
                self.filesystem.delete_file(self._path(path))
            except FileNotFoundError:
                return

    def delete_tree(self, below: str = "") -> None:
        """Remove a folder and all in it; none of that name is no error.

        In an object store the files go one by one: remove first the one that says that the others
        are there.
        """
        with self._errors(below, writing=True):
            try:
                if self.is_local:
                    shutil.rmtree(self._path(below))
                else:
                    self.filesystem.delete_dir(self._path(below))
            except FileNotFoundError:
                return

    def upload(self, source: str | Path, path: str) -> None:
        """Copy one local file, whole or not at all."""
        # Not with pyarrow.fs.copy_files: it hides errors of closing, such as a missing bucket.
        with open(source, "rb") as local, self.writing(path) as file:
            shutil.copyfileobj(local, file, _BLOCK)

    def move(self, suffix: str) -> bool:
        """Put all of this folder aside, as a folder beside it whose name ends in ``.suffix``.

        In an object store the files are copied there one by one, and only then removed here.

        Returns:
            Whether there was anything.
        """
        if self.is_local:
            if not Path(self.base).exists():
                return False
            Path(self.base).rename(f"{self.base}.{suffix}")
            return True
        if not self.names():
            return False
        paths = list(self.walk())
        with self._errors("", writing=True), ThreadPoolExecutor(THREADS) as pool:
            list(
                pool.map(
                    lambda path: self.filesystem.copy_file(
                        f"{self.base}/{path}", f"{self.base}.{suffix}/{path}"
                    ),
                    paths,
                )
            )
        self.delete_tree()
        return True

    def upload_tree(
        self, source: str | Path, below: str = "", *, last: Collection[str] = ()
    ) -> None:
        """Copy all files of a local folder, several at a time.

        Args:
            source: the local folder.
            below: folder to copy them to; files that are there already under other names stay.
            last: paths of files that are copied when all others are there.
        """
        paths = [
            file.relative_to(source).as_posix()
            for file in sorted(Path(source).rglob("*"))
            if file.is_file()
        ]
        target = self.below(below) if below else self
        with ThreadPoolExecutor(THREADS) as pool:
            first = [path for path in paths if path not in last]
            list(pool.map(lambda path: target.upload(Path(source, path), path), first))
        for path in paths:
            if path in last:
                target.upload(Path(source, path), path)

    def download_tree(self, below: str, target: str | Path) -> Path:
        """Copy a folder to this machine; it appears whole, by a rename, or not at all.

        Args:
            below: the folder to copy.
            target: local folder, which must not be there yet (or be empty).

        Raises:
            FileNotFoundError: there is no such folder; the message names its neighbours.
            OSError: the target is there and not empty, or cannot be written.
        """
        source = self.below(below) if below else self
        paths = list(self.walk(below))
        with drafting(target) as draft:
            draft.mkdir()

            def fetch(path: str) -> None:
                local = draft / path
                local.parent.mkdir(parents=True, exist_ok=True)
                with source.opened(path) as file:
                    file.download(str(local))

            with ThreadPoolExecutor(THREADS) as pool:
                list(pool.map(fetch, paths))
        return Path(target)

    @contextmanager
    def _replacing(self, path: str) -> Iterator[Any]:
        if self.is_local:
            with replacing(Path(self._path(path))) as local:
                yield local
            return
        file = self.filesystem.open_output_stream(self._path(path))
        try:
            yield file
            file.close()
        except BaseException:
            _abandon(file)
            raise

    def _path(self, path: str) -> str:
        return f"{self.base}/{path}" if path not in ("", ".") else self.base

    def _name(self, path: str) -> str:
        return f"{self.uri}/{path}" if path not in ("", ".") else self.uri

    def _neighbours(self, path: str) -> str:
        parent, _, name = path.rpartition("/")
        names = self.names(parent)
        close = near_matches(name, names)
        if close:
            return f"; did you mean {' or '.join(close)}?"
        return f"; beside it are {', '.join(names[:10])}" if names else "; its parent has no files"

    def _misnamed(self, below: str) -> ValueError:
        """Says which local name is not UTF-8, so that nothing can be called by it."""
        for folder, folders, files in os.walk(os.fsencode(self._path(below))):
            for name in (*folders, *files):
                try:
                    name.decode("utf-8")
                except UnicodeDecodeError:
                    shown = os.path.join(folder, name).decode("utf-8", "backslashreplace")
                    return ValueError(f"{shown}: the name is not UTF-8; rename it (convmv does)")
        return ValueError(f"{self._name(below)}: a name in it is not UTF-8; rename it")

    @contextmanager
    def _errors(self, path: str, *, writing: bool = False) -> Iterator[None]:
        """Says in the user's terms what Arrow and the system say in theirs."""
        try:
            yield
        except OSError as error:
            told = (
                _local_error(error, self._name(path), writing)
                if self.is_local
                else self._s3_error(error, self._name(path), writing)
            )
            if told is None:
                raise
            raise told from None

    def _s3_error(self, error: OSError, name: str, writing: bool) -> OSError | None:
        text = str(error)
        if "AWS Error" not in text:  # said already, by this folder or by one read from meanwhile
            return None
        bucket = self.base.partition("/")[0]
        if "NO_SUCH_BUCKET" in text:
            return FileNotFoundError(
                f"{name}: there is no bucket {bucket!r} on {self._endpoint()}; create it, or mend "
                f"the URI"
            )
        if "NETWORK_CONNECTION" in text or "REQUEST_TIMEOUT" in text:
            return ConnectionError(
                f"{name}: {self._endpoint()} cannot be reached "
                f"({text.rpartition('operation: ')[2].partition(';')[0]}); check AWS_ENDPOINT_URL "
                f"or endpoint_override, and that the server runs"
            )
        refused = [word for word in _REFUSED if word in text]
        if refused == ["ACCESS_DENIED"]:  # HEAD has no body to give the reason in; a list has
            refused += [word for word in _REFUSED[1:] if word in self._listing_error()]
        if refused == ["ACCESS_DENIED"] and writing:
            return PermissionError(
                f"{name} is read-only for these credentials; write elsewhere, or get the right to "
                f"write there"
            )
        if refused:
            return PermissionError(
                f"{name}: {self._endpoint()} refuses the credentials ({refused[-1]}); check "
                f"{_KEYS}, and that they may read the bucket"
            )
        return None

    def _listing_error(self) -> str:
        try:
            self.filesystem.get_file_info(pa.fs.FileSelector(self.base, allow_not_found=True))
        except OSError as error:
            return str(error)
        return ""

    def _endpoint(self) -> str:
        return _endpoint(dict(parse_qsl(self.options))) or "AWS"


def network_mount(path: str | Path) -> str | None:
    """Type of the network file system that a local path lies on, such as ``nfs4``; None: on none.

    The path need not exist yet.
    """
    real = Path(path).resolve()
    deepest, found = -1, ""
    for line in _MOUNTS.read_text(encoding="utf-8").splitlines() if _MOUNTS.is_file() else ():
        before, _, after = line.partition(" - ")
        point = Path(before.split()[4].replace("\\040", " "))  # the kernel's way to write a blank
        if real.is_relative_to(point) and len(point.parts) >= deepest:  # the later one hides others
            deepest, found = len(point.parts), after.split()[0]
    return found if found in _NETWORK or found.startswith("fuse.") else None


def require_own_disk(path: str | Path, setting: str, what: str) -> None:
    """Raise if a database would lie on a foreign file system, where SQLite's log is not safe.

    Raises:
        ValueError: it would; with the setting that says where.
    """
    kind = network_mount(path)
    if kind is not None:
        raise ValueError(
            f"{setting} must be on a disk of this machine for {what}, which is an SQLite file with "
            f"a write-ahead log, but {path} is on a network file system ({kind}), where it is "
            f"damaged; give a local folder, and checkpoint.storage_path for what others must see"
        )


def open_folder(uri: str | Path) -> Folder:
    """A folder by local path or URI; that it exists shows when it is read.

    Raises:
        ValueError: the URI's scheme or one of its options is not known, or it holds credentials.
    """
    if isinstance(uri, str) and is_address(uri):
        require_store(uri)
        if uri.startswith("s3://"):
            return _open_s3(uri)
        try:
            filesystem, base = pa.fs.FileSystem.from_uri(uri)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{redacted(uri)} cannot be opened ({error})") from None
        local = isinstance(filesystem, pa.fs.LocalFileSystem)
        return Folder(filesystem, base.rstrip("/"), base if local else uri.rstrip("/"))
    path = os.path.abspath(os.path.expanduser(uri))
    return Folder(pa.fs.LocalFileSystem(), path, path)


def _open_s3(uri: str) -> Folder:
    parts = urlsplit(uri)
    if not parts.netloc:
        raise ValueError(f"{redacted(uri)}: a bucket is needed, as in s3://bucket/prefix")
    options = dict(parse_qsl(parts.query))
    endpoint = _endpoint(options)
    scheme, _, host = endpoint.rpartition("://")
    region = options.get("region") or os.environ.get("AWS_REGION")
    filesystem = pa.fs.S3FileSystem(
        endpoint_override=host or None,
        scheme=scheme or None,
        region=region,
        connect_timeout=CONNECT_SECONDS,
        request_timeout=SILENT_SECONDS,
        retry_strategy=pa.fs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
        allow_delayed_open=True,  # a small object is then one request and not three
    )
    place = f"{parts.netloc}{parts.path}".rstrip("/")
    # What this environment added is named too, so that the address means the same elsewhere.
    named = {"endpoint_override": endpoint, "region": region}
    query = urlencode({name: value for name, value in named.items() if value})
    return Folder(filesystem, place, f"s3://{place}", query)


def _endpoint(options: dict[str, str]) -> str:
    """The endpoint with its scheme; empty: AWS itself.

    Raises:
        ValueError: a variable of the environment gives one that holds a secret.
    """
    given = options.get("endpoint_override", "")
    for variable in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        if not given and (given := os.environ.get(variable, "")):
            require_no_secret(given, variable, instead=_KEYS)
    if not given or "://" in given:
        return given.rstrip("/")
    return f"{options.get('scheme', 'https')}://{given}".rstrip("/")


def _local_error(error: OSError, name: str, writing: bool) -> OSError | None:
    # No permission and a read-only file system are one thing to who wants to write there.
    if writing and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and error.filename:
        return PermissionError(
            f"{name} cannot be written ({error.strerror}); choose another folder, or get the right "
            f"to write there"
        )
    return None


def path_within(folder: str | Path, name: str) -> Path:
    """The path of a file that something which may come from others names in a local folder.

    Raises:
        ValueError: it leads out of the folder: absolute, by ``..`` or through a link.
    """
    path, root = Path(folder) / name, Path(folder).resolve()
    if not path.resolve().is_relative_to(root):
        raise ValueError(
            f"{name!r} must name a file within {folder}, but leads out of it; it is not opened"
        )
    return path


def is_draft(name: str) -> bool:
    """Whether a file or folder of this name is a draft of :func:`drafting`."""
    return _DRAFT.fullmatch(name) is not None


def commit(draft: Path, target: Path, *, over: bool = False, private: bool = False) -> None:
    """Bring a finished draft to the disk and give it the name of ``target``.

    :func:`drafting` does it at the end of its block; this is for drafts whose names are fixed,
    because a second call goes on with them or a lock guards them.

    Args:
        draft: file, folder or link beside ``target``.
        target: an older file or link of this name is replaced.
        over: an older folder is replaced too. It cannot be at once: for a moment there is none.
        private: files keep the mode that they were made with; else others may read them as the
            umask says, whoever made them.

    Raises:
        OSError: the disk does not take it, or ``target`` is a folder that holds something.
    """
    _bring_to_disk(draft, private)
    if over and target.is_dir() and not target.is_symlink():
        aside = target.with_name(_draft_name(target))
        target.rename(aside)
        draft.rename(target)
        shutil.rmtree(aside, ignore_errors=True)
    else:
        draft.replace(target)
    _sync(target.parent)


@contextmanager
def drafting(path: str | Path, *, over: bool = False, private: bool = False) -> Iterator[Path]:
    """The name of a draft beside ``path``, which the block makes; it gets its name at the end.

    Nothing of what a failed block made is left, and until the end an older file stays.

    Args:
        path: of a local file, folder or link.
        over: as in :func:`commit`.
        private: as there.

    Raises:
        OSError: as :func:`commit`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(_draft_name(path))
    try:
        yield draft
        commit(draft, path, over=over, private=private)
    finally:
        if draft.is_dir() and not draft.is_symlink():
            shutil.rmtree(draft, ignore_errors=True)
        else:
            draft.unlink(missing_ok=True)


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A local file to write to; it appears at the end of the block, whole, or not at all."""
    try:
        with drafting(path) as draft, draft.open("wb") as file:
            yield file
    except OSError as error:
        if error.errno in _FULL and error.filename is None:  # the system names no file
            raise OSError(error.errno, _FULL[error.errno], str(path)) from None
        raise


def write_whole(path: str | Path, content: bytes | str) -> Path:
    """Write a local file by :func:`replacing`.

    Raises:
        OSError: the disk is full or not writable; an older file of this name is untouched.
    """
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)
    return Path(path)


def with_sum(content: Mapping[str, Any]) -> dict[str, Any]:
    """What is written as JSON or TOML, with the sha256 of what it means."""
    return {**content, "sha256": _sum(content)}


def without_sum(content: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`with_sum`; older versions wrote no sum, and are believed.

    Raises:
        ValueError: it is not what was written.
    """
    found = dict(content)
    own = found.pop("sha256", None)
    if own is not None and own != _sum(found):
        raise ValueError("it is not what was written (its sha256 differs)")
    return found


def _sum(content: Mapping[str, Any]) -> str:
    # Of what the text means: JSON gives back every number as it was.
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _abandon(file: Any) -> None:
    """Never close an upload: what was sent of it then never becomes an object.

    Arrow completes an upload when its stream is closed, and closes it when nobody refers to it any
    more; it has no other end for it. So one reference too many is kept until the process ends.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(file))


def _draft_name(path: Path) -> str:
    return f".{path.name}.{uuid.uuid4().hex}.partial"


def _bring_to_disk(draft: Path, private: bool = False) -> None:
    """Every byte and name of a file or folder; a link is a name of the folder that it is in."""
    if draft.is_symlink():
        return
    if draft.is_dir():
        for item in draft.iterdir():
            _bring_to_disk(item, private)
    elif not private:  # safetensors' files are the user's alone, whatever his umask says
        draft.chmod(draft.stat().st_mode | (0o666 & ~_umask()))
    _sync(draft)


def _umask() -> int:
    """Of this process; ``os.umask`` would change it to tell it, for all threads."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return 0o077
    [line] = [line for line in status.splitlines() if line.startswith("Umask:")]
    return int(line.split()[1], 8)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems (FUSE, CIFS) have nothing to bring for a folder, and say so.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)
