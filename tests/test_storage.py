import errno
import gc
import os
import pickle
import re
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from next import storage
from next.storage import open_folder, path_within, replacing, write_whole
from tests.broken_link import broken_link


@pytest.fixture(params=["local", "s3"])
def folder(request, tmp_path):
    """A folder that does not exist yet, local or in a bucket."""
    if request.param == "local":
        return open_folder(tmp_path / "folder")
    return open_folder(request.getfixturevalue("s3") + "/folder")


def fill(folder, names=("b", "a", "sub/c")) -> None:
    for name in names:
        folder.write(name, name.encode())


def test_what_is_written_is_read_and_listed_the_same_everywhere(folder):
    fill(folder)
    assert folder.walk() == {"a": 1, "b": 1, "sub/c": 5}
    assert list(folder.walk()) == ["a", "b", "sub/c"]
    assert folder.walk("sub") == folder.below("sub").walk() == {"c": 5}
    assert folder.names() == ["a", "b", "sub"]
    assert folder.names("nowhere") == []
    assert folder.read("sub/c") == folder.below("sub").read("c") == b"sub/c"
    assert (folder.size("sub/c"), folder.size("sub"), folder.size("d")) == (5, None, None)
    with folder.opened("sub/c") as file:
        file.seek(4)
        assert file.read() == b"c"
    assert not folder.is_local or sorted(os.listdir(folder.base)) == ["a", "b", "sub"]


def test_a_file_is_replaced_whole(folder):
    folder.write("a", b"long content")
    folder.write("a", b"new")
    assert folder.read("a") == b"new"


def test_what_is_deleted_is_gone_and_deleting_it_again_is_no_error(folder):
    fill(folder)
    folder.delete("a")
    folder.delete("a")
    assert list(folder.walk()) == ["b", "sub/c"]
    folder.delete_tree("sub")
    folder.delete_tree("sub")
    assert folder.names() == ["b"]
    folder.delete_tree()
    assert folder.names() == []


def test_a_tree_goes_up_and_comes_down_again(folder, tmp_path):
    local = tmp_path / "local"
    fill(open_folder(local), ("manifest.json", "a", "sub/deep/c"))
    folder.write("copy/other", b"stays")
    folder.upload_tree(local, "copy", last=("manifest.json",))
    assert list(folder.walk("copy")) == ["a", "manifest.json", "other", "sub/deep/c"]
    back = folder.download_tree("copy", tmp_path / "back")
    assert {path.name for path in tmp_path.iterdir()} - {"folder"} == {"local", "back"}
    assert open_folder(back).walk() == folder.walk("copy")
    assert (back / "sub/deep/c").read_bytes() == b"sub/deep/c"


def test_the_marker_goes_up_last(folder, tmp_path, monkeypatch):
    local = tmp_path / "local"
    fill(open_folder(local), ("a-marker", "b", "c"))
    order = []
    upload = storage.Folder.upload
    monkeypatch.setattr(
        storage.Folder,
        "upload",
        lambda self, source, path: (order.append(path), upload(self, source, path)),
    )
    folder.upload_tree(local, last=("a-marker",))
    assert (sorted(order[:2]), order[2]) == (["b", "c"], "a-marker")


