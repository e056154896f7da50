"""Where jax keeps compiled programs."""

import os
import stat
import warnings
from pathlib import Path

from sast_jax.files import cache_dir

_SETTINGS = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}

_OWN = ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE")


def keep_compiled() -> bool:
    """Lets jax keep what it compiles in `compiled/` of the cache folder, and load it from there; before jax is imported.

    Programs are kept by their code, jax's version and the device, so a changed one is compiled anew. A program that is loaded is
    run, so the folder is the user's own, with permissions for nobody else (mode 700, which a folder that is there is given). It
    may be removed at any time, and several processes may use it at once. jax compiles what it cannot read or write there, without
    a word.

    Returns:
        Whether it does; not if the environment already says something about jax's cache (`JAX_ENABLE_COMPILATION_CACHE=false`
        turns it off), or if the folder cannot be written, belongs to another user or cannot be made private.
    """
    if any(name in os.environ for name in _OWN):
        return False
    folder = cache_dir() / "compiled"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        if not _make_private(folder):
            return False
    except OSError:
        return False
    if not os.access(folder, os.W_OK):
        return False
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
