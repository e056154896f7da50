"""Where jax keeps compiled programs."""

import os
import stat
import time
import warnings
import zlib
from pathlib import Path

from sast_jax.errors import UserError, warn
from sast_jax.files import cache_dir

_SETTINGS = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}

_OWN = ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE")


def keep_compiled() -> bool:
    """Lets jax keep what it compiles in `compiled/` of the cache folder, and load it from there; before jax is imported.

    Programs are kept by their code, jax's version and the device, so a changed one is compiled anew. A program that is loaded is
    run, so the folder is the user's own, with permissions for nobody else (mode 700, which a folder that is there is given). It
    may be removed at any time, and several processes may use it at once. jax compiles what it cannot read or write there, without
    a word. It never replaces an entry, so one that a killed process cut off is removed here, and a warning says so.

    Returns:
        Whether it does; not if the environment already says something about jax's cache (`JAX_ENABLE_COMPILATION_CACHE=false`
        turns it off), or if the folder cannot be written, belongs to another user or cannot be made private.
    """
    if any(name in os.environ for name in _OWN):
        return False
    try:
        folder = cache_dir() / "compiled"
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        if not _make_private(folder):
            return False
    except (OSError, UserError):  # Without a home folder there is no cache; who needs one says so.
        return False
    if not os.access(folder, os.W_OK):
        return False
    if num_removed := remove_cut_off(folder):
        warn(f"{num_removed} compiled programs in {str(folder)!r} were cut off when a process was killed; they are compiled anew")
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": str(folder.absolute()), **_SETTINGS}
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache")
    return True


def _make_private(folder: Path) -> bool:
    """Takes all permissions of others from a folder; returns whether it is this user's."""
    if not hasattr(os, "geteuid"):  # Windows, where the user's own folder is private by its parents.
        return True
    status = folder.stat()
    if status.st_uid != os.geteuid():
        return False
    if stat.S_IMODE(status.st_mode) != 0o700:
        folder.chmod(0o700)
    return True


_CHECKED = ".checked"  # Its time of change: entries up to then have been looked at.
_SETTLED_SECONDS = 10.0  # A younger entry may be being written.


def remove_cut_off(folder: Path, now: float | None = None) -> int:
    """Removes the entries that end before their data do, and returns their number. Each entry is looked at once.

    Args:
        folder: Where jax keeps its entries, compressed by zlib. Those compressed otherwise stay.
        now: Time of the clock, `time.time()` if not given.
    """
    until = (time.time() if now is None else now) - _SETTLED_SECONDS
    marker, num_removed = folder / _CHECKED, 0
    try:
        since = marker.stat().st_mtime if marker.exists() else 0.0
        for entry in os.scandir(folder):
            if not entry.name.endswith("-cache") or not entry.is_file() or not since < entry.stat().st_mtime <= until:
                continue
            content = Path(entry.path).read_bytes()
            decompressor = zlib.decompressobj()
            try:
                decompressor.decompress(content)
                is_whole = decompressor.eof
            except zlib.error:
                is_whole = content[:1] != b"x"  # What every entry of zlib begins with.
            if not is_whole:
                os.unlink(entry.path)
                num_removed += 1
        marker.touch()
        os.utime(marker, (until, until))
    except OSError:
        pass  # Another process removed one, or the folder cannot be read: jax compiles what it lacks.
    return num_removed
