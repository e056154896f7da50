"""The C library's allocator, told to keep what it has."""

import ctypes

# Parameters of mallopt(3), from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Lets this process keep freed memory instead of returning it to the system.

    By default glibc gives every large buffer back when it is freed, and the next train step faults it in again, page by
    page. The process keeps its peak memory until it ends.

    Returns:
        Whether the C library took the settings; it must be glibc. Elsewhere nothing changes.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return all([mallopt(_M_MMAP_MAX, 0), mallopt(_M_TRIM_THRESHOLD, 2**31 - 1), mallopt(_M_ARENA_MAX, 1)])
