r"""The hard network in integers, as a chip computes it: few-bit weights, fixed-point potentials, shifts for the decay.

With weights :math:`w_f \approx s_f q_f` of output channel :math:`f`, :math:`q_f` integers of :math:`b` bits, symmetric, rounded
to nearest, one :math:`s = \max |w| / (2^{b-1} - 1)` per tensor or per channel, and :math:`p` the sums of spikes over the
:math:`A` neurons of a pooling window, the current is :math:`I = (s_f / A) \sum q_f p + b_f`. Neurons do not mind in which unit
potentials are measured, so each channel counts in units of :math:`s_f / A`: currents are then sums of integers, exactly, and the
scale, the mean of the pooling included, goes into the threshold. A potential has the format Q\ *m.n*:
:math:`U = 2^n u A / s_f` is an integer, cut off at :math:`-2^{m+n}` and :math:`2^{m+n} - 1`. At every step

.. math::
    I &= 2^n \sum q_f p + B, \qquad D(U) = \lfloor (M U + \lfloor 2^{k-1} \rfloor) / 2^k \rfloor \\
    U_t &= \mathrm{cut}\bigl( D(U_{t-1}) \, [s_{t-1} = 0] + I \bigr)       && \text{reset zero} \\
    U_t &= \mathrm{cut}\bigl( D(U_{t-1}) - \Theta s_{t-1} + I \bigr)       && \text{reset subtract} \\
    U_t &= \mathrm{cut}\bigl( D(U_{t-1}) + I \bigr)                        && \text{reset none} \\
    s_t &= [U_t > \Theta]

with :math:`B` the nearest integer to :math:`2^n b_f A / s_f`, and :math:`\Theta` the *floor* of :math:`2^n \vartheta A / s_f`,
because an integer exceeds a number just if it exceeds its floor. :math:`D` is an arithmetic shift to the right of the product,
half of the divisor added before: rounding to nearest, ties upwards. The decay :math:`M / 2^k` is the nearest with :math:`k = 8`
(`fraction`), or :math:`1 - 2^{-k}` (`power`), where :math:`M U = 2^k U - U` takes no multiplication. Near 0 a potential stops
decaying, at :math:`|U| \le 1 / (2 (1 - M / 2^k))`. Logits are sums over time of spikes (rate readout) or of the readout's
potentials (leaky readout, whose weights have one scale in any case, so that its classes are measured in one unit).

Everything fits in int32: `quantize` refuses what could overflow, by a bound over all inputs.

References:
    Jacob et al. Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference. CVPR 2018.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sast_jax.convolution import convolution
from sast_jax.data import Batch, Recordings, evaluation_batches, take_batch
from sast_jax.evaluation.outputs import BATCH_SIZE, map_recordings, predict_logits, trace
from sast_jax.evaluation.synops import count, evaluate_synops
from sast_jax.networks import SpikingNetwork

Granularity = Literal["tensor", "channel"]
DecayForm = Literal["fraction", "power"]

GRANULARITIES: tuple[Granularity, ...] = ("tensor", "channel")
DECAY_FORMS: tuple[DecayForm, ...] = ("fraction", "power")

CONFIGURATIONS: tuple[tuple[int, Granularity, DecayForm], ...] = (
    (8, "tensor", "fraction"),
    (8, "channel", "fraction"),
    (8, "channel", "power"),
    (4, "tensor", "fraction"),
    (4, "channel", "fraction"),
    (4, "channel", "power"),
)
"""Bits of the weights, granularity of their scale and form of the decay that `evaluate_quantization` compares."""

POTENTIAL_BITS = 16
READOUT_BITS = 20
"""Bits of a leaky readout's potentials, which are few and sums over many inputs."""

NUM_COMPARED = 4
"""Recordings on which simulation and reference are compared bit for bit."""

_INT32 = 2**31 - 1
_DECAY_BITS = 8
_FINEST_UNIT = 2.0**-10  # Of the threshold: channels of smaller weights would need wide potentials for steps that nobody sees.


class QuantizedLayer(NamedTuple):
    r"""A layer in integers; the module says how they are used.

    Attributes:
        kernel: q, int8 `[h, w, C, F]` or `[N, F]`.
        bias: B, int32 `[F]`.
        threshold: :math:`\Theta`, int32 `[F]`; the largest int32 where neurons never spike.
        decay: M and k.
        format: m and n.
    """

    kernel: np.ndarray
    bias: np.ndarray
    threshold: np.ndarray
    decay: tuple[int, int]
    format: tuple[int, int]


