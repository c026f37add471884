"""Folders of this user in a temporary folder that others write, too."""

import os
import stat
import tempfile

import pytest

from next.temporary import own_temporary


@pytest.fixture
def name(monkeypatch, tmp_path) -> str:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return "next-trials"


def test_only_this_user_may_enter_it(name, tmp_path):
    folder = own_temporary(name)
    assert folder == tmp_path / f"next-trials-{os.getuid()}"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o755)  # as older versions made it
    assert stat.S_IMODE(own_temporary(name).stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o770, 0o702])
def test_one_that_others_may_have_written_is_refused(name, mode):
    own_temporary(name).chmod(mode)
    with pytest.raises(PermissionError, match=r"must be a folder that only user \d+ may write, bu"):
        own_temporary(name)


def test_one_of_another_user_or_a_link_is_refused(name, tmp_path):
    folder = own_temporary(name)
    os.chown(folder, 12345, -1)
    with pytest.raises(PermissionError, match=r"belongs to user 12345 with mode drwx------; remov"):
        own_temporary(name)
    folder.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PermissionError, match="with mode lrwxrwxrwx"):
        own_temporary(name)
