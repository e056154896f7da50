"""States on disk."""

import asyncio
import contextlib
import errno
import gc
import hashlib
import logging
import math
import os
import re
import shutil
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sast_jax.config import is_default
from sast_jax.devices import is_first_host
from sast_jax.errors import UserError, refuse
from sast_jax.files import check_regular_tree, read_json
from sast_jax.training.state import TrainState

CHECKPOINTS = "checkpoints"

_NUM_KEPT = 2
_UNFINISHED = ".orbax-checkpoint-tmp"  # What orbax appends to the name of a folder until it is whole.


class Checkpoints:
    """Saves the checkpoints of a run: the last two are kept, each whole or absent.

    A checkpoint is the state (weights, optimizer state, step), the seconds of training it took and the run that it is of.
    Batches are functions of (seed, stream, step), so nothing else is needed to resume exactly. The first one that is saved is
    read back in the background; if that fails, training ends instead of going on to results that nothing can load. Only
    checkpoints that this run has written are removed when newer ones are there.
    """

    def __init__(self, workdir: Path, identity: dict[str, Any] | None = None):
        """Opens or creates the checkpoints of a run folder, and tries to write there.

        Args:
            workdir: Folder of the run.
            identity: What run it is, as JSON values, to be compared by `restore`.

        Raises:
            UserError: If nothing can be written there.
        """
        import orbax.checkpoint as ocp  # Slow to load, and not needed before there is a checkpoint.

        self._folder = (workdir / CHECKPOINTS).absolute()
        self._identity = identity or {}
        self._after_save: threading.Thread | None = None
        self._error: Exception | None = None
        self._is_proven = False
        with contextlib.ExitStack() as opening:
            opening.enter_context(_Quiet())
            self._write(lambda: _try_to_write(self._folder))
            self._safe_folder = self._write(lambda: opening.enter_context(_plain_path(self._folder)))
            # Not a manager of checkpoints, which would take every folder with a number for its own.
            # Folders are made at once, or threads would wait for minutes for one that could not be made.
            options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
            self._writer = self._write(lambda: ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), async_options=options))
            self._open = opening.pop_all()

    def save(self, state: TrainState, *, seconds: float) -> None:
        """Saves the state in the background, under its step; a step that is there already is not saved again.

        Raises:
            UserError: If this one or the last one could not be written, or the first one could not be read back.
        """
        import orbax.checkpoint as ocp

        self.wait()
        step = int(state.step)
        if (self._folder / str(step)).exists():
            return
        checksum = _checksum(state)
        meta = {"seconds": seconds, "checksum": checksum, "step": step, **self._identity}
        items = ocp.args.Composite(state=ocp.args.StandardSave(state.__dict__), meta=ocp.args.JsonSave(meta))
        self._write(lambda: self._writer.save(self._safe_folder / str(step), args=items))
        arrays = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), state.__dict__)  # Takes no memory yet.
        self._after_save = threading.Thread(target=self._settle, args=(step, arrays, checksum), name="after_save")
        self._after_save.start()

    def check(self) -> None:
        """Raises the `UserError` of a save that has failed in the background."""
        if self._after_save is not None and not self._after_save.is_alive():
            self.wait()

    def close(self) -> None:
        """Waits for the last save to be on disk.

        Raises:
            UserError: If it could not be written, or the first one could not be read back.
        """
        with self._open:
            try:
                self.wait()
            finally:
                self._write(self._writer.close)
                if is_first_host():
                    with contextlib.suppress(OSError):
                        _remove_unfinished(self._folder)

    def wait(self) -> None:
        """Waits for the last save to be on disk; as `close`, but more may be saved."""
        if self._after_save is not None:
            self._after_save.join()
            self._after_save = None
        self._write(self._raise_error)

    def _raise_error(self):
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _settle(self, step, arrays, checksum):
        try:
            self._writer.wait_until_finished()
            if is_first_host():
                if not self._is_proven:
                    self._prove(step, arrays, checksum)
                for old in _own_steps(self._folder, self._identity)[:-_NUM_KEPT]:
                    _remove(self._folder / str(old))
        except Exception as error:
            self._error = error

    def _prove(self, step, arrays, checksum):
        """Reads a checkpoint back."""
        path = self._folder / str(step)
        try:
            with _state_folder(path) as folder:
                is_same = _checksum(TrainState(**_read_arrays(folder, arrays))) == checksum
            reason = "" if is_same else "other numbers came back"
        except Exception as error:
            reason = _reason(error)
        if reason:
            raise UserError(
                f"--workdir: the checkpoint {str(path)!r} was written but cannot be read back ({reason}); training ended, as "
                "nothing could go on from there. Choose another --workdir, on another disk or of a simpler name"
            )
        self._is_proven = True

    def _write(self, write):
        try:
            return write()
        except UserError:
            raise
        except Exception as error:  # A full disk surfaces as whatever the writing library raises.
            reason, number = _reason(error), _errno(error)
        _collect_abandoned()
        advice = _ADVICE.get(number, "make room, or give the folder back its permissions").capitalize()
        raise UserError(
            f"--workdir: a checkpoint could not be written to {str(self._folder)!r} ({reason}); earlier ones are kept. {advice}, "
            "and the same command goes on from the last one"
        )