class Quantized(NamedTuple):
    """A hard network in integers.

    Attributes:
        network: The network, for its shape and reset.
        layers: Its layers.
        max_input: Largest event count in a frame.
        num_time_steps: T.
    """

    network: SpikingNetwork
    layers: tuple[QuantizedLayer, ...]
    max_input: int
    num_time_steps: int


class IntegerOutput(NamedTuple):
    """What integer inference returns.

    Attributes:
        logits: int32 `[B, K]`, up to a positive factor.
        spikes: 0 or 1, int32 `[T, B, ...]`, of each layer of spiking neurons.
        potentials: U, int32 `[T, B, ...]`, of each layer.
    """

    logits: Any
    spikes: tuple[Any, ...]
    potentials: tuple[Any, ...]


def quantize(
    network: SpikingNetwork,
    params: Any,
    *,
    weight_bits: int,
    granularity: Granularity = "channel",
    decay_form: DecayForm = "fraction",
    formats: Sequence[tuple[int, int]] | None = None,
    ranges: Sequence[np.ndarray] | None = None,
    potential_bits: int = POTENTIAL_BITS,
    max_input: int = 255,
    num_time_steps: int,
) -> Quantized:
    """Rounds a network to integers.

    Args:
        network: The network.
        params: Its weights.
        weight_bits: Bits of a weight, sign included, 2 to 8.
        granularity: `tensor`: one scale for all weights of a layer; `channel`: one for each output channel, except in a leaky
            readout.
        decay_form: `fraction`: m / 2^8; `power`: 1 - 2^-k, k up to 8 (0 and 1 are among both).
        formats: Integer and fraction bits (m, n) of each layer's potentials. `None`: chosen from `ranges`.
        ranges: Largest absolute potential `[F]` of each layer's channels, from `potential_ranges`. m covers it, or as much of it
            as `potential_bits` do; n is what they leave, less if int32 could overflow.
        potential_bits: Bits of a potential, sign included.
        max_input: Largest event count that a frame can hold.
        num_time_steps: Number of frames T.

    Returns:
        The network in integers.

    Raises:
        ValueError: If an argument is not allowed, or a threshold does not fit into its format, or the bound on an int32 sum or
            product shows that it could overflow.
    """
    if not 2 <= weight_bits <= 8:
        raise ValueError(f"weight_bits must be 2 to 8; got {weight_bits}")
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity must be one of {', '.join(GRANULARITIES)}; got {granularity!r}")
    if decay_form not in DECAY_FORMS:
        raise ValueError(f"decay_form must be one of {', '.join(DECAY_FORMS)}; got {decay_form!r}")
    if (formats is None) == (ranges is None):
        raise ValueError("give either formats or ranges")
    layers = []
    for index, name in enumerate(network.layer_names):
        is_spiking = index < network.num_spiking
        weights, bias = (np.asarray(params[name][key], np.float64) for key in ("kernel", "bias"))
        area = network.pool_area(index)
        finest = _FINEST_UNIT * network.threshold * area if is_spiking else 0.0
        kernel, scale = _round_weights(weights, weight_bits, granularity if is_spiking else "tensor", finest)
        unit = scale / area
        threshold = network.threshold / unit if is_spiking else None
        if formats is not None:
            candidates = [formats[index]]
        else:
            assert ranges is not None
            reach = float(max(np.max(ranges[index] / unit), 0 if threshold is None else 2 * np.max(threshold)))
            num_bits = (potential_bits if is_spiking else READOUT_BITS) - 1
            integer_bits = min(max(0, math.frexp(reach)[1]), num_bits)
            candidates = [(integer_bits, fraction_bits) for fraction_bits in range(num_bits - integer_bits, -1, -1)]
        for integer_bits, fraction_bits in candidates:
            layer = QuantizedLayer(
                kernel,
                bias=np.rint(bias / unit * 2**fraction_bits),
                threshold=np.full(bias.shape, float(_INT32)) if threshold is None else np.floor(threshold * 2**fraction_bits),
                decay=_round_decay(network.decay if is_spiking else network.readout_decay, decay_form),
                format=(integer_bits, fraction_bits),
            )
            problem = _problem(layer, network.reset, max_input if index == 0 else area, num_time_steps, is_spiking)
            if problem is None:
                break
        else:
            raise ValueError(f"{name}: {problem}")
        layers.append(layer._replace(bias=layer.bias.astype(np.int32), threshold=layer.threshold.astype(np.int32)))
    return Quantized(network, tuple(layers), max_input, num_time_steps)


