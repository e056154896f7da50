"""Which samples make up a batch: a pure function of seed, stream and step, so there is no iterator to save or restore."""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jax.sharding import PartitionSpec

from sast_jax.data.cache import Recordings
from sast_jax.devices import AXIS, SPREAD

DESCENT = 0
"""Stream of the batches whose gradient the optimizer applies."""

PERTURBATION = 1
"""Stream of the batches whose gradient perturbs the weights."""


class Batch(NamedTuple):
    """Samples for one step.

    Attributes:
        frames: uint8 `[T, B, H, W, 2]`.
        labels: int32 `[B]`.
        mask: bool `[B]`; `False` marks padding of the last batch of an evaluation.
    """

    frames: np.ndarray
    labels: np.ndarray
    mask: np.ndarray


SAMPLE_AXES = Batch(frames=1, labels=0, mask=0)  # type: ignore[arg-type]
"""Which axis of each array of a batch counts its samples."""

BATCH_SPECS = Batch(frames=PartitionSpec(None, AXIS), labels=SPREAD, mask=SPREAD)  # type: ignore[arg-type]
"""How a batch is spread over devices: by samples."""


def batch_indices(
    num_samples: int, batch_size: int, *, seed: int, stream: int, step: int, process_index: int = 0, process_count: int = 1
) -> np.ndarray:
    """Returns the samples of a training batch, or a host's share of them.

    Each epoch of a stream is a fresh shuffle, cut into `num_samples // batch_size` batches; what is left over is left out
    of that epoch. Streams are shuffled by independently seeded generators. Over a finite set the streams are
    independent of each other at every step, while successive batches of one stream within an epoch are disjoint and not i.i.d.

    Args:
        num_samples: Number of samples N.
        batch_size: Number of samples per batch, at most N.
        seed: Non-negative seed of the run.
        stream: `DESCENT` or `PERTURBATION`.
        step: Step, from 0.
        process_index: Which host asks, as `jax.process_index()`.
        process_count: Number of hosts; it divides `batch_size`. Their shares in order are the batch of a single host.

    Returns:
        int64 `[batch_size / process_count]`, without repetition.

    Raises:
        ValueError: If a batch is larger than the set, or the hosts cannot have equal shares.
    """
    if not 1 <= batch_size <= num_samples:
        raise ValueError(f"batch_size must be 1 to {num_samples}, the number of samples; got {batch_size}")
    if batch_size % process_count or not 0 <= process_index < process_count:
        raise ValueError(f"{process_count} hosts cannot share a batch of {batch_size}, or there is no host {process_index}")
    epoch, position = divmod(step, num_samples // batch_size)
    share = batch_size // process_count
    start = position * batch_size + process_index * share
    return _shuffle(num_samples, seed, stream, epoch)[start : start + share]


@functools.lru_cache(maxsize=128)  # Of as many runs, or streams of runs, as are trained at once.
def _shuffle(num_samples, seed, stream, epoch):
    return np.random.default_rng((seed, stream, epoch)).permutation(num_samples)


def take_batch(recordings: Recordings, indices: np.ndarray) -> Batch:
    """Returns the given samples as a time-major batch."""
    frames = recordings.frames[indices].swapaxes(0, 1)
    return Batch(frames, recordings.labels[indices], np.ones(len(indices), bool))


def evaluation_batches(recordings: Recordings, batch_size: int) -> Iterator[Batch]:
    """Yields all samples in order, in batches of equal size; the last one is padded and its padding masked."""
    num_samples = len(recordings.labels)
    if batch_size < 1 or not num_samples:
        raise ValueError(f"an evaluation needs recordings and a batch_size of at least 1; got {num_samples} and {batch_size}")
    for start in range(0, num_samples, batch_size):
        position = np.arange(start, start + batch_size)
        batch = take_batch(recordings, np.minimum(position, num_samples - 1))
        yield batch._replace(mask=position < num_samples)
