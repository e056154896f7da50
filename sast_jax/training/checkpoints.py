"""States on disk."""

import contextlib
import gc
import hashlib
import logging
import math
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from sast_jax.errors import UserError, refuse
from sast_jax.files import check_regular_tree, read_json
from sast_jax.training.state import TrainState

CHECKPOINTS = "checkpoints"


class Checkpoints:
    """Saves the checkpoints of a run: the last two are kept, each whole or absent.

    A checkpoint is the state (weights, optimizer state, step) and the seconds of training it took. Batches are functions
    of (seed, stream, step), so nothing else is needed to resume exactly.
    """

    def __init__(self, workdir: Path):
        """Opens or creates the checkpoints of a run folder."""
        import orbax.checkpoint as ocp  # Slow to load, and not needed before there is a checkpoint.

        self._folder = (workdir / CHECKPOINTS).absolute()
        with self._writable():
            self._manager = ocp.CheckpointManager(self._folder, options=ocp.CheckpointManagerOptions(max_to_keep=2))

    def save(self, state: TrainState, *, seconds: float) -> None:
        """Saves the state in the background, under its step; a step that is there already is not saved again."""
        import orbax.checkpoint as ocp

        step = int(state.step)
        if step != self._manager.latest_step():
            meta = {"seconds": seconds, "checksum": _checksum(state)}
            items = ocp.args.Composite(state=ocp.args.StandardSave(state.__dict__), meta=ocp.args.JsonSave(meta))
            with self._writable():
                self._manager.save(step, args=items)

    def close(self) -> None:
        """Waits for the last save to be on disk.

        Raises:
            UserError: If it could not be written.
        """
        with self._writable():
            self._manager.wait_until_finished()
            self._manager.close()

    @contextlib.contextmanager
    def _writable(self):
        try:
            yield
        except Exception as error:  # A full disk surfaces as whatever the writing library raises.
            raise UserError(
                f"--workdir: a checkpoint could not be written to {str(self._folder)!r} ({_reason(error)}); earlier ones are "
                "kept. Make room, or give the folder back its permissions, and the same command goes on from the last one"
            ) from error


def latest_step(workdir: Path) -> int | None:
    """Returns the step of the last checkpoint; `None` if there is none."""
    folder = workdir / CHECKPOINTS
    names = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    steps = [int(name) for name in names if name.isascii() and name.isdigit() and name == str(int(name))]
    return max(steps, default=None)


def restore(workdir: Path, target: TrainState) -> tuple[TrainState, float] | None:
    """Returns the last saved state, on this machine's first device, and its seconds of training; `None` if there is none.

    Writes nothing. Names, shapes and types are compared with `target` before any array is read, so a file cannot ask for
    memory that the state does not need, and nothing is cast.

    Args:
        workdir: Folder of the run.
        target: A state of arrays or of `jax.ShapeDtypeStruct`.

    Raises:
        UserError: If the checkpoint is damaged, is of another network or optimizer, or holds weights that are not finite.
    """
    step = latest_step(workdir)
    if step is None:
        return None
    import orbax.checkpoint as ocp

    path = (workdir / CHECKPOINTS).absolute() / str(step)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), target.__dict__)
    _check_files(path, shapes)
    handler = ocp.StandardCheckpointHandler()
    saved = _read(path, lambda: handler.metadata(path / "state").tree)
    refuse(_differences(saved, shapes), f"--workdir: the checkpoint {str(path)!r} is not of this run's network and optimizer:")
    # A copy, so that donating the state to the train step cannot touch buffers that the checkpointer still holds.
    restored = _read(path, lambda: jax.tree.map(jnp.copy, handler.restore(path / "state", args=ocp.args.StandardRestore(shapes))))
    state = TrainState(**restored)
    meta = _read(path, lambda: read_json(path / "meta" / "metadata"))
    seconds = _read(path, lambda: float(meta["seconds"]))
    refuse(
        [f"{name} holds numbers that are not finite" for name, leaf in _leaves(state.params).items() if not _is_finite(leaf)]
        + [f"its step is {state.step}"] * (int(state.step) != step)
        + [f"its seconds of training are {seconds}"] * (not 0 <= seconds < math.inf)
        + ["its checksum is another"] * (meta.get("checksum", _checksum(state)) != _checksum(state)),  # The first had none.
        f"--workdir: the checkpoint {str(path)!r} was changed after it was written; {_REMOVE}:",
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


_REMOVE = "remove that folder to go on from the one before it, or choose another --workdir"


def _read(path, read):
    # When one array is damaged, orbax abandons the readers of the others, which report it each in its own way.
    log = logging.getLogger("asyncio")
    before = sys.unraisablehook, log.disabled
    sys.unraisablehook, log.disabled = (lambda _: None), True
    try:
        try:
            return read()
        except Exception as error:  # Damaged files surface as whatever their decoder raises.
            reason = _reason(error)
        time.sleep(0.1)
        gc.collect()
    finally:
        sys.unraisablehook, log.disabled = before
    raise UserError(f"--workdir: the checkpoint {str(path)!r} cannot be read ({reason}); {_REMOVE}")


def _reason(error):
    return f"{type(error).__name__}: {error}".partition("\n")[0][:300]