def _round_weights(weights, bits, granularity, finest):
    """The nearest symmetric integers, and their scale, at least `finest`, for each output channel."""
    limit = 2 ** (bits - 1) - 1
    axes = tuple(range(weights.ndim - (granularity == "channel")))
    scale = np.maximum(np.broadcast_to(np.abs(weights).max(axes) / limit, weights.shape[-1:]), finest)
    scale = np.where(scale > 0, scale, 1.0)
    return np.rint(weights / scale).astype(np.int8), scale


def _round_decay(decay, form):
    """Multiplier M and shift k of the nearest decay of a form."""
    if form == "fraction":
        return round(decay * 2**_DECAY_BITS), _DECAY_BITS
    powers = [(1, 0), *((2**shift - 1, shift) for shift in range(_DECAY_BITS + 1))]
    return min(powers, key=lambda power: abs(power[0] / 2 ** power[1] - decay))


def _problem(layer, reset, largest_input, num_time_steps, is_spiking):
    """What is wrong with a layer whose inputs are integers up to `largest_input`, or `None`."""
    (integer_bits, fraction_bits), (multiplier, shift) = layer.format, layer.decay
    limit = 2 ** (integer_bits + fraction_bits)
    shown = f"Q{integer_bits}.{fraction_bits}"
    if is_spiking and not 0 < layer.threshold.min() <= layer.threshold.max() < limit:
        low, high = layer.threshold.min(), layer.threshold.max()
        return f"thresholds from {low:g} to {high:g} do not fit into {shown}, which holds 1 to {limit - 1}; give it more bits"
    weights = np.abs(layer.kernel.astype(np.int64)).reshape(-1, layer.kernel.shape[-1])
    current = int(weights.sum(0).max()) * largest_input * 2**fraction_bits + int(np.abs(layer.bias).max())
    subtracted = int(layer.threshold.max()) if is_spiking and reset == "subtract" else 0
    products = {
        "a current and the potential": current + limit + subtracted,
        "a potential times its decay": limit * multiplier + 2**shift,
        "the sum of a readout's potentials": 0 if is_spiking else num_time_steps * limit,
    }
    for what, bound in products.items():
        if bound > _INT32:
            return f"{what} could reach {bound} in {shown}, which is more than int32 holds; give it fewer bits"
    return None


def potential_ranges(network: SpikingNetwork, params: Any, recordings: Recordings) -> list[np.ndarray]:
    """Returns the largest absolute potential of each channel `[F]` of each layer, in hard mode, over recordings."""
    maxima = map_recordings(network, lambda frames: _maxima(network, params, frames), recordings)
    return [each.max(0) for each in maxima]


@functools.partial(jax.jit, static_argnums=0)
def _maxima(network, params, frames):
    states = trace(network, params, frames, "hard")
    return [jnp.max(jnp.abs(u.potential), (0, *range(2, u.potential.ndim - 1))) for u in states]


def simulate(quantized: Quantized, frames: np.ndarray) -> IntegerOutput:
    """Runs a network in int32, jitted; equal bit for bit to `reference`.

    Args:
        quantized: From `quantize`.
        frames: `[T, B, H, W, 2]` event counts, of any integer dtype.

    Returns:
        Logits, spikes and potentials.

    Raises:
        ValueError: If the frames are other than the bounds were made for.
    """
    _check(quantized, frames)
    return _simulate(quantized.network, quantized.layers, frames)


def _check(quantized, frames):
    if not np.issubdtype(frames.dtype, np.integer) or frames.shape[0] != quantized.num_time_steps:
        raise ValueError(
            f"frames must be {quantized.num_time_steps} of an integer dtype; got {frames.shape[0]} of {frames.dtype}"
        )
    if frames.size and not 0 <= frames.min() <= frames.max() <= quantized.max_input:
        raise ValueError(f"frames must be 0 to {quantized.max_input}; got {frames.min()} to {frames.max()}")


