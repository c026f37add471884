import platform
import socket
import subprocess

import pytest

from next.tracking.provenance import UNKNOWN, provenance_diff, provenance_tags


def git(folder, *arguments: str) -> str:
    identity = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.org"]
    done = subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True
    )
    return done.stdout.decode().strip()


@pytest.fixture
def source(tmp_path):
    """A file in a clean checkout of its own."""
    git(tmp_path, "init", "--quiet")
    source = tmp_path / "package" / "module.py"
    source.parent.mkdir()
    source.write_text("a = 1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    return source


def test_a_clean_checkout_gives_its_commit_and_no_diff(source):
    tags = provenance_tags(source)
    assert tags["git.commit"] == git(source.parent, "rev-parse", "HEAD")
    assert tags["git.dirty"] == "false"
    assert provenance_diff(source) == ""


def test_changes_are_told_and_can_be_applied_again(source, tmp_path):
    source.write_text("a = 1\n\nb = 2\n")
    (tmp_path / "new.py").write_text("")
    assert provenance_tags(source)["git.dirty"] == "true"
    diff = provenance_diff(source)
    assert "+b = 2" in diff
    assert "not under version control: new.py" in diff
    git(tmp_path, "checkout", "--quiet", ".")
    patch = tmp_path / "patch"
    patch.write_text(diff.partition("not under version control")[0])
    git(tmp_path, "apply", str(patch))
    assert source.read_text() == "a = 1\n\nb = 2\n"


def test_outside_a_checkout_the_commit_is_unknown(tmp_path):
    source = tmp_path / "module.py"
    source.write_text("")
    tags = provenance_tags(source)
    assert tags["git.commit"] == tags["git.dirty"] == UNKNOWN
    assert provenance_diff(source) == ""


def test_a_package_installed_inside_a_foreign_checkout_does_not_take_its_commit(source):
    installed = source.parent / ".venv" / "module.py"
    installed.parent.mkdir()
    installed.write_text("")
    assert provenance_tags(installed)["git.commit"] == UNKNOWN


def test_a_long_diff_is_cut_and_says_so(source):
    source.write_text("x" * 2_000_000)
    assert len(provenance_diff(source)) < 1_001_000
    assert "[cut: " in provenance_diff(source)


def test_tags_name_versions_and_hardware_but_no_machine():
    tags = provenance_tags()
    assert tags["version.python"] == platform.python_version()
    assert tags["version.torch"].startswith("2.")
    assert tags["version.mlflow"] != "none"
    assert int(tags["hardware.cores"]) >= 1
    assert float(tags["hardware.memory_gib"]) > 0
    assert all(tags.values())
    assert socket.gethostname() not in " ".join(tags.values()).split()
