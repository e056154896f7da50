"""The C library's allocator, told to keep what it has, and XLA, told to ask it for what it can keep."""

import ctypes
import importlib.metadata
import importlib.util
import os

# Parameters of mallopt(3), from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8

MAX_IN_ARENA = 2**26
"""Bytes that a thread's own arena has in one piece (glibc's HEAP_MAX_SIZE); only the main arena has more."""

PIECE = 7 * 2**23
"""Bytes of temporary arrays that XLA allocates at once, unless a single one is larger; an arena holds other things, too."""

_TEMPORARY_ARRAYS = 4  # How many times the largest array all of a step together are, about.

_PIECES_FLAG = "--xla_multiheap_size_constraint_per_heap"
# First jaxlib of which it is not known whether it has this flag. XLA ends a process that sets a flag which it does not have.
_UNTESTED = 0, 13

_is_kept = False


def keep_freed_memory() -> bool:
    """Lets this process keep freed memory instead of returning it to the system; call it before jax uses any device.

    By default glibc gives every large buffer back when it is freed, and the next train step faults it in again, page by
    page. The process keeps its peak memory until it ends.

    Threads have arenas of their own, which is glibc's default: XLA's allocate within its operations, and with one arena for all
    they would search what others freed, and get memory that is in another core's cache. Such an arena can
    keep pieces of up to `MAX_IN_ARENA`, so XLA is told, in `XLA_FLAGS`, to allocate a program's temporary arrays in pieces; not
    if there may be an accelerator. A program of several pieces is not kept by jax's compilation cache, as XLA cannot write it
    down. For larger arrays there is `expect_array`.

    Returns:
        Whether the C library took the settings; it must be glibc. Elsewhere nothing changes.
    """
    global _is_kept
    settings = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: MAX_IN_ARENA}
    _is_kept = all(_set(*setting) for setting in settings.items())
    flags = os.environ.get("XLA_FLAGS", "")
    if _is_kept and _PIECES_FLAG not in flags and not _may_have_accelerator() and _jaxlib_version() < _UNTESTED:
        os.environ["XLA_FLAGS"] = f"{flags} {_PIECES_FLAG}={PIECE}"
    return _is_kept


def expect_array(num_bytes: int) -> None:
    """Prepares a process that keeps freed memory for the largest array of its programs; before jax uses any device.

    If it, or what is allocated with it, is more than the arena of a thread can keep, threads that start from now on share the
    main one, and nothing comes in pieces.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if _PIECES_FLAG not in flags:
        num_bytes *= _TEMPORARY_ARRAYS
    if _is_kept and num_bytes > PIECE:
        _set(_M_ARENA_MAX, 1)
        os.environ["XLA_FLAGS"] = flags.replace(f" {_PIECES_FLAG}={PIECE}", "")


def _set(parameter, value):
    try:
        return bool(ctypes.CDLL("libc.so.6").mallopt(parameter, value))
    except (OSError, AttributeError):
        return False


def _may_have_accelerator():
    platforms = os.environ.get("JAX_PLATFORMS")
    return platforms != "cpu" if platforms else any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))


def _jaxlib_version():
    major, minor, *_ = importlib.metadata.version("jaxlib").split(".")
    return int(major), int(minor)