@functools.partial(jax.jit, static_argnums=0)
def _simulate(network, layers, frames):
    x = jnp.asarray(frames, jnp.int32)
    spikes, potentials = [], []
    for index, layer in enumerate(layers):
        pooled = network.pool(index, x.reshape(-1, *x.shape[2:]))
        kernel = layer.kernel.astype(jnp.int32)
        total = convolution(pooled, kernel) if kernel.ndim == 4 else pooled @ kernel
        (integer_bits, fraction_bits), (multiplier, shift) = layer.format, layer.decay
        current = (total << fraction_bits) + layer.bias
        current = current.reshape(*x.shape[:2], *current.shape[1:])
        limit = 1 << (integer_bits + fraction_bits)

        def step(state, current_now, layer=layer, multiplier=multiplier, shift=shift, limit=limit):
            potential, spikes = state
            potential = (potential * multiplier + ((1 << shift) >> 1)) >> shift
            if network.reset == "zero":
                potential = potential * (1 - spikes)
            elif network.reset == "subtract":
                potential = potential - layer.threshold * spikes
            potential = jnp.clip(potential + current_now, -limit, limit - 1)
            state = potential, (potential > layer.threshold).astype(jnp.int32)
            return state, state

        _, (u, x) = lax.scan(step, (jnp.zeros_like(current[0]),) * 2, current)
        spikes.append(x)
        potentials.append(u)
    logits = jnp.sum(spikes[-1] if network.readout == "rate" else potentials[-1], axis=0)
    return IntegerOutput(logits, tuple(spikes[: network.num_spiking]), tuple(potentials))