def _try_to_write(folder):
    folder.mkdir(parents=True, exist_ok=True)
    if is_first_host():
        _remove_unfinished(folder)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())


_ADVICE = {
    errno.EACCES: "give the folder back its permissions",
    errno.EPERM: "give the folder back its permissions",
    errno.EROFS: "make the disk writable",
    errno.EMFILE: "allow more open files (ulimit -n 4096)",
    errno.ENFILE: "close other programs, which have too many files open",
    errno.ENOENT: "move the folder back if it was moved",
    errno.ENOSPC: "make room on the disk",
    errno.EDQUOT: "make room, as the quota of the disk is used up",
    errno.EFBIG: "make room, or allow larger files (ulimit -f unlimited)",
}


def _remove_unfinished(folder):
    """Removes what a killed process has left behind; the caller has the run to itself."""
    for path in folder.iterdir():
        if re.fullmatch(rf"[0-9]+{re.escape(_UNFINISHED)}", path.name) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)


def _remove(path):
    unfinished = path.with_name(path.name + _UNFINISHED)  # So that a kill leaves no half that looks whole.
    path.rename(unfinished)
    shutil.rmtree(unfinished)


def _own_steps(folder, identity):
    """Steps of the checkpoints that a run has written under their names, in order; those of earlier versions do not tell."""

    def is_own(step):
        path = folder / str(step)
        with contextlib.suppress(OSError, ValueError):
            meta = read_json(path / "meta" / "metadata")
            is_complete = isinstance(meta, dict) and {"step", *identity} <= meta.keys() and not path.is_symlink()
            return is_complete and meta["step"] == step and not _other_run(meta, identity)

    return [step for step in _steps(folder) if is_own(step)]


def _steps(folder: Path) -> list[int]:
    names = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isascii() and name.isdigit() and name == str(int(name)))


def latest_step(workdir: Path) -> int | None:
    """Returns the step of the last checkpoint; `None` if there is none."""
    return max(_steps(workdir / CHECKPOINTS), default=None)


def restore(workdir: Path, target: TrainState, identity: dict[str, Any] | None = None) -> tuple[TrainState, float] | None:
    """Returns the last saved state, on this machine's first device, and its seconds of training; `None` if there is none.

    Writes nothing there. Names, shapes and types are compared with `target` before any array is read, so a file cannot ask
    for memory that the state does not need, and nothing is cast. The run may be training meanwhile.

    Args:
        workdir: Folder of the run.
        target: A state of arrays or of `jax.ShapeDtypeStruct`.
        identity: What run it must be of, as of `Checkpoints`; what a checkpoint of an earlier version does not say is not
            compared.

    Raises:
        UserError: If the checkpoint is damaged, is of another run, network or optimizer, or holds weights that are not finite.
    """
    for _ in range(_NUM_TRIES):
        step = latest_step(workdir)
        if step is None:
            return None
        try:
            return _restore(workdir, step, target, identity or {})
        except UserError:
            if latest_step(workdir) == step:
                raise  # Else training has replaced it meanwhile.
    raise UserError(f"--workdir: {str(workdir)!r} saves checkpoints faster than they can be read; try again")


_NUM_TRIES = 20


