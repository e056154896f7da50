"""Training that keeps the neurons contracting: weights are projected after every step."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax


def cap_currents(params: Any, limit: float, *, layers: Sequence[str], input_bound: float = 1.0) -> Any:
    r"""Shrinks excitation until no neuron's current can exceed `limit`, whatever its input.

    .. math:: w^+ \leftarrow \gamma w^+, \quad b^+ \leftarrow \gamma b^+, \qquad
              \gamma = \min\Bigl(1, \frac{limit}{S \sum w^+ + b^+}\Bigr) \text{ for each neuron}

    Inhibition is left as it is. Average pooling before a layer does not raise its input, and padding with zeros adds none.

    Args:
        params: Weights by layer, each a `kernel` whose last axis counts the neurons (or channels) and a `bias`.
        limit: Largest current allowed, > 0, as from `max_current`; `inf` leaves the weights as they are.
        layers: Names of the layers whose currents are capped.
        input_bound: :math:`S`: the layer's input lies in [0, S]; 1 for spikes and for binary frames.

    Returns:
        The weights, in the structure of `params`.

    References:
        Theorem 4 of `docs/theory.md` says what this certifies.
    """
    if math.isinf(limit):
        return params
    limit *= 1 - 1e-5  # Room for rounding.

    def cap(layer):
        kernel, bias = layer["kernel"], layer["bias"]
        excitation = input_bound * jnp.sum(jnp.maximum(kernel, 0), axis=tuple(range(kernel.ndim - 1))) + jnp.maximum(bias, 0)
        factor = limit / jnp.maximum(excitation, limit)
        return {"kernel": jnp.where(kernel > 0, factor * kernel, kernel), "bias": jnp.where(bias > 0, factor * bias, bias)}

    return {name: cap(layer) if name in layers else layer for name, layer in params.items()}


def keep_projected(project: Callable[[Any], Any]) -> optax.GradientTransformation:
    r"""Keeps weights in a set: replaces an update :math:`\Delta` by :math:`P(w + \Delta) - w`.

    It must be the last link of its chain, after the optimizer has scaled the update, as `optax.keep_params_nonnegative`.

    Args:
        project: Function from weights to weights of the set, as `cap_currents`.

    Returns:
        A transformation without state; its `update` needs `params`.

    Example:
        >>> tx = optax.chain(optax.sgd(1.0), keep_projected(lambda w: jnp.clip(w, -1, 1)))
        >>> updates, _ = tx.update(jnp.array([-5.0, 0.5]), tx.init(jnp.zeros(2)), jnp.zeros(2))
        >>> print(updates)
        [ 1.  -0.5]
    """

    def update_fn(updates, state, params=None):
        if params is None:
            raise ValueError("keep_projected needs the weights: call update(updates, state, params)")
        projected = project(optax.apply_updates(params, updates))
        return jax.tree.map(jnp.subtract, projected, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update_fn)
