"""From recordings in memory to batches on the device, before the train step asks for them."""

import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from sast_jax.data.batches import BATCH_SPECS, Batch, take_batch
from sast_jax.data.cache import Recordings
from sast_jax.devices import SPREAD, WHOLE, place

RESIDENT_SHARE = 0.25
"""Share of the device's memory that recordings may take; the rest is for the network."""

RESIDENT_BYTES = 2**31
"""What they may take where devices do not tell their memory, as the parts of a CPU, which share it."""


def make_take(
    recordings: Recordings, *, mesh: Mesh | None = None, max_resident_bytes: int | None = None
) -> Callable[[np.ndarray], Batch]:
    """Returns the function from indices of samples to their batch, on the device or spread over several.

    Recordings that fit are copied to each device once and gathered there; of others each batch is gathered by the host, which
    takes no more than its own devices need, and copied. The batches are equal.

    Args:
        recordings: Samples to take from.
        mesh: Devices, whose number divides that of the indices; `None`: one.
        max_resident_bytes: What frames may take of the device's memory; not given: `RESIDENT_SHARE` of it, or of CPUs
            `RESIDENT_BYTES` for all devices of this host.
    """
    limit = _resident_bytes(mesh) if max_resident_bytes is None else max_resident_bytes
    if recordings.frames.nbytes > limit:
        return functools.partial(_take, recordings, mesh)
    frames, labels = place((recordings.frames, recordings.labels), mesh, WHOLE)
    if mesh is None:
        return lambda indices: _gather(frames, labels, indices)
    gather = jax.jit(jax.shard_map(_gather, mesh=mesh, in_specs=(WHOLE, WHOLE, SPREAD), out_specs=BATCH_SPECS))
    return lambda indices: gather(frames, labels, place(indices, mesh, SPREAD))


def _take(recordings, mesh, indices):
    if mesh is None:
        return jax.device_put(take_batch(recordings, indices))
    first, *shape = recordings.frames.shape[1:]
    frames = jax.make_array_from_callback(
        (first, len(indices), *shape),
        NamedSharding(mesh, BATCH_SPECS.frames),
        lambda index: take_batch(recordings, indices[index[1]]).frames,
    )
    return Batch(frames, *place((recordings.labels[indices], np.ones(len(indices), bool)), mesh, SPREAD))


@jax.jit
def _gather(frames, labels, indices):
    taken = frames.at[indices].get(mode="promise_in_bounds").swapaxes(0, 1)
    return Batch(taken, labels.at[indices].get(mode="promise_in_bounds"), jnp.ones(len(indices), bool))


def _resident_bytes(mesh):
    statistics = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in statistics:
        return int(RESIDENT_SHARE * statistics["bytes_limit"])
    return RESIDENT_BYTES // (len(mesh.local_devices) if mesh else 1)


T = TypeVar("T")


class Prefetch(Generic[T]):
    """A function of the step whose next values are computed in the background, in the order of the steps.

    It holds no position: any step may be asked for at any time, and gets what the function itself returns.
    """

    def __init__(self, draw: Callable[[int], T], *, num_steps: int, depth: int = 2):
        """Prefetches up to `depth` values of `draw(step)`, for steps below `num_steps`."""
        self._draw, self._num_steps, self._depth = draw, num_steps, depth
        self._pending: dict[int, Future[T]] = {}
        self._executor = ThreadPoolExecutor(1, "prefetch")

    def __enter__(self) -> "Prefetch[T]":
        return self

    def __exit__(self, *exception) -> None:
        self._executor.shutdown(cancel_futures=True)

    def __call__(self, step: int) -> T:
        """Returns `draw(step)`, or raises what it raises."""
        wanted = range(step, min(step + self._depth + 1, self._num_steps))
        for other in self._pending.keys() - set(wanted):
            self._pending.pop(other).cancel()
        for other in wanted:
            if other not in self._pending:
                self._pending[other] = self._executor.submit(self._draw, other)
        return self._pending.pop(step).result()
