"""Where jax keeps compiled programs."""

import os
import warnings

from sast_jax.errors import UserError
from sast_jax.files import cache_dir

_SETTINGS = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}

_OWN = ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE")


def keep_compiled() -> bool:
    """Lets jax keep what it compiles in `compiled/` of the cache folder, and load it from there; before jax is imported.

    Programs are kept by their code, jax's version and the device, so a changed one is compiled anew. The folder may be removed
    at any time, and several processes may use it at once. jax compiles what it cannot read or write there, without a word.

    Returns:
        Whether it does; not if the environment already says something about jax's cache (`JAX_ENABLE_COMPILATION_CACHE=false`
        turns it off), or if the folder cannot be written.
    """
    if any(name in os.environ for name in _OWN):
        return False
    try:
        folder = cache_dir() / "compiled"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, UserError):  # Without a home folder there is no cache; who needs one says so.
        return False
    if not os.access(folder, os.W_OK):
        return False
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": str(folder.absolute()), **_SETTINGS}
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache")
    return True
