"""Sharpness-aware minimisation as one link of an `optax.chain`, placed before any optimizer."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


class SamState(NamedTuple):
    """State of `sam`.

    Attributes:
        count: Number of updates so far, int32; the argument of a `rho` schedule.
    """

    count: jax.Array  # type: ignore[assignment]


def sam(
    rho: float | jax.Array | Callable[[jax.Array], jax.Array], *, normalize: bool = True
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces a gradient by the gradient at a perturbed point.

    .. math:: \epsilon = \rho\, g' / \|g'\|_2, \qquad g = \nabla L_B(w + \epsilon)

    The update takes the *perturbation gradient* :math:`g' = \nabla L_{B'}(w)` and, as `grad_fn`, the gradient function of the
    descent batch :math:`B`; it returns :math:`g`, which the rest of the chain treats like any gradient. The caller draws the
    two batches: independently for the setting of the convergence proof, or `B' = B` for ordinary SAM. Weights are
    perturbed as one vector (global norm) and never stored. At :math:`g' = 0` there is no direction to climb and
    :math:`\epsilon = 0`.

    Args:
        rho: Radius :math:`\rho \ge 0`, a number or a schedule from the update count to a number. At 0 the update is
            `grad_fn(params)`, so the chain is its base optimizer.
        normalize: If `False`, :math:`\epsilon = \rho\, g'` (unnormalised SAM; Andriushchenko and Flammarion 2022).

    Returns:
        A transformation whose `update(perturbation_grads, state, params, grad_fn=...)` returns the gradient at the perturbed
        weights. Further keyword arguments are accepted and ignored, as chained transformations share them.

    Raises:
        ValueError: If a concrete `rho` is negative or not finite; at update if `params` or `grad_fn` is missing.

    Example:
        >>> tx = optax.chain(sam(rho=0.1), optax.sgd(1.0))
        >>> params = jnp.array([3.0, 4.0])
        >>> grad_fn = jax.grad(lambda w: 0.5 * jnp.sum(w**2))
        >>> updates, _ = tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)
        >>> print(updates.round(2))
        [-3.06 -4.08]

    References:
        Foret, Kleiner, Mobahi, Neyshabur. Sharpness-Aware Minimization for Efficiently Improving Generalization. ICLR 2021.
        Independent perturbation batch: Nicholson, arXiv:2603.18039.
    """
    if isinstance(rho, (int, float)) and not 0 <= rho < float("inf"):
        raise ValueError(f"rho must be a finite number >= 0; got {rho!r}")

    def init_fn(params):
        del params
        return SamState(count=jnp.zeros([], jnp.int32))

    def update_fn(updates, state, params=None, *, grad_fn=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError("sam needs the weights: call update(perturbation_grads, state, params, grad_fn=...)")
        if grad_fn is None:
            raise ValueError(
                "sam needs the gradient function of the descent batch: call update(perturbation_grads, state, params, "
                "grad_fn=lambda params: jax.grad(loss)(params, descent_batch))"
            )
        radius = rho(state.count) if callable(rho) else rho
        direction = jax.tree.map(lambda g: g.astype(jnp.promote_types(g.dtype, jnp.float32)), updates)
        if normalize:
            # Scaled by the largest entry first, because the squares of a small gradient underflow; `tiny` makes 0 / 0 a 0.
            for order in ("inf", 2):
                norm = jnp.maximum(optax.tree.norm(direction, ord=order), jnp.finfo(jnp.float32).tiny)
                direction = optax.tree.scale(1 / norm, direction)
        perturbed = jax.tree.map(lambda w, e: (w + radius * e).astype(w.dtype), params, direction)
        return grad_fn(perturbed), SamState(count=optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
