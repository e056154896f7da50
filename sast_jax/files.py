"""Where files lie, files that are either whole or absent, and folders that one process has to itself."""

import contextlib
import errno
import json
import math
import os
import re
import secrets
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from sast_jax.errors import UserError, warn

try:
    import fcntl
except ImportError:  # There is none on Windows.
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"

MAX_JSON_BYTES = 64 * 2**20
"""What a run writes stays far below; a larger file is not of a run, and reading it could take all memory."""

_HOLDER = "process "  # What the text of a lock file begins with.
_SUFFIX = re.compile(r"\.[a-z0-9_]{8}")  # Of the temporary files of `atomic_write`, also of earlier versions.
_NO_FOLLOWING = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)

# `scheme://` in any case; with one slash, as `pathlib` leaves it, those that a folder is unlikely to be called.
_URL = re.compile(r"[a-z][a-z0-9+.-]+://|(gs|gcs|s3|s3a|az|abfss?|hf|hdfs|file|https?|ftp|sftp|ssh):/", re.IGNORECASE)


def local_path(path: str | os.PathLike[str], name: str) -> Path:
    """Returns a path of the user's, with `~` expanded; the one rule for all folders and files that a user names.

    Args:
        path: As the user wrote it.
        name: What the user calls it, as `--workdir` or `warm_start`.

    Raises:
        UserError: If it is a URL, holds a null character, or begins with `~` and no home folder is known.
    """
    text = os.fspath(path)
    if _URL.match(text):
        raise UserError(
            f"{name}: must be a path on this machine; got the URL {text!r}. Give a local path, or that of the mounted storage"
        )
    if "\0" in text:
        raise UserError(f"{name}: must be a path; got {text!r}, with a null character")
    expanded = os.path.expanduser(text)
    if expanded.partition("/")[0] == "~" or (text.partition("/")[0] == "~" and not os.environ.get("HOME", "/")):
        raise UserError(f"{name}: {text!r} needs a home folder, and HOME is not set; set it, or give the whole path")
    return Path(expanded)


def cache_dir() -> Path:
    """Folder of the cache: the environment variable `SAST_JAX_CACHE`, else `~/.cache/sast_jax`.

    Raises:
        UserError: If the variable is a URL, or it is not set and no home folder is known.
    """
    chosen = os.environ.get("SAST_JAX_CACHE")
    if chosen:
        return local_path(chosen, "SAST_JAX_CACHE")
    try:
        return local_path("~/.cache/sast_jax", "cache")
    except UserError:
        raise UserError(
            "cache: no home folder is known, as HOME is not set; set the environment variable SAST_JAX_CACHE to a folder"
        ) from None


@contextlib.contextmanager
def atomic_write(path: Path, *, follow: bool = False) -> Iterator[BinaryIO]:
    """Opens a temporary file that takes the name `path` once the block ends without an error.

    The bytes are on disk before the rename, so a reader sees the old file, none, or the whole new one; two writers at
    once do not disturb each other, and the last one stays. What killed writers of that name have left behind is removed.

    Args:
        path: File to write; its folder is made if missing.
        follow: Whether a symbolic link is followed, to write what it points to, as for a file that the user has named. Files of
            a run folder, which may be another person's, are not.

    Raises:
        UserError: If there is something else than a regular file: a device, a pipe, a folder, or a link not to be followed.
        OSError: If it cannot be written; it names `path`.
    """
    path = Path(os.path.realpath(path)) if follow else path
    refuse_irregular(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary, descriptor = _open_temporary(path)
        with os.fdopen(descriptor, "wb") as file:  # Its lock tells others that its writer lives.
            yield file
            file.flush()
            os.fsync(file.fileno())
            if fcntl is None:  # Windows renames no open file.
                file.close()
            os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()
        if isinstance(error, OSError) and error.errno and error.filename in (None, str(temporary)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    remove_leftovers(path.parent, re.escape(path.name))


def refuse_irregular(path: Path) -> None:
    """Raises a `UserError` if there is something at `path` that is no regular file, or a link, even to one."""
    try:
        mode = path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFLNK: "a symbolic link", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(mode), "a device")
        raise UserError(
            f"{str(path)!r} is {kind}; only a regular file is written to. Choose another place, or move that elsewhere"
        )


def _open_temporary(path):
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | _NO_FOLLOWING, 0o666)
        _lock(descriptor)
        if temporary.exists():  # Else it was taken for a leftover just before it was locked.
            return temporary, descriptor
        os.close(descriptor)


def remove_leftovers(folder: Path, names: str) -> None:
    """Removes what killed writers have left behind in a folder, of files whose names match a regular expression."""
    pattern = re.compile(rf"\.(?:{names}){_SUFFIX.pattern}")
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        found = [entry.path for entry in entries if pattern.fullmatch(entry.name) and entry.is_file(follow_symlinks=False)]
        for path in found:
            with contextlib.suppress(OSError):
                descriptor = os.open(path, os.O_RDWR | _NO_FOLLOWING)
                try:
                    if _lock(descriptor):
                        os.unlink(path)
                finally:
                    os.close(descriptor)


def _lock(descriptor: int, *, wait: bool = False) -> bool:
    """Returns whether the file is now this process's own, until it is closed; false if another has it, or none can."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as JSON, whole or not at all; a number that is not finite is refused."""
    text = json.dumps(value, indent=2, allow_nan=False)
    with atomic_write(path) as file:
        file.write(text.encode() + b"\n")


def update_json(path: Path, change: Callable[[], Any]) -> Any:
    """Writes what `change` returns as JSON, while no other process does so in that folder; and returns it.

    `change` reads the file itself, so that nothing that another process has written meanwhile is lost.
    """
    with contextlib.ExitStack() as ending:
        if fcntl is not None:
            folder = os.open(path.parent, os.O_RDONLY)
            ending.callback(os.close, folder)
            _lock(folder, wait=True)  # For moments. Without locks, as on some network file systems, the last one wins.
        value = change()
        write_json(path, value)
    return value


def append_line(path: Path, text: str) -> None:
    """Appends a line to a regular file."""
    refuse_irregular(path)
    with open(path, "a", encoding="utf-8", opener=lambda name, flags: os.open(name, flags | _NO_FOLLOWING, 0o666)) as file:
        file.write(text + "\n")


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
        refuse_irregular(folder / LOCK)
        file = os.fdopen(os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | _NO_FOLLOWING, 0o666), "r+", errors="replace")
    except OSError as error:
        raise UserError(f"--workdir: cannot write to {str(folder)!r}: {error}") from error
    with file:
        try:
            if fcntl is None:
                raise OSError("this system has no file locks")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = file.read(200)
            holder = holder if holder.startswith(_HOLDER) else "another process"
            raise UserError(
                f"--workdir: {str(folder)!r} is in use by {holder}; wait for it, stop it, or choose another folder"
            ) from None
        except OSError as error:
            warn(f"--workdir: {str(folder)!r} cannot be locked here ({error}); let no second process train in it")
        holder = file.read(200)
        if not holder or holder.startswith(_HOLDER):  # Else it is another program's file, and stays as it is.
            file.seek(0)
            file.truncate(0)
            file.write(f"{_HOLDER}{os.getpid()} on {socket.gethostname()}")
            file.flush()
        yield
