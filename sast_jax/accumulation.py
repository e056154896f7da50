"""Gradients of batches that do not fit in memory at once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def accumulate(grad_fn: Callable[..., Any], num_microbatches: int, *, axes: Any = 0) -> Callable[..., Any]:
    r"""Returns `grad_fn` computed on equal parts of its batch, one at a time, and averaged.

    .. math:: \nabla L_B(w) = \tfrac1M \sum_{m=1}^M \nabla L_{B_m}(w)

    It holds for any loss that is a mean over samples. Both gradients of `sam` may be accumulated, each in itself: the
    perturbation is that of the whole batch, unlike with `optax.MultiSteps`, which averages over updates.

    Args:
        grad_fn: `(params, batch) -> gradient`, or anything else to be averaged, as `jax.value_and_grad(loss)`.
        num_microbatches: Number of parts M >= 1; peak memory falls with it, time hardly changes.
        axes: Axis of the samples in each array of the batch: a number, or a tree prefix of the batch.

    Returns:
        A function like `grad_fn`, equal to it up to rounding.

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
        axis %= leaf.ndim
        num_samples = leaf.shape[axis]
        if num_samples % num_microbatches:
            raise ValueError(f"num_microbatches must divide the number of samples, {num_samples}; got {num_microbatches}")
        shape = (*leaf.shape[:axis], num_microbatches, num_samples // num_microbatches, *leaf.shape[axis + 1 :])
        return jnp.moveaxis(leaf.reshape(shape), axis, 0)

    def accumulated(params, batch):
        microbatches = jax.tree.map(lambda axis, part: jax.tree.map(lambda leaf: parts(axis, leaf), part), axes, batch)

        def add(total, microbatch):
            return jax.tree.map(jnp.add, total, grad_fn(params, microbatch)), None

        first, rest = (jax.tree.map(lambda leaf, i=i: leaf[i], microbatches) for i in (0, slice(1, None)))
        total, _ = jax.lax.scan(add, grad_fn(params, first), rest)
        return jax.tree.map(lambda leaf: leaf / num_microbatches, total)

    return accumulated
