"""Files that are either whole or absent, and folders that one process has to itself."""

import contextlib
import json
import math
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from sast_jax.errors import UserError, warn

LOCK = ".lock"

MAX_JSON_BYTES = 64 * 2**20
"""What a run writes stays far below; a larger file is not of a run, and reading it could take all memory."""


def cache_dir() -> Path:
    """Folder of the cache: the environment variable `SAST_JAX_CACHE`, else `~/.cache/sast_jax`."""
    return Path(os.path.expanduser(os.environ.get("SAST_JAX_CACHE") or "~/.cache/sast_jax"))


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Opens a temporary file that takes the name `path` once the block ends without an error.

    The bytes are on disk before the rename, so a reader sees the old file, none, or the whole new one; two writers at
    once do not disturb each other, and the last one stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as JSON, whole or not at all; a number that is not finite is refused."""
    text = json.dumps(value, indent=2, allow_nan=False)
    with atomic_write(path) as file:
        file.write(text.encode() + b"\n")


def read_json(path: Path) -> Any:
    """Returns the content of a JSON file.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is no JSON, or larger than `MAX_JSON_BYTES`.
        OSError: If it cannot be read.
    """
    if path.exists() and not path.is_file():  # Opening a pipe would wait for its writer.
        raise OSError("it is no file")
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise ValueError(f"it has {size} bytes; {MAX_JSON_BYTES} are allowed")
    return parse_json(path.read_bytes())


def parse_json(text: bytes) -> Any:
    """Returns the value of a JSON text in UTF-8, in which all numbers are finite.

    Raises:
        ValueError: If it is no such text.
    """
    try:
        return json.loads(text.decode(), parse_constant=_refuse_number, parse_float=_finite)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _refuse_number(word):
    raise ValueError(f"it holds {word}, which is no JSON")


def _finite(word):
    value = float(word)
    if math.isinf(value):
        raise ValueError(f"it holds {word[:30]}, which is too large a number")
    return value


@contextlib.contextmanager
def only_process(folder: Path) -> Iterator[None]:
    """Keeps a folder for this process until the block ends, or the process does, in whatever way.

    The lock is the system's (`flock` on a file in the folder), so a process that is killed leaves none behind. On network
    file systems it holds between hosts where their lock service runs; where there is none a warning says so.

    Args:
        folder: Made if missing.

    Raises:
        UserError: If another process has it, naming that one, or if the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a+")
    except OSError as error:
        raise UserError(f"--workdir: cannot write to {str(folder)!r}: {error}") from error
    with file:
        _lock(file, folder)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _lock(file: TextIO, folder: Path) -> None:
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise UserError(
            f"--workdir: {str(folder)!r} is in use by {file.read(200) or 'another process'}; wait for it, stop it, or choose "
            "another folder"
        ) from None
    except (ImportError, OSError) as error:
        warn(f"--workdir: {str(folder)!r} cannot be locked here ({error}); let no second process train in it")