def reference(quantized: Quantized, frames: np.ndarray) -> IntegerOutput:
    """Runs a network step by step in NumPy integers of 64 bits, written for reading and as an oracle; slow.

    Arguments, result and errors are those of `simulate`, the integers NumPy's int64.
    """
    _check(quantized, frames)
    network, layers = quantized.network, quantized.layers
    states: list[tuple[Any, Any]] = [(0, 0)] * len(layers)
    history = []
    for frame in frames:
        x = frame.astype(np.int64)
        for index, layer in enumerate(layers):
            total = _weigh(_sum_windows(x, math.isqrt(network.pool_area(index))), layer.kernel.astype(np.int64))
            (integer_bits, fraction_bits), (multiplier, shift) = layer.format, layer.decay
            current = total * 2**fraction_bits + layer.bias
            potential, spikes = states[index]
            kept = (potential * multiplier + 2**shift // 2) // 2**shift  # Python's // rounds down, as the shift does.
            if network.reset == "zero":
                kept = np.where(spikes, 0, kept)
            elif network.reset == "subtract":
                kept = np.where(spikes, kept - layer.threshold, kept)
            potential = np.clip(kept + current, -(2 ** (integer_bits + fraction_bits)), 2 ** (integer_bits + fraction_bits) - 1)
            x = (potential > layer.threshold).astype(np.int64)
            states[index] = potential, x
        history.append(list(states))
    potentials, spikes = (tuple(np.stack(each) for each in zip(*part, strict=True)) for part in _transposed(history))
    logits = (spikes[-1] if network.readout == "rate" else potentials[-1]).sum(0)
    return IntegerOutput(logits, spikes[: network.num_spiking], potentials)


def _transposed(history):
    """Potentials and spikes, each by step and layer."""
    return ([[state[part] for state in states] for states in history] for part in (0, 1))


def _sum_windows(x, size):
    if size == 1:
        return x
    height, width = (n // size * size for n in x.shape[1:3])
    windows = x[:, :height, :width].reshape(len(x), height // size, size, width // size, size, -1)
    return windows.sum((2, 4))


def _weigh(x, kernel):
    """Convolution with zeros around the image, or weighted sums over the flattened input."""
    if kernel.ndim == 2:
        return x.reshape(len(x), -1) @ kernel
    height, width = kernel.shape[:2]
    padding = [((size - 1) // 2, size // 2) for size in (height, width)]
    padded = np.pad(x, [(0, 0), *padding, (0, 0)])
    rows, columns = x.shape[1:3]
    return sum(padded[:, i : i + rows, j : j + columns] @ kernel[i, j] for i in range(height) for j in range(width))


def evaluate_quantization(
    network: SpikingNetwork,
    params: Any,
    calibration: Recordings,
    test: Recordings,
    *,
    max_input: int,
    configurations: Sequence[tuple[int, Granularity, DecayForm]] = CONFIGURATIONS,
    potential_bits: int = POTENTIAL_BITS,
    report: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Compares the hard network in floats with its integer forms.

    Args:
        network: The network.
        params: Its weights.
        calibration: Recordings from which the formats of potentials are chosen.
        test: Recordings on which everything is measured.
        max_input: Largest event count that a frame can hold.
        configurations: As `CONFIGURATIONS`.
        potential_bits: Bits of a potential.
        report: Called with the configuration that comes next.

    Returns:
        `quantization` of `sast_jax.evaluation`.
    """
    ranges = potential_ranges(network, params, calibration)
    decisions = predict_logits(network, params, test, "hard").argmax(-1)
    num_weights, num_biases = (sum(params[name][key].size for name in network.layer_names) for key in ("kernel", "bias"))
    states = jax.eval_shape(lambda frames: trace(network, params, frames, "hard"), take_batch(test, np.arange(1)).frames)
    num_neurons = [math.prod(state.potential.shape[2:]) for state in states]
    rows = []
    for bits, granularity, decay_form in configurations:
        report(f"INT{bits} per {granularity}, decay {decay_form}")
        quantized = quantize(
            network,
            params,
            weight_bits=bits,
            granularity=granularity,
            decay_form=decay_form,
            ranges=ranges,
            potential_bits=potential_bits,
            max_input=max_input,
            num_time_steps=test.frames.shape[1],
        )
        decided, synops, saturation_rates = _measure(quantized, test)
        first = take_batch(test, np.arange(min(NUM_COMPARED, len(test.labels)))).frames
        is_equal = jax.tree.map(np.array_equal, tuple(simulate(quantized, first)), tuple(reference(quantized, first)))
        rows.append(
            {
                "weight_bits": bits,
                "granularity": granularity,
                "decay_form": decay_form,
                "potential_bits": potential_bits,
                "accuracy": float(np.mean(decided == test.labels)),
                "agreement": float(np.mean(decided == decisions)),
                "synops": _totals(synops),
                "memory": _memory(
                    weights=bits * num_weights,
                    biases=32 * num_biases,
                    thresholds=32 * sum(len(set(layer.threshold.tolist())) for layer in quantized.layers[: network.num_spiking]),
                    potentials=sum((1 + sum(layer.format)) * n for layer, n in zip(quantized.layers, num_neurons, strict=True)),
                ),
                "layers": {
                    name: {
                        "integer_bits": layer.format[0],
                        "fraction_bits": layer.format[1],
                        "decay": layer.decay[0] / 2 ** layer.decay[1],
                        "spike_rate": synops["layers"][name]["spike_rate"],
                        "saturation_rate": rate,
                    }
                    for name, layer, rate in zip(network.layer_names, quantized.layers, saturation_rates, strict=True)
                },
                "reference": {"num_compared": first.shape[1], "equal": all(jax.tree.leaves(is_equal))},
            }
        )
    return {
        "num_test": len(test.labels),
        "float": {
            "accuracy": float(np.mean(decisions == test.labels)),
            "synops": _totals(evaluate_synops(network, params, test)),
            "memory": _memory(
                weights=32 * num_weights,
                biases=32 * num_biases,
                thresholds=32 * network.num_spiking,
                potentials=32 * sum(num_neurons),
            ),
        },
        "configurations": rows,
    }


def _memory(**bits):
    """Bytes of each kind and in total."""
    num_bytes = {kind: math.ceil(number / 8) for kind, number in bits.items()}
    return {**num_bytes, "total": sum(num_bytes.values())}


def _totals(synops):
    return {key: value for key, value in synops.items() if key not in ("layers", "num_test")}


def _measure(quantized, recordings):
    """Decisions `[N]`, synaptic operations, and the share of each layer's potentials that are at a limit."""
    network, layers = quantized.network, quantized.layers
    decided, saturated = [], []

    def batches() -> Iterator[tuple[Batch, tuple[jax.Array, ...]]]:
        for batch in evaluation_batches(recordings, min(BATCH_SIZE, len(recordings.labels))):
            output = simulate(quantized, batch.frames)
            decided.append(np.asarray(output.logits).argmax(-1)[batch.mask])
            limits = [1 << sum(layer.format) for layer in layers]
            pairs = zip(output.potentials, limits, strict=True)
            saturated.append(
                [np.mean((u == limit - 1) | (u == -limit), (0, *range(2, u.ndim)))[batch.mask] for u, limit in pairs]
            )
            yield batch, output.spikes

    kernels = {
        name: {"kernel": layer.kernel, "bias": layer.bias} for name, layer in zip(network.layer_names, layers, strict=True)
    }
    synops = count(network, kernels, batches())
    return np.concatenate(decided), synops, [float(np.concatenate(each).mean()) for each in zip(*saturated, strict=True)]
