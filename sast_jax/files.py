"""Files that are either whole or absent, and folders that one process has to itself."""

import contextlib
import errno
import json
import math
import os
import secrets
import socket
import stat
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
    name = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)  # Less the umask, as any file of the user's.
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
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
    return parse_json(read_regular(path, MAX_JSON_BYTES))


def parse_json(text: bytes) -> Any:
    """Returns the value of a JSON text in UTF-8, in which all numbers are finite.

    Raises:
        ValueError: If it is no such text.
    """
    try:
        return json.loads(text.decode("utf-8-sig"), parse_constant=_refuse_number, parse_float=_finite)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _refuse_number(word):
    raise ValueError(f"it holds {word}, which is no JSON")


def _finite(word):
    value = float(word)
    if math.isinf(value):
        raise ValueError(f"it holds {word[:30]}, which is too large a number")
    return value


_SIDE_FILES = {"__macosx", "$recycle.bin", "desktop.ini", "thumbs.db"}


def is_side_file(name: str) -> bool:
    """Whether a file or folder of this name is the operating system's, or hidden, and none of the user's data."""
    return name.startswith(".") or name.lower() in _SIDE_FILES


def read_regular(path: Path, max_bytes: int) -> bytes:
    """Returns the content of a regular file, which is looked at before anything of it is read.

    Args:
        path: The file. A pipe would be waited for, and a device may have no end.
        max_bytes: The largest size; a sparse file has the size it claims.

    Raises:
        ValueError: If it is larger.
        OSError: If it is no regular file, or cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        status = os.fstat(descriptor)
        _check_regular(path, status, max_bytes)
        file = os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise
    with file:
        return file.read(status.st_size)  # Not `max_bytes`, for which `read` takes memory at once.


def check_regular(path: Path, max_bytes: int) -> None:
    """Raises what `read_regular` raises before it reads."""
    _check_regular(path, path.stat(), max_bytes)


def _check_regular(path, status, max_bytes):
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is no regular file, but a pipe, socket or device", str(path))
    if status.st_size > max_bytes:
        raise ValueError(f"it has {status.st_size} bytes; {max_bytes} are allowed")


def check_regular_tree(folder: Path, max_bytes: int, max_data_bytes: int, data: str) -> None:
    """Raises what `check_regular` raises for a file in a folder, at any depth, and names it.

    Args:
        folder: The folder.
        max_bytes: The largest size of a file.
        max_data_bytes: That of one in a folder named `data`.
        data: That name.
    """
    for path in folder.rglob("*"):
        if not path.is_dir():
            try:
                check_regular(path, max_data_bytes if path.parent.name == data else max_bytes)
            except ValueError as error:
                raise ValueError(f"{str(path.relative_to(folder))!r}: {error}") from error


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
