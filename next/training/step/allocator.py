"""Memory of the CPU that a step frees and takes again."""

from __future__ import annotations

import ctypes
import logging

_log = logging.getLogger(__name__)

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's malloc.h
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let this process keep the memory it frees, so that each step finds its blocks mapped.

    The activations of a full-size step are blocks of tens of megabytes, which glibc returns to the
    system when they are freed: the next step pays a page fault for every 4 KiB again. A GPU's
    memory is not concerned. Tensors that were freed no longer show as free memory of the machine.

    Returns:
        Whether the C library is glibc and took both settings.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        _log.warning("keep_memory needs glibc, which this system lacks; it is left out")
        return False
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, _NEVER))
