"""States on disk."""

import contextlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from sast_jax.errors import UserError
from sast_jax.training.state import TrainState

CHECKPOINTS = "checkpoints"


class Checkpoints:
    """Checkpoints of a run: the last two, each whole or absent.

    A checkpoint is the state (weights, optimizer state, step) and the seconds of training it took. Batches are functions
    of (seed, stream, step), so nothing else is needed to resume exactly.
    """

    def __init__(self, workdir: Path):
        """Opens or creates the checkpoints of a run folder."""
        self._folder = (workdir / CHECKPOINTS).absolute()
        self._manager = ocp.CheckpointManager(self._folder, options=ocp.CheckpointManagerOptions(max_to_keep=2))

    def save(self, state: TrainState, *, seconds: float) -> None:
        """Saves the state in the background, under its step; a step that is there already is not saved again."""
        step = int(state.step)
        if step != self._manager.latest_step():
            items = ocp.args.Composite(state=ocp.args.StandardSave(state.__dict__), meta=ocp.args.JsonSave({"seconds": seconds}))
            self._manager.save(step, args=items)

    def restore(self, state: TrainState) -> tuple[TrainState, float] | None:
        """Returns the last saved state, in the shapes and types of `state`, and its seconds; `None` if there is none."""
        step = self._manager.latest_step()
        if step is None:
            return None
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, state.__dict__)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(target), meta=ocp.args.JsonRestore())
        with _readable(self._folder / str(step)):
            restored = self._manager.restore(step, args=items)
        # A copy, so that donating the state to the train step cannot touch buffers that the checkpointer still holds.
        return TrainState(**jax.tree.map(jnp.copy, restored["state"])), restored["meta"]["seconds"]

    def close(self) -> None:
        """Waits for the last save to be on disk."""
        self._manager.wait_until_finished()
        self._manager.close()


def load_params(workdir: Path) -> tuple[Any, int] | None:
    """Returns weights and step of the last checkpoint, on this machine's first device; `None` if there is none.

    Writes nothing, and does not ask on which device the weights were when they were saved.

    Raises:
        UserError: If the checkpoint is damaged.
    """
    folder = (workdir / CHECKPOINTS).absolute()
    steps = [int(path.name) for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    if not steps:
        return None
    path = folder / str(max(steps))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with _readable(path), ocp.StandardCheckpointer() as checkpointer:
        saved = checkpointer.metadata(path / "state").item_metadata.tree
        target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), saved)
        return checkpointer.restore(path / "state", target)["params"], max(steps)


@contextlib.contextmanager
def _readable(path):
    try:
        yield
    except Exception as error:  # Damaged files surface as whatever their decoder raises.
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise UserError(
            f"--workdir: the checkpoint {str(path)!r} cannot be read ({reason[:300]}); remove that folder to go on from the one "
            "before it, or choose another --workdir"
        ) from error
