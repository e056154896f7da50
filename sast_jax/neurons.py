"""Leaky integrate-and-fire neurons and readouts as pure functions of time-major arrays `[T, B, ...]`."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from sast_jax.numeric import check_range, wide_dtype
from sast_jax.spikes import SpikeFn

Reset = Literal["zero", "subtract", "none"]

RESETS: tuple[Reset, ...] = ("zero", "subtract", "none")


class LIFState(NamedTuple):
    """State of a layer between two time steps.

    Attributes:
        potential: Membrane potential, `[B, ...]`.
        spikes: Spikes emitted at that step, `[B, ...]`; the reset acts on the next step.
    """

    potential: jax.Array
    spikes: jax.Array


def lif_init(current: jax.Array) -> LIFState:
    """Returns the resting state, all zeros, of a layer whose input at one step looks like `current`, `[B, ...]`."""
    return LIFState(jnp.zeros_like(current), jnp.zeros_like(current))


def _check_floating(current):
    if not jnp.issubdtype(current.dtype, jnp.floating):
        raise ValueError(f"current must be of a floating-point dtype; got {current.dtype}")


def aligned(parameter: Any, num_axes: int) -> Any:
    """Returns a parameter with axes of size 1 in front, so that jax need not add any: it may have been told not to."""
    ndim = jnp.ndim(parameter)
    return jnp.reshape(parameter, (1,) * (num_axes - ndim) + jnp.shape(parameter)) if ndim else parameter


def check_neuron(*, decay: Any, threshold: Any, reset: str) -> None:
    """Refuses parameters of a neuron that are out of their range, as far as they are known; see `lif_step`."""
    check_range("decay", decay, "in [0, 1]")
    check_range("threshold", threshold, "positive")
    if reset not in RESETS:
        raise ValueError(f"reset must be one of {', '.join(RESETS)}; got {reset!r}")


def remaining_potential(state: LIFState, *, decay: float | jax.Array, threshold: float | jax.Array, reset: Reset) -> jax.Array:
    """Returns what decay and reset leave of the potential: that of the next step without its current. See `lif_step`."""
    potential, spikes = state
    if reset == "zero":
        return decay * potential * (1.0 - spikes)
    if reset == "subtract":
        return decay * potential - threshold * spikes
    return decay * potential


def lif_step(
    state: LIFState,
    current: jax.Array,
    *,
    decay: float | jax.Array,
    threshold: float | jax.Array = 1.0,
    reset: Reset = "zero",
    spike_fn: SpikeFn,
) -> LIFState:
    r"""Advances a layer of leaky integrate-and-fire neurons by one time step.

    .. math::
        u_t &= \tau u_{t-1} (1 - s_{t-1}) + I_t          && \text{reset zero} \\
        u_t &= \tau u_{t-1} - \vartheta s_{t-1} + I_t    && \text{reset subtract} \\
        u_t &= \tau u_{t-1} + I_t                        && \text{reset none} \\
        s_t &= \varphi(u_t - \vartheta)

    `spike_fn` is the only difference between the modes: a smooth :math:`\varphi` gives the surrogate-forward network, the
    step function the hard-spike network, on equal weights. Nothing is detached: the gradient passes through the reset.

    Args:
        state: State at step t - 1; `lif_init` before the first step.
        current: `[B, ...]` input current of step t, weights already applied.
        decay: Share :math:`\tau` of the potential kept per step, in [0, 1]; a number or an array that broadcasts.
        threshold: Potential :math:`\vartheta > 0` above which a neuron spikes; a number or an array that broadcasts.
        reset: `zero` clears the potential after a spike, `subtract` takes the threshold off it (not decayed), `none` keeps it.
        spike_fn: :math:`\varphi`, from `sast_jax.spike_fn`.

    Returns:
        State at step t, in the dtype of `current`.

    Raises:
        ValueError: If `reset` is unknown, `decay` or `threshold` is known and out of its range, or `current` is of an integer
            dtype.

    References:
        Gerstner, Kistler, Naud, Paninski. Neuronal Dynamics. Cambridge 2014, section 1.3.
    """
    _check_floating(current)
    check_neuron(decay=decay, threshold=threshold, reset=reset)
    decay, threshold = aligned(decay, current.ndim), aligned(threshold, current.ndim)
    potential = remaining_potential(state, decay=decay, threshold=threshold, reset=reset) + current
    potential = potential.astype(current.dtype)
    return LIFState(potential, spike_fn(potential - threshold).astype(current.dtype))


def spikes_and_remaining(
    potential: jax.Array,
    *,
    decay: float | jax.Array,
    threshold: float | jax.Array,
    reset: Reset,
    spike_fn: SpikeFn,
) -> tuple[jax.Array, jax.Array]:
    """Returns the spikes that follow from a potential, and what remains of it for the next step; see `lif_step`.

    Between steps only what remains need be carried, and of a step only the potential is kept for the gradient: the backward pass
    computes the spikes again.
    """
    decay, threshold = aligned(decay, potential.ndim), aligned(threshold, potential.ndim)

    def after(potential):
        spikes = spike_fn(potential - threshold).astype(potential.dtype)
        remaining = remaining_potential(LIFState(potential, spikes), decay=decay, threshold=threshold, reset=reset)
        return spikes, remaining.astype(potential.dtype)

    return jax.checkpoint(after, prevent_cse=False)(potential)  # type: ignore[no-any-return]


def lif(
    current: jax.Array,
    *,
    decay: float | jax.Array,
    threshold: float | jax.Array = 1.0,
    reset: Reset = "zero",
    spike_fn: SpikeFn,
    initial_state: LIFState | None = None,
    unroll: int = 1,
) -> tuple[jax.Array, LIFState]:
    """Runs a layer of leaky integrate-and-fire neurons over time: the steps of `lif_step` under `jax.lax.scan`.

    Args:
        current: `[T, B, ...]` input current, weights already applied.
        decay: As in `lif_step`.
        threshold: As in `lif_step`.
        reset: As in `lif_step`.
        spike_fn: As in `lif_step`.
        initial_state: State before the first step; `None` is the resting state. Passing the returned state of one call
            to the next continues a recording where it stopped.
        unroll: Time steps per iteration of the compiled loop; changes speed, not values.

    Returns:
        Spikes `[T, B, ...]` and the state after the last step.

    Raises:
        ValueError: As `lif_step`.

    Example:
        A constant current of 0.6 needs two steps to pass the threshold, then starts again from zero.

        >>> spikes, _ = lif(jnp.full((4, 1), 0.6), decay=0.9, spike_fn=lambda x: (x > 0).astype(x.dtype))
        >>> spikes[:, 0].tolist()
        [0.0, 1.0, 0.0, 1.0]
    """
    _check_floating(current)
    check_neuron(decay=decay, threshold=threshold, reset=reset)
    settings: dict[str, Any] = {
        "decay": aligned(decay, current.ndim - 1),
        "threshold": aligned(threshold, current.ndim - 1),
        "reset": reset,
    }

    def step(carry, current_now):
        potential = carry[0] + current_now
        spikes, remaining = spikes_and_remaining(potential, spike_fn=spike_fn, **settings)
        return (remaining, LIFState(potential, spikes)), spikes

    state = lif_init(current[0]) if initial_state is None else initial_state
    remaining = remaining_potential(state, **settings).astype(current.dtype)
    (_, state), spikes = jax.lax.scan(step, (remaining, state), current, unroll=unroll)
    return spikes, state


def leaky_readout(current: jax.Array, decay: float | jax.Array = 0.0) -> jax.Array:
    r"""Mean over time of the potential of leaky integrators that never spike.

    .. math:: u_t = \tau u_{t-1} + I_t, \qquad y = \tfrac1T \sum_t u_t

    Args:
        current: `[T, B, K]` current of K output neurons.
        decay: :math:`\tau` in [0, 1]; 0 is the mean of the current.

    Returns:
        Logits `[B, K]`.

    Raises:
        ValueError: If `current` is of an integer dtype, or `decay` is known and not in [0, 1].

    Example:
        >>> leaky_readout(jnp.array([[[1.0]], [[2.0]]]), decay=0.5).item()
        1.75
    """
    _check_floating(current)
    check_range("decay", decay, "in [0, 1]")
    decay = jnp.asarray(decay, wide_dtype(current))  # In half precision the weights would not add up.
    num_time_steps = current.shape[0]
    weights = readout_weights(num_time_steps, decay.reshape(*[1] * (current.ndim - 1 - decay.ndim), *decay.shape))
    return (jnp.sum(weights * current.astype(weights.dtype), axis=0) / num_time_steps).astype(current.dtype)


def readout_weights(num_time_steps: int, decay: jax.Array) -> jax.Array:
    r"""Returns how much of each step's current is in the sum of a leaky integrator's potentials.

    .. math:: w_t = \sum_{k=0}^{T-1-t} \tau^k

    Args:
        num_time_steps: T.
        decay: :math:`\tau`, of any shape.

    Returns:
        `[T, ...]`.
    """
    powers = jnp.cumprod(jnp.broadcast_to(decay, (num_time_steps, *decay.shape)).at[0].set(1.0), axis=0)
    return jnp.flip(jnp.cumsum(powers, axis=0), axis=0)


def rate_readout(spikes: jax.Array) -> jax.Array:
    """Number of spikes of each output neuron: its rate times the number of steps, so that logits are not confined to [0, 1].

    Args:
        spikes: `[T, B, K]` spikes of K output neurons.

    Returns:
        Logits `[B, K]`, in [0, T].

    Example:
        >>> rate_readout(jnp.array([[[1.0]], [[0.0]], [[1.0]]])).item()
        2.0
    """
    return jnp.sum(spikes, axis=0)