def test_a_download_that_fails_leaves_nothing(folder, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    fill(folder)
    with pytest.raises(OSError, match="taken"):
        folder.download_tree("", tmp_path / "taken")
    assert {path.name for path in tmp_path.iterdir()} - {"folder"} == {"taken"}
    assert (tmp_path / "taken" / "file").read_text() == "mine"


@pytest.mark.parametrize("size", [4, 12 * 2**20])
def test_a_file_whose_writing_is_interrupted_does_not_appear(folder, size):
    folder.write("b", b"")

    def write() -> None:
        with folder.writing("a") as file:
            file.write(bytes(size))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert folder.names() == ["b"]
    folder.write("a", b"old")
    with pytest.raises(KeyboardInterrupt):
        write()
    assert folder.read("a") == b"old", "the older one stays"
    assert folder.names() == ["a", "b"]


def test_an_interrupted_upload_does_not_appear_at_the_end_of_its_process_either(s3):
    """Arrow completes an upload whose stream is closed, also by the end of the interpreter."""
    code = (
        "import sys\n"
        "from next.storage import open_folder\n"
        "folder = open_folder(sys.argv[1])\n"
        "folder.write('a', b'old')\n"
        "with folder.writing('a') as file:\n"
        "    file.write(bytes(12 << 20))\n"
        "    raise OSError('the source is gone')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, s3], capture_output=True, text=True, check=False
    )
    assert "the source is gone" in done.stderr
    assert open_folder(s3).read("a") == b"old"


def test_a_folder_is_put_aside_whole(folder):
    fill(folder)
    assert folder.move("20260101")
    assert folder.names() == []
    assert not folder.move("again"), "there is nothing"
    beside = open_folder(f"{folder.uri}.20260101")
    assert beside.walk() == {"a": 1, "b": 1, "sub/c": 5}


def test_a_local_file_is_written_whole_or_not_at_all(tmp_path):
    path = write_whole(tmp_path / "sub" / "a", "text")
    assert path.read_text() == "text"

    def fail() -> None:
        with replacing(path) as file:
            file.write(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert path.read_text() == "text"
    assert os.listdir(path.parent) == ["a"], "no draft stays"


WRITER = """
import sys, threading
from next.storage import write_whole

def write(number):
    for _ in range(40):
        write_whole(sys.argv[1], (sys.argv[2] + str(number)) * 50_000)

print("ready", flush=True)
sys.stdin.readline()
threads = [threading.Thread(target=write, args=(number,)) for number in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


def test_threads_of_several_processes_write_one_file_at_once_and_all_succeed(tmp_path):
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path / "file"), letter], **pipes, text=True
        )
        for letter in "xy"
    ]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        _, problems = writer.communicate(timeout=120)
        assert (writer.returncode, problems) == (0, "")
    content = (tmp_path / "file").read_text()
    assert content == content[:2] * 50_000, "whole, and one writer's"
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_is_replaced_whole_where_that_is_asked_for(tmp_path):
    def write(text: str, *, over: bool = True, fail: bool = False) -> None:
        with storage.drafting(tmp_path / "tree", over=over) as draft:
            draft.mkdir()
            (draft / "a").write_text(text)
            if fail:
                raise KeyboardInterrupt

    write("1")
    write("2")
    with pytest.raises(KeyboardInterrupt):
        write("3", fail=True)
    with pytest.raises(OSError, match="tree"):
        write("3", over=False)
    assert open_folder(tmp_path).walk() == {"tree/a": 1}
    assert (tmp_path / "tree" / "a").read_text() == "2"


def test_a_link_is_replaced_and_what_it_names_stays(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "last").symlink_to("old")
    with storage.drafting(tmp_path / "last") as draft:
        draft.symlink_to("new")
    assert os.readlink(tmp_path / "last") == "new"
    assert sorted(os.listdir(tmp_path)) == ["last", "old"]


def test_a_draft_is_on_the_disk_before_it_gets_its_name_and_the_name_afterwards(
    tmp_path, monkeypatch
):
    happened = []
    fsync, replace = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        happened.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def renamed(path: Path, target: Path) -> Path:
        happened.append("renamed")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    with storage.drafting(tmp_path / "tree") as draft:
        draft.mkdir()
        (draft / "a").write_text("a")
    assert happened == [str(draft / "a"), str(draft), "renamed", str(tmp_path)]
    assert storage.is_draft(draft.name)
    assert not storage.is_draft("tree")


def test_a_download_leaves_the_draft_of_another_thread_alone(tmp_path, monkeypatch):
    source = open_folder(tmp_path / "source")
    fill(source, ("a", "b"))
    opened, begun, goes_on = storage.Folder.opened, threading.Event(), threading.Event()

    def slow(self, path):
        if not begun.is_set():
            begun.set()
            goes_on.wait(60)
        return opened(self, path)

    monkeypatch.setattr(storage.Folder, "opened", slow)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(source.download_tree, "", tmp_path / "first" / "copy")
        begun.wait(60)
        source.download_tree("", tmp_path / "first" / "copy")  # comes later, is done earlier
        goes_on.set()
        with pytest.raises(OSError, match="copy"):  # not "no such file": its draft is there
            first.result()
    assert isinstance(first.exception(), OSError)
    assert first.exception().errno == errno.ENOTEMPTY
    assert open_folder(tmp_path / "first").walk() == {"copy/a": 1, "copy/b": 1}


@pytest.mark.parametrize("request_", ["partNumber=2", "^POST .*uploadId"], ids=["part", "end"])
def test_an_upload_whose_connection_breaks_leaves_the_older_file(
    s3, s3_server, tmp_path, monkeypatch, request_
):
    (tmp_path / "new").write_bytes(bytes(18 * 2**20))
    monkeypatch.setattr(storage, "ATTEMPTS", 1)
    reader = open_folder(s3)
    reader.write("a", b"old")
    with broken_link(int(s3_server.endpoint.rpartition(":")[2]), request_) as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        with pytest.raises(ConnectionError, match=rf"/a: http://127.0.0.1:{port} cannot be rea"):
            open_folder(s3).upload(tmp_path / "new", "a")
        gc.collect()  # Arrow closes what nobody refers to any more
        assert (reader.names(), reader.read("a")) == (["a"], b"old")


def test_an_error_of_a_source_is_not_taken_for_one_of_the_destination(folder, s3, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    source = open_folder(f"{s3}/source")

    def copy() -> None:
        with folder.writing("a") as file:
            file.write(source.read("b"))

    with pytest.raises(PermissionError, match=r"/source/b: .*refuses the credentials"):
        copy()


def test_a_file_is_written_piece_by_piece(folder):
    with folder.writing("sub/a") as file:
        for piece in (b"x" * 6 * 2**20, b"y" * 6 * 2**20, b"z"):
            file.write(piece)
    assert folder.walk() == {"sub/a": 12 * 2**20 + 1}
    assert folder.read("sub/a")[-2:] == b"yz"


def test_a_missing_file_or_folder_is_named_with_its_neighbours(folder):
    fill(folder, ("train.json", "text/train_RGB.json"))
    with pytest.raises(FileNotFoundError, match=r"folder/trian\.json: .*did you mean train\.json"):
        folder.read("trian.json")
    with pytest.raises(FileNotFoundError, match=r"folder/tent: there is no such folder; did you"):
        folder.walk("tent")
    with pytest.raises(FileNotFoundError, match=r"no such file; its parent has no files"):
        folder.read("x/y/z")


def test_a_folder_is_pickled_without_credentials(folder):
    fill(folder)
    pickled = pickle.dumps(folder)
    assert os.environ.get("AWS_SECRET_ACCESS_KEY", "secret").encode() not in pickled
    assert pickle.loads(pickled).read("a") == b"a"


def test_a_pickled_folder_finds_the_endpoint_in_another_environment(s3, monkeypatch):
    fill(open_folder(s3))
    pickled = pickle.dumps(open_folder(s3))
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.delenv("AWS_REGION")
    assert pickle.loads(pickled).read("a") == b"a"


def test_a_folder_is_walked_through_links(tmp_path):
    fill(open_folder(tmp_path / "real"))
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert open_folder(tmp_path).walk("link") == {"a": 1, "b": 1, "sub/c": 5}
    assert list(open_folder(tmp_path / "link").walk(".")) == ["a", "b", "sub/c"]


def test_a_file_uri_is_a_local_folder(tmp_path):
    fill(open_folder(f"file://{tmp_path}"))
    assert open_folder(tmp_path).read("sub/c") == b"sub/c"


def test_the_endpoint_may_stand_in_the_uri(s3, s3_server, monkeypatch):
    fill(open_folder(s3))
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    host = s3_server.endpoint.removeprefix("http://")
    for query in (
        f"endpoint_override={host}&scheme=http",
        f"endpoint_override={s3_server.endpoint}&region=us-east-1",
    ):
        folder = open_folder(f"{s3}/sub?{query}")
        assert folder.read("c") == b"sub/c"
        assert folder.uri == f"{s3}/sub"
        assert pickle.loads(pickle.dumps(folder)).read("c") == b"sub/c"


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("ftps://x", r"must be a local path or an s3:// URI, but got ftps://x"),
        ("s3:///x", r"a bucket is needed, as in s3://bucket/prefix"),
        (
            "s3://b/x?endpoint=h",
            r"but got 'endpoint' in s3://b/x.*; did you mean endpoint_override\?",
        ),
        ("s3://key:topsecret@b/x", r"must hold no user.*, but got s3://\*\*\*@b/x; set AWS_"),
    ],
)
def test_a_uri_that_cannot_be_opened_is_refused(uri, message):
    with pytest.raises(ValueError, match=message) as refused:
        open_folder(uri)
    assert "topsecret" not in str(refused.value)


def every_method(folder, local: Path):
    """All ways to touch a folder."""
    local.mkdir(exist_ok=True)
    (local / "f").write_text("f")
    yield lambda: folder.read("a")
    yield lambda: folder.walk("a")
    yield lambda: folder.write("a", b"")
    yield lambda: folder.upload(local / "f", "a")
    yield lambda: folder.upload_tree(local, "a")
    yield folder.require_writable


def test_a_bucket_that_does_not_exist_is_named(s3, tmp_path):
    folder = open_folder("s3://no-such-bucket/prefix")
    for touch in every_method(folder, tmp_path / "up"):
        with pytest.raises(FileNotFoundError, match=r"no bucket 'no-such-bucket' on http://127"):
            touch()


def test_wrong_credentials_are_refused_by_name(s3, tmp_path, monkeypatch):
    fill(open_folder(s3))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    for touch in every_method(open_folder(s3), tmp_path / "up"):
        with pytest.raises(
            PermissionError, match=r"refuses the credentials \(SIGNATURE_DOES_NOT_MATCH\); check"
        ):
            touch()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    with pytest.raises(PermissionError, match=r"refuses the credentials \(INVALID_ACCESS_KEY_ID"):
        open_folder(s3).read("a")


def test_a_destination_that_may_only_be_read_is_said_to_be_so(s3, s3_server, tmp_path, monkeypatch):
    fill(open_folder(s3))
    for name, value in s3_server.new_user("s3:Get*", "s3:List*").items():
        monkeypatch.setenv(name, value)
    folder = open_folder(s3)
    assert folder.read("a") == b"a"
    with pytest.raises(PermissionError, match=r"/a is read-only for these credentials"):
        folder.write("a", b"")
    (tmp_path / "x").write_text("x")
    with pytest.raises(PermissionError, match=r"/x is read-only for these credentials"):
        folder.upload(tmp_path / "x", "x")
    with pytest.raises(PermissionError, match=r"is read-only for these credentials"):
        folder.require_writable()


def test_a_local_destination_that_cannot_be_written_is_said_to_be_so():
    folder = open_folder("/sys")  # nobody creates files there, not even root
    with pytest.raises(PermissionError, match=r"^/sys cannot be written .*choose another"):
        folder.require_writable()


def test_an_endpoint_that_refuses_or_says_nothing_is_an_error_soon(s3, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "SILENT_SECONDS", 1.0)
    monkeypatch.setattr(storage, "ATTEMPTS", 1)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        port = silent.getsockname()[1]
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        for touch in every_method(open_folder(s3), tmp_path / "up"):
            with pytest.raises(
                ConnectionError, match=rf"http://127.0.0.1:{port} cannot be reached"
            ):
                touch()
        silent.listen()
        with pytest.raises(ConnectionError, match=r"cannot be reached .*(slow|Timeout)"):
            open_folder(s3).read("a")


LIMITED = """
import resource, signal, sys
from next.storage import open_folder, write_whole
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    {call}
except OSError as error:
    sys.exit(f"{{type(error).__name__}}: {{error}}")
"""


@pytest.mark.parametrize(
    "call",
    ["write_whole(sys.argv[1], bytes(2000))", "open_folder(sys.argv[2]).write('one', bytes(2000))"],
)
def test_a_limit_on_the_size_of_files_names_the_file(tmp_path, call):
    words = [sys.executable, "-c", LIMITED.format(call=call), tmp_path / "one", tmp_path]
    told = subprocess.run(words, capture_output=True, text=True, encoding="utf-8", check=False)
    assert told.returncode == 1
    assert re.search(r"larger than a file may be here; raise the limit .*/one'?$", told.stderr)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ask", ["walk", "names"])
def test_a_local_name_that_is_not_utf_8_is_named(tmp_path, ask):
    (tmp_path / "deep").mkdir()
    Path(os.fsdecode(bytes(tmp_path / "deep") + b"/a\xff.txt")).write_bytes(b"")
    with pytest.raises(ValueError, match=r"/deep/a\\xff\.txt: the name is not UTF-8; rename it"):
        getattr(open_folder(tmp_path), ask)(*(["deep"] if ask == "names" else []))


@pytest.mark.parametrize("name", ["../other", "/etc/passwd", "a/../../other", "link/file", "a/up"])
def test_a_name_that_leads_out_of_a_folder_is_not_followed(tmp_path, name):
    own = tmp_path / "own"
    (own / "a").mkdir(parents=True)
    (own / "link").symlink_to(tmp_path)
    (own / "a" / "up").symlink_to("../../other")
    with pytest.raises(ValueError, match=r"must name a file within .*, but leads out of it; it is"):
        path_within(own, name)


def test_a_name_within_a_folder_may_go_through_links_that_stay_there(tmp_path):
    own = tmp_path / "own"
    (own / "a").mkdir(parents=True)
    (own / "link").symlink_to("a")
    (tmp_path / "too").symlink_to("own")
    for folder, name in ((own, "a/file"), (own, "link/file"), (tmp_path / "too", "a/../file")):
        assert path_within(folder, name) == folder / name


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_others_may_read_a_file_as_the_umask_says_whoever_wrote_it(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with storage.drafting(tmp_path / "weights") as draft:
            draft.touch(0o600)
        with storage.drafting(tmp_path / "folder") as draft:
            draft.mkdir()
            (draft / "weights").touch(0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "weights").stat().st_mode & 0o777 == mode
    assert (tmp_path / "folder" / "weights").stat().st_mode & 0o777 == mode


def test_a_private_file_is_never_readable_by_others(tmp_path, monkeypatch):
    monkeypatch.setattr("pathlib.Path.chmod", None)
    before = os.umask(0o022)
    try:
        with storage.drafting(tmp_path / "token", private=True) as draft:
            draft.touch(0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "token").stat().st_mode & 0o777 == 0o600
