"""Neurons as Pallas kernels for GPUs and TPUs: the state stays in registers over time, spikes and potentials are written once."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from sast_jax.neurons import LIFState, Reset, check_neuron, lif, lif_init, lif_step, remaining_potential
from sast_jax.spikes import SpikeFn

try:
    from jax.experimental.pallas import triton
except ImportError:  # It is deprecated, and in some future jax there will be none.
    triton = None  # type: ignore[assignment]

BLOCK_SIZE, MIN_BLOCK_SIZE = 1024, 128
"""Most and least neurons per program of the grid. A layer that no power of two between them divides is padded, or, if it is
smaller, taken by one program."""


def lif_pallas(
    current: jax.Array,
    *,
    decay: float | jax.Array,
    threshold: float | jax.Array = 1.0,
    reset: Reset = "zero",
    spike_fn: SpikeFn,
    initial_state: LIFState | None = None,
    unroll: int = 1,
) -> tuple[jax.Array, LIFState]:
    """Equals `lif` up to rounding, in value and gradient, in one pass over memory each way.

    Forward it reads currents and writes spikes, and potentials if there is a gradient to be taken; backward it reads potentials
    and derives spikes and slopes from them again. On a CPU the kernels are interpreted, which is for tests. Where the kernels
    do not reach, `lif` runs instead: currents that are not float32, decays or thresholds that are arrays, spike functions that
    depend on arrays (a slope under a schedule, random hard spikes), or are given with `derivative_rule="jvp"`, and
    sizes that are symbolic.

    Args:
        current: As in `lif`.
        decay: As in `lif`.
        threshold: As in `lif`.
        reset: As in `lif`.
        spike_fn: As in `lif`.
        initial_state: As in `lif`.
        unroll: As in `lif`, where it runs instead.

    Returns:
        As `lif`.

    References:
        Tillet, Kung, Cox. Triton: An Intermediate Language and Compiler for Tiled Neural Network Computations. MAPL 2019.
    """
    neuron: dict[str, Any] = {"decay": decay, "threshold": threshold, "reset": reset, "spike_fn": spike_fn}
    check_neuron(decay=decay, threshold=threshold, reset=reset)
    if not _is_covered(current, decay, threshold, spike_fn):
        return lif(current, initial_state=initial_state, unroll=unroll, **neuron)
    state = lif_init(current[0]) if initial_state is None else initial_state
    num_time_steps, *shape = current.shape
    num_neurons = current[0].size
    block_size = math.gcd(num_neurons, BLOCK_SIZE)
    if block_size < MIN_BLOCK_SIZE:  # Padding copies all currents.
        block_size = min(BLOCK_SIZE, pl.next_power_of_2(num_neurons))
    padding = -num_neurons % block_size
    pad = lambda x: jnp.pad(x, (*[(0, 0)] * (x.ndim - 1), (0, padding))) if padding else x  # noqa: E731
    unpad = lambda x: x[..., :num_neurons]  # noqa: E731
    flat = jax.tree.map(lambda x: pad(x.reshape(-1)), state)
    spikes, state = _neurons(pad(current.reshape(num_time_steps, -1)), flat, tuple(neuron.items()), block_size)
    return unpad(spikes).reshape(current.shape), jax.tree.map(lambda x: unpad(x).reshape(shape), state)


def are_fast() -> bool:
    """Whether the kernels are what is fastest here: on GPUs. On TPUs they have not been timed."""
    device = jax.config.jax_default_device  # type: ignore[attr-defined]  # Beside a GPU it may be the CPU.
    platform = getattr(device, "platform", device) or jax.default_backend()
    return triton is not None and platform in ("gpu", "cuda")


def _is_covered(current, decay, threshold, spike_fn):
    are_numbers = isinstance(decay, int | float) and isinstance(threshold, int | float)
    is_missing = triton is None and jax.default_backend() == "gpu"
    if not all(isinstance(size, int) for size in current.shape):
        return False  # A symbolic size, as in `jax.export`, has no blocks.
    if is_missing or current.dtype != jnp.float32 or current.size == 0 or not are_numbers:
        return False
    if isinstance(spike_fn, functools.partial) and isinstance(spike_fn.func, jax.custom_jvp):
        return False  # Forward mode is wanted, and kernels have none.
    if jax.make_jaxpr(spike_fn)(current[0]).consts:
        return False
    value = str(jax.make_jaxpr(_value_of(spike_fn))(current[0]))
    return not any(name in value for name in ("random_bits", "custom_vjp_call"))  # Bits drawn in a block are those of all blocks.


def _value_of(spike_fn):
    """The same function without its own gradient (straight-through), for which Triton has no code."""
    if isinstance(spike_fn, functools.partial) and isinstance(spike_fn.func, jax.custom_vjp):
        return functools.partial(spike_fn.func.__wrapped__, *spike_fn.args, **spike_fn.keywords)
    return spike_fn


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _neurons(current, state, neuron, block_size):
    """Spikes `[T, N]` and the last state `[N]`, from currents `[T, N]`; N is a multiple of the block."""
    return _forward(current, state, neuron, block_size, keep_potentials=False)


def _neurons_fwd(current, state, neuron, block_size):
    spikes, last, potentials = _forward(current, state, neuron, block_size, keep_potentials=True)
    return (spikes, last), (potentials, state)


def _neurons_bwd(neuron, block_size, residuals, cotangents):
    return _backward(*residuals, *cotangents, neuron, block_size)


_neurons.defvjp(_neurons_fwd, _neurons_bwd)


def _specs(num_time_steps, block_size):
    """How a block of neurons is cut out of `[T, N]` and of `[N]`."""
    return pl.BlockSpec((num_time_steps, block_size), lambda i: (0, i)), pl.BlockSpec((block_size,), lambda i: (i,))


def _call(kernel, outputs, specs, arguments, block_size):
    backend = jax.default_backend()
    return pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape, _ in outputs],
        in_specs=specs,
        out_specs=[spec for _, spec in outputs],
        grid=(arguments[0].shape[-1] // block_size,),
        interpret=backend == "cpu",
        compiler_params=triton.CompilerParams() if backend == "gpu" else None,
    )(*arguments)


def _forward(current, state, neuron, block_size, *, keep_potentials):
    num_time_steps = len(current)
    settings = dict(neuron)
    settings["spike_fn"] = _value_of(settings["spike_fn"])

    def kernel(current_ref, potential_ref, spikes_ref, all_spikes_ref, last_potential_ref, last_spikes_ref, *potentials_ref):
        def step(t, state):
            state = lif_step(state, current_ref[t, :], **settings)
            all_spikes_ref[t, :] = state.spikes
            for ref in potentials_ref:
                ref[t, :] = state.potential
            return state

        start = LIFState(potential_ref[...], spikes_ref[...])
        last_potential_ref[...], last_spikes_ref[...] = jax.lax.fori_loop(0, num_time_steps, step, start)

    rows, row = _specs(num_time_steps, block_size)
    outputs = [(current.shape, rows), (current.shape[1:], row), (current.shape[1:], row)]
    outputs += [(current.shape, rows)] if keep_potentials else []
    spikes, potential, last_spikes, *potentials = _call(kernel, outputs, [rows, row, row], (current, *state), block_size)
    return spikes, LIFState(potential, last_spikes), *potentials


def _backward(potentials, initial_state, spikes_cotangent, last_cotangent, neuron, block_size):
    num_time_steps = len(potentials)
    settings = dict(neuron)
    threshold, spike_fn = settings["threshold"], settings.pop("spike_fn")

    def kernel(potentials_ref, potential_ref, spikes_ref, cotangent_ref, last_potential_ref, last_spikes_ref, *outputs):
        current_ref, first_potential_ref, first_spikes_ref = outputs

        def step(i, carry):
            potential_cotangent, spikes_cotangent = carry
            t = num_time_steps - 1 - i
            _, through_spikes = jax.vjp(lambda u: spike_fn(u - threshold), potentials_ref[t, :])
            potential_cotangent += through_spikes(spikes_cotangent + cotangent_ref[t, :])[0]
            current_ref[t, :] = potential_cotangent
            earlier = potentials_ref[jnp.maximum(t - 1, 0), :]
            is_first = t == 0
            before = LIFState(
                jnp.where(is_first, potential_ref[...], earlier),
                jnp.where(is_first, spikes_ref[...], _value_of(spike_fn)(earlier - threshold)),
            )
            _, through_reset = jax.vjp(lambda state: remaining_potential(state, **settings), before)
            return tuple(through_reset(potential_cotangent)[0])

        last = last_potential_ref[...], last_spikes_ref[...]
        first_potential_ref[...], first_spikes_ref[...] = jax.lax.fori_loop(0, num_time_steps, step, last)

    rows, row = _specs(num_time_steps, block_size)
    arguments = (potentials, *initial_state, spikes_cotangent, *last_cotangent)
    outputs = [(potentials.shape, rows), (potentials.shape[1:], row), (potentials.shape[1:], row)]
    current, potential, spikes = _call(kernel, outputs, [rows, row, row, rows, row, row], arguments, block_size)
    return current, LIFState(potential, spikes)