def _restore(workdir, step, target, identity):
    import orbax.checkpoint as ocp

    path = (workdir / CHECKPOINTS).absolute() / str(step)
    advice = _advice(workdir, step)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), target.__dict__)
    _check_files(path, shapes)
    meta = _read(path, advice, lambda: dict(read_json(path / "meta" / "metadata")))
    refuse(
        _other_run(meta, identity),
        f"--workdir: the checkpoint {str(path)!r} is of another run than {str(workdir / 'run.json')!r} says; put back the one "
        "that belongs there:",
    )
    with contextlib.ExitStack() as reading:
        reading.enter_context(_Quiet())
        folder = _read(path, advice, lambda: reading.enter_context(_state_folder(path)))
        saved = _read(path, advice, lambda: ocp.StandardCheckpointHandler().metadata(folder).tree)
        refuse(
            _differences(saved, shapes), f"--workdir: the checkpoint {str(path)!r} is not of this run's network and optimizer:"
        )
        # A copy, so that donating the state to the train step cannot touch buffers that the checkpointer still holds.
        restored = _read(path, advice, lambda: jax.tree.map(jnp.copy, _read_arrays(folder, shapes)))
    state = TrainState(**restored)
    seconds = _read(path, advice, lambda: float(meta["seconds"]))
    refuse(
        [f"{name} holds numbers that are not finite" for name, leaf in _leaves(state.params).items() if not _is_finite(leaf)]
        + [f"its step is {state.step}"] * (int(state.step) != step)
        + [f"its seconds of training are {seconds}"] * (not 0 <= seconds < math.inf)
        + ["its checksum is another"] * (meta.get("checksum", _checksum(state)) != _checksum(state)),  # The first had none.
        f"--workdir: the checkpoint {str(path)!r} was changed after it was written; {advice}:",
    )
    return state, seconds


_MAX_METADATA_BYTES = 2**24


def _check_files(path, shapes):
    """Refuses a checkpoint of which a file is a pipe, or larger than it can be of this state, before any of it is read."""
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    try:
        check_regular_tree(path, _MAX_METADATA_BYTES, 2 * size + _MAX_METADATA_BYTES, "d")
    except (OSError, ValueError) as error:
        raise UserError(f"--workdir: the checkpoint {str(path)!r} was changed after it was written: {error}") from error


def _advice(workdir, step):
    """What to do about a checkpoint that is damaged; never to delete it, which may be the only one."""
    before = [each for each in _steps(workdir / CHECKPOINTS) if each < step]
    if before:
        return f"move that folder elsewhere to use the one before it, of step {before[-1]}"
    return "there is none before it: restore it from a copy, or train again in another --workdir"


def _other_run(meta, identity):
    """What a checkpoint says of its run that is not so, a line each."""
    problems = []
    for name, fields in identity.items():
        if isinstance(meta.get(name), dict):
            # Fields that a later version brought have their defaults.
            there, now = (
                {key: value for key, value in each.items() if not is_default(key, value)} for each in (meta[name], fields)
            )
            problems += [
                f"{key}: there {there.get(key, 'its default')!r}, now {now.get(key, 'its default')!r}"
                for key in sorted(there.keys() | now.keys())
                if there.get(key) != now.get(key)
            ]
    return problems


def _read_arrays(folder: Path, target: Any) -> Any:
    """Reads the arrays that `target` stands for from a checkpoint's folder `state`."""
    import orbax.checkpoint as ocp

    return ocp.StandardCheckpointHandler().restore(folder, args=ocp.args.StandardRestore(target))


# The libraries that read and write arrays take `[`, `]`, `*` and `?` for patterns, `\\` for `/`, `/gs/` for cloud storage, and
# know no path that is not UTF-8.
_PLAIN = re.compile(r"(?!/(gs|s3|az|hf)/)[\w/.,:=+@~ -]*")


@contextlib.contextmanager
def _plain_path(folder: Path) -> Iterator[Path]:
    """Gives an absolute path to a folder in letters, digits and a few signs: its own, or that of a link to it."""
    if _is_plain(folder):
        yield folder
        return
    with _temporary_folder() as place:
        (place / folder.name).symlink_to(folder, target_is_directory=True)
        yield place / folder.name


def _is_plain(path):
    return _PLAIN.fullmatch(path.as_posix()) is not None


@contextlib.contextmanager
def _temporary_folder():
    with tempfile.TemporaryDirectory(prefix="sast_jax-") as name:
        if not _is_plain(Path(name)):
            raise OSError(f"the temporary folder {name!r} has other signs than letters and digits; set TMPDIR to another one")
        yield Path(name)


@contextlib.contextmanager
def _state_folder(path: Path) -> Iterator[Path]:
    """Gives a plain path to the arrays of a checkpoint.

    Earlier versions left those of folders whose names are not plain in parts: the arrays below `ocdbt.process_0`, and of names
    with a backslash in another folder.
    """
    folder = path / "state"
    part = folder / "ocdbt.process_0"
    if not part.is_dir() and "\\" in str(path):
        astray = Path(str(path).replace("\\", "/"))
        part = astray.with_name(astray.name + _UNFINISHED) / f"state{_UNFINISHED}" / "ocdbt.process_0"
    if (folder / "manifest.ocdbt").exists() or not (part / "manifest.ocdbt").is_file():
        with _plain_path(path) as plain:
            yield plain / "state"
        return
    with _temporary_folder() as place:
        for entry in [*folder.iterdir(), *part.iterdir()]:
            (place / entry.name).symlink_to(entry)
        yield place


