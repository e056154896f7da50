"""Gradients of batches that do not fit in memory at once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sast_jax.numeric import wide_dtype


def accumulate(grad_fn: Callable[..., Any], num_microbatches: int, *, axes: Any = 0) -> Callable[..., Any]:
    r"""Returns `grad_fn` computed on equal parts of its batch, one at a time, and averaged.

    .. math:: \nabla L_B(w) = \tfrac1M \sum_{m=1}^M \nabla L_{B_m}(w)

    It holds for any loss that is a mean over samples. Both gradients of `sam` may be accumulated, each in itself: the
    perturbation is that of the whole batch, unlike with `optax.MultiSteps`, which averages over updates.

    Args:
        grad_fn: `(params, batch) -> gradient`, or anything else to be averaged, as `jax.value_and_grad(loss)`. Sums are taken in
            float32 at least; means of floating-point numbers have their dtype, those of integers and booleans are float32.
        num_microbatches: Number of parts M >= 1; peak memory falls with it, time hardly changes.
        axes: Axis of the samples in each array of the batch: a number, or a tree prefix of the batch. A number in the batch is
            given to each part, and of a `jax.random.key` each part has a key of its own, split from it.

    Returns:
        A function like `grad_fn`, equal to it up to rounding, unless it draws random numbers.

    Raises:
        ValueError: If M is less than 1; when called, if it does not divide the number of samples.

    Example:
        >>> grad_fn = jax.grad(lambda w, x: jnp.mean((w * x) ** 2))
        >>> x = jnp.arange(6.0)
        >>> print(f"{grad_fn(2.0, x):.3f} {accumulate(grad_fn, 3)(2.0, x):.3f}")
        36.667 36.667
    """
    if num_microbatches < 1:
        raise ValueError(f"num_microbatches must be at least 1; got {num_microbatches}")
    if num_microbatches == 1:
        return grad_fn

    def parts(axis, leaf):
        leaf = jnp.asarray(leaf)
        if leaf.ndim == 0:
            is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            return jax.random.split(leaf, num_microbatches) if is_key else jnp.broadcast_to(leaf, num_microbatches)
        axis %= leaf.ndim
        num_samples = leaf.shape[axis]
        if num_samples % num_microbatches:
            raise ValueError(f"num_microbatches must divide the number of samples, {num_samples}; got {num_microbatches}")
        shape = (*leaf.shape[:axis], num_microbatches, num_samples // num_microbatches, *leaf.shape[axis + 1 :])
        return jnp.moveaxis(leaf.reshape(shape), axis, 0)

    def accumulated(params, batch):
        microbatches = jax.tree.map(lambda axis, part: jax.tree.map(lambda leaf: parts(axis, leaf), part), axes, batch)

        def add(total, microbatch):
            return jax.tree.map(lambda a, b: a + jnp.asarray(b, a.dtype), total, grad_fn(params, microbatch)), None

        first, rest = (jax.tree.map(lambda leaf, i=i: leaf[i], microbatches) for i in (0, slice(1, None)))
        outputs = grad_fn(params, first)
        total, _ = jax.lax.scan(add, jax.tree.map(lambda leaf: jnp.asarray(leaf, wide_dtype(leaf)), outputs), rest)
        return jax.tree.map(lambda leaf, like: (leaf / num_microbatches).astype(_mean_dtype(like)), total, outputs)

    return accumulated


def _mean_dtype(leaf):
    dtype = jnp.result_type(leaf)
    return dtype if jnp.issubdtype(dtype, jnp.inexact) else wide_dtype(leaf)
