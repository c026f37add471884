"""Folders of this user in the temporary folder, which every user of the machine may write.

Needs nothing else of the project: what starts processes by the hundred imports it.
"""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

TRIALS = "next-trials"
"""Name of the folder in which trials work that are not on the driver's machine."""


def own_temporary(name: str) -> Path:
    """``/tmp/NAME-UID``, made if it is missing; only this user may enter it.

    One that this user has made more open, as older versions did, is closed.

    Args:
        name: of the folder, without the user.

    Raises:
        PermissionError: it is another user's, or others may have written in it.
    """
    user = os.getuid()
    folder = Path(tempfile.gettempdir()) / f"{name}-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != user or found.st_mode & 0o022:
        raise PermissionError(
            f"{folder} must be a folder that only user {user} may write, but it belongs to user "
            f"{found.st_uid} with mode {stat.filemode(found.st_mode)}; remove it"
        )
    if found.st_mode & 0o077:
        folder.chmod(0o700)
    return folder