def _leaves(tree: Any) -> dict[str, Any]:
    """The arrays of a tree by their dotted paths, equal for a tuple, named or not, and what a checkpoint makes of it."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _is_finite(leaf):
    return bool(jnp.isfinite(leaf).all())


def _checksum(state: TrainState) -> str:
    """SHA-256 over all arrays of a state: what is stored compressed would not notice a flipped bit."""
    digest = hashlib.sha256()
    for leaf in jax.device_get(jax.tree.leaves(state)):
        digest.update(leaf.tobytes())
    return digest.hexdigest()


def _differences(saved, expected):
    def describe(leaf):  # What is stored may be no array.
        if leaf is None:
            return "nothing"
        return f"{leaf.dtype}{list(leaf.shape)}" if hasattr(leaf, "shape") else type(leaf).__name__

    saved, expected = _leaves(saved), _leaves(expected)
    differences = [
        f"{name}: the checkpoint has {describe(saved.get(name))}, the run {describe(expected.get(name))}"
        for name in sorted(saved.keys() | expected.keys())
        if describe(saved.get(name)) != describe(expected.get(name))
    ]
    # An array is stored in chunks, and a chunk is allocated whole.
    return differences or [
        f"{name}: is stored in chunks of {list(leaf.storage.chunk_shape)} for an array of {list(leaf.shape)}"
        for name, leaf in saved.items()
        if leaf.storage is not None and math.prod(leaf.storage.chunk_shape) > max(1, math.prod(leaf.shape))
    ]


def _read(path, advice, read):
    try:
        return read()
    except Exception as error:  # Damaged files surface as whatever their decoder raises.
        reason, number = _reason(error), _errno(error)
    _collect_abandoned()
    if number in _ADVICE and number != errno.ENOENT:  # Nothing is wrong with the files themselves.
        advice = _ADVICE[number]
    raise UserError(f"--workdir: the checkpoint {str(path)!r} cannot be read ({reason}); {advice}")


def _errno(error):
    """Number of the system's error behind what a library raises, or `None`."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os_error_code='([0-9]+)'", str(error))
    return int(found[1]) if found else None


def _reason(error):
    number = _errno(error)
    if number and not isinstance(error, OSError):
        return os.strerror(number)
    return f"{type(error).__name__}: {error}".partition("\n")[0][:300]


def _collect_abandoned():
    """Lets what orbax abandons after an error, readers and writers of other arrays, end now and in silence."""
    with _Quiet(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        time.sleep(0.1)
        gc.collect()


class _Quiet:
    """Keeps orbax from reporting an error in its threads and logs, each in its own way; it also raises it, and one is enough.

    What others report goes its way. Many may be open at once.
    """

    _lock, _number = threading.Lock(), 0
    _hooks = contextlib.ExitStack()

    def __enter__(self):
        with _Quiet._lock:
            _Quiet._number += 1
            if _Quiet._number == 1:
                self._swap_hook(sys, "unraisablehook")
                self._swap_hook(threading, "excepthook")
                for name in ("absl", "asyncio"):
                    log = logging.getLogger(name)
                    log.addFilter(_is_not_of_orbax)
                    _Quiet._hooks.callback(log.removeFilter, _is_not_of_orbax)

    def __exit__(self, *exception):
        with _Quiet._lock:
            _Quiet._number -= 1
            if _Quiet._number == 0:
                _Quiet._hooks.close()

    def _swap_hook(self, module, name):
        before = getattr(module, name)

        def hook(what):
            if not (_passes_orbax(what.exc_traceback) or _is_of_loop(what.exc_traceback)):
                before(what)

        setattr(module, name, hook)
        _Quiet._hooks.callback(setattr, module, name, before)


def _passes_orbax(traceback):
    while traceback is not None:
        if _is_orbax(traceback.tb_frame.f_code.co_filename):
            return True
        traceback = traceback.tb_next
    return False


def _is_of_loop(traceback):
    """Whether an error is of an event loop itself: of one that was closed, or could not be opened."""
    return traceback is not None and traceback.tb_frame.f_code.co_filename == asyncio.base_events.__file__


def _is_orbax(filename):
    return f"{os.sep}orbax{os.sep}" in filename


def _is_not_of_orbax(record):
    return not (_is_orbax(record.pathname) or (record.exc_info and _passes_orbax(record.exc_info[2])))
