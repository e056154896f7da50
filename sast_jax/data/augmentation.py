"""Random changes of training frames that leave their class as it is."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from sast_jax.data.batches import Batch
from sast_jax.randomness import make_key


def make_augment(
    *, max_shift: int = 0, time_jitter: float = 0.0, drop: float = 0.0, binary: bool, seed: int
) -> Callable[[Batch, jax.Array, int], Batch] | None:
    """Returns the function `(batch, step, stream) -> batch` with changed frames, or `None` if nothing is to change.

    It is pure: what it draws depends on `seed`, step and stream alone. Frames are never mirrored, as that would change the
    class of a gesture.

    Args:
        max_shift: Each recording is shifted as a whole by up to that many pixels along x and along y; what enters is empty.
        time_jitter: Probability of what a pixel counted in a frame, of one polarity, to move to the frame before or after
            it, with equal chance. At the ends of the recording it stays.
        drop: Probability of what a pixel counted in a frame, of one polarity, to be lost.
        binary: Whether frames hold 0 and 1 and are to stay so.
        seed: Non-negative seed.

    Raises:
        ValueError: By the returned function, if `max_shift` reaches the height or width of the frames, so that a shift could
            leave nothing of them.

    References:
        Gu et al. EventDrop: Data Augmentation for Event-based Learning. IJCAI 2021.
    """
    if not (max_shift or time_jitter or drop):
        return None

    def augment(batch, step, stream):
        key = jax.random.fold_in(jax.random.fold_in(make_key(seed), stream), step)
        jitter_key, shift_key = jax.random.split(key)
        frames = batch.frames
        if time_jitter or drop:
            frames = _drop_and_jitter(jitter_key, frames, drop, time_jitter, 1 if binary else 255)
        if max_shift:
            frames = _shift(shift_key, frames, max_shift)
        return batch._replace(frames=frames)

    return augment


def _drop_and_jitter(key, frames, drop, time_jitter, limit):
    u = jax.random.uniform(key, frames.shape)
    half = (1 - drop) * time_jitter / 2
    earlier = (u >= drop) & (u < drop + half)
    later = (u >= drop + half) & (u < drop + 2 * half)
    earlier, later = earlier.at[0].set(False), later.at[-1].set(False)
    counts = jnp.where(u < drop, 0, frames).astype(jnp.int16)
    moved = jnp.where(earlier | later, 0, counts)
    moved = moved.at[:-1].add(jnp.where(earlier, counts, 0)[1:]).at[1:].add(jnp.where(later, counts, 0)[:-1])
    return jnp.minimum(moved, limit).astype(frames.dtype)


def _shift(key, frames, max_shift):
    _, batch_size, height, width, _ = frames.shape
    if max_shift >= min(height, width):
        raise ValueError(
            f"max_shift: must be less than the {height} x {width} pixels of a frame, or a shift leaves nothing of it; got "
            f"{max_shift}"
        )
    start = jax.random.randint(key, (batch_size, 2), 0, 2 * max_shift + 1)
    padding = ((0, 0), (0, 0), (max_shift, max_shift), (max_shift, max_shift), (0, 0))

    def cut(recording, start):
        return jax.lax.dynamic_slice(
            recording, (0, start[0], start[1], 0), (recording.shape[0], height, width, recording.shape[-1])
        )

    return jax.vmap(cut, in_axes=(1, 0), out_axes=1)(jnp.pad(frames, padding), start)
