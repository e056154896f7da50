r"""Whole networks: what holds of each layer, how far an input or a weight can move the output, when hard spikes decide alike.

Everything is derived from the network's own synapses, so that padding, pooling and dropped borders are exact. A synapse is
an affine map :math:`x \mapsto A x + b`; :math:`|A|` has the absolute values of its entries. Computed in float64; statements are
proved in `docs/theory.md` up to rounding.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sast_jax.networks import SpikingNetwork
from sast_jax.neurons import LIFState, leaky_readout, lif_init, lif_step
from sast_jax.randomness import make_key
from sast_jax.spikes import FAMILIES, Mode, spike_fn
from sast_jax.theory import neuron as neuron_lib
from sast_jax.theory.neuron import Array, in_float64, time_gain

NORM_ITERATIONS = 30
TINY = 1e-200
PROBE = 1e-2  # Step of the differences that choose what is measured.


class LayerBounds(NamedTuple):
    r"""What is proved of one layer, for all recordings in a range.

    Attributes:
        name: Name of its weights.
        norm_inf: :math:`\|A\|_\infty`, exact.
        norm_2: Certified upper bound of :math:`\|A\|_2`.
        norm_2_estimate: Estimate of :math:`\|A\|_2`, from below, by power iteration.
        contraction: :math:`\kappa` over all reals; `None` for a readout that does not spike, as the next four.
        contraction_reachable: Largest :math:`\kappa` of its neurons, each over the potentials it can reach.
        potential_low: Lowest potential of each neuron.
        potential_high: Highest one.
        spikes: Smallest and largest smooth spike of each neuron.
        gain: The layer's Lipschitz constant, sup over time and neurons (of logits for the readout).
        gain_2: The same in the Euclidean norm over time and neurons.
        lipschitz: Largest change of its spikes (or logits) when no pixel at any time changes by more than 1.
    """

    name: str
    norm_inf: float
    norm_2: float
    norm_2_estimate: float
    contraction: float | None
    contraction_reachable: float | None
    potential_low: Array | None
    potential_high: Array | None
    spikes: tuple[Array, Array] | None
    gain: float
    gain_2: float
    lipschitz: float


def neuron_parameters(network: SpikingNetwork) -> dict[str, Any]:
    """Returns the parameters that the functions of `sast_jax.theory.neuron` take."""
    return {key: getattr(network, key) for key in ("decay", "threshold", "reset", "family", "slope")}


def _synapse(network, params, index):
    bound = network.bind({"params": params})
    return lambda x: bound.current(index, x)


def _currents(network, params, index, x):
    """The currents of all time steps, from the layer's input `[T, B, ...]`."""
    current = _synapse(network, params, index)(x.reshape(-1, *x.shape[2:]))
    return current.reshape(*x.shape[:2], *current.shape[1:])


def _magnitudes(params):
    """Weights whose synapses are |A| without bias."""
    return {name: {"kernel": jnp.abs(each["kernel"]), "bias": jnp.zeros_like(each["bias"])} for name, each in params.items()}


def _wide(params):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)


def _readout_gain(decay, num_time_steps):
    """Largest mean over time of a leaky integrator whose input is at most 1."""
    return float(np.mean([time_gain(decay, t) for t in range(1, num_time_steps + 1)]))


@in_float64
def layer_bounds(
    network: SpikingNetwork, params: Any, frame_low: jax.typing.ArrayLike, frame_high: jax.typing.ArrayLike, num_time_steps: int
) -> list[LayerBounds]:
    r"""Bounds every layer of a surrogate-forward network, for all recordings whose pixels stay in a range (Theorems 1 to 3).

    Layer by layer: the range of the input gives that of each neuron's current (exact for an affine map), this its reachable
    potentials, these its contraction factor :math:`\kappa_i`, its steepest :math:`\sigma'_i` and the range of its spikes, which
    are the next layer's input. With :math:`S_T(\kappa) = \sum_{j < T} \kappa^j`,

    .. math:: |\Delta s_i| \le \sigma'_i\, S_T(\kappa_i) \sum_j |A_{ij}|\, \sup_t |\Delta x_j|, \qquad
              gain = \max_i \sigma'_i\, S_T(\kappa_i) \sum_j |A_{ij}|

    The Lipschitz constant is found by passing the change of each neuron on, not their maximum: it is at most the product of the
    gains, which is at most :math:`\prod_l L_1 \|A_l\|_\infty / (1 - \kappa_l)`.

    Args:
        network: The network.
        params: Its weights.
        frame_low: `[H, W, C]`, the lowest value of each pixel.
        frame_high: `[H, W, C]`, the highest one.
        num_time_steps: Number of time steps T.

    Returns:
        The bounds of each layer, the readout's last.

    Raises:
        ValueError: If a range is empty.
    """
    params = _wide(params)
    low, high = np.asarray(frame_low, float), np.asarray(frame_high, float)
    if not np.all(low <= high):
        raise ValueError("frame_low must be at most frame_high")
    neuron = neuron_parameters(network)
    change, bounds = np.ones_like(low), []
    for index, name in enumerate(network.layer_names):
        current_low, current_high, rows, change, norm_2, norm_2_estimate = map(
            np.asarray, _current_bounds(network, index, params, low, high, change)
        )
        potential_low = potential_high = spikes = contraction = reachable = None
        if index < network.num_spiking:
            potential_low, potential_high = neuron_lib.reachable_potentials(current_low, current_high, num_time_steps, **neuron)
            contraction = float(neuron_lib.contraction_factor(**neuron))
            factors = neuron_lib.contraction_factor(**neuron, low=potential_low, high=potential_high)
            reachable = float(factors.max())
            steepest = np.clip(network.threshold, potential_low, potential_high)
            at_steepest, at_low, at_high = (
                neuron_lib.surrogate(u, network.threshold, network.family, network.slope)
                for u in (steepest, potential_low, potential_high)
            )
            scale = np.asarray(at_steepest[1]) * time_gain(factors, num_time_steps)
            low, high = spikes = np.asarray(at_low[0]), np.asarray(at_high[0])
            if index == len(network.layer_names) - 1:
                scale = scale * num_time_steps  # A rate readout counts the spikes.
        else:
            scale = _readout_gain(network.readout_decay, num_time_steps)
        change = scale * change
        bounds.append(
            LayerBounds(
                name=name,
                norm_inf=float(rows.max()),
                norm_2=float(norm_2),
                norm_2_estimate=float(norm_2_estimate),
                contraction=contraction,
                contraction_reachable=reachable,
                potential_low=potential_low,
                potential_high=potential_high,
                spikes=spikes,
                gain=float((scale * rows).max()),
                gain_2=float(np.max(scale) * norm_2),
                lipschitz=float(change.max()),
            )
        )
    return bounds


@functools.partial(jax.jit, static_argnums=(0, 1))
def _current_bounds(network, index, params, low, high, change):
    """Of a layer's currents: lowest, highest, largest change per change of inputs by 1 and by `change`; `_norms_2`."""
    synapse, magnitude = _synapse(network, params, index), _synapse(network, _magnitudes(params), index)
    centre = synapse((low + high)[None] / 2)[0]
    radius, rows, change = magnitude(jnp.stack([(high - low) / 2, jnp.ones_like(low), change]))
    return centre - radius, centre + radius, rows, change, *_norms_2(network, index, low.shape, params)


def _norms_2(network, index, shape, params):
    """A certified upper bound and an estimate from below of the Euclidean norm of a synapse."""

    def squared(params):
        synapse = _synapse(network, params, index)
        offset, transpose = jax.vjp(synapse, jnp.zeros((1, *shape)))
        return lambda x: transpose(synapse(x) - offset)[0]

    upper, lower = squared(_magnitudes(params)), squared(params)

    def step(_, carry):
        v, best, w, _ = carry
        image, other = upper(v), lower(w)
        # Collatz and Wielandt: for v > 0 the norm of a non-negative matrix is at most its largest growth of an entry of v.
        best = jnp.minimum(best, jnp.max(image / v))
        size = jnp.linalg.norm(other.ravel())
        v = jnp.maximum(image / jnp.maximum(jnp.max(image), TINY), TINY)
        return v, best, other / jnp.maximum(size, TINY), size

    start = jax.random.normal(make_key(0), (1, *shape))
    first = jnp.ones((1, *shape)), jnp.inf, start / jnp.linalg.norm(start.ravel()), 0.0
    _, best, _, size = jax.lax.fori_loop(0, NORM_ITERATIONS, step, first)
    return jnp.sqrt(best), jnp.sqrt(size)


def run_layer(network: SpikingNetwork, params: Any, index: int, x: jax.Array, mode: Mode = "surrogate") -> LIFState:
    """Returns potentials and spikes `[T, B, ...]` of one spiking layer, given its input `[T, B, ...]`."""
    current = _currents(network, params, index, x)
    fn = spike_fn(mode, network.family, network.slope)

    def step(state, now):
        state = lif_step(state, now, decay=network.decay, threshold=network.threshold, reset=network.reset, spike_fn=fn)
        return state, state

    return jax.lax.scan(step, lif_init(current[0]), current)[1]


def run_layers(network: SpikingNetwork, params: Any, frames: jax.Array, mode: Mode = "surrogate") -> list[LIFState]:
    """Returns potentials and spikes `[T, B, ...]` of every spiking layer, given frames `[T, B, H, W, C]`."""
    states: list[LIFState] = []
    for index in range(network.num_spiking):
        states.append(run_layer(network, params, index, states[-1].spikes if states else frames, mode))
    return states


def measured_gain(function: Callable[[jax.Array], jax.Array], x: jax.Array, *, num_rounds: int = 3, seed: int = 0) -> float:
    r"""Measures the largest change of an output per change of the input, in the sup norm: an estimate from below.

    The power method for :math:`\|J\|_\infty` at each sample: take the output that a change of signs moves most, then the signs
    that move this output most, and so on.

    Args:
        function: From the input to an output `[T, B, ...]` or `[B, K]`; samples do not mix.
        x: `[T, B, ...]`.
        num_rounds: Rounds of the power method.
        seed: Seed of the first signs.
    """

    @jax.jit
    def run(x):
        signs = jnp.sign(jax.random.normal(make_key(seed), x.shape))
        output, transpose = jax.vjp(function, x)
        for _ in range(num_rounds):
            # A difference, as convolutions have no forward derivative; it only chooses the output.
            change = jnp.moveaxis(function(x + PROBE * signs) - output, 1 if output.ndim > 2 else 0, 0)
            flat = jnp.abs(change.reshape(len(change), -1))
            most = jax.nn.one_hot(flat.argmax(1), flat.shape[1], dtype=output.dtype).reshape(change.shape)
            (gradient,) = transpose(jnp.moveaxis(most, 0, 1 if output.ndim > 2 else 0))
            signs = jnp.sign(gradient)
        size = jnp.sum(jnp.abs(gradient), axis=(0, *range(2, x.ndim)))
        return jnp.max(size)

    return float(run(x))


class SmoothnessBounds(NamedTuple):
    """Bounds over a ball of weights.

    Attributes:
        gradient: Of the norm of the loss's gradient.
        smoothness: Of the Lipschitz constant of the gradient: of the size of every eigenvalue of the Hessian.
    """

    gradient: float
    smoothness: float


@in_float64
def smoothness_bounds(
    network: SpikingNetwork, params: Any, frames: jax.typing.ArrayLike, radius: float = 0.0, *, layers: tuple[str, ...] = ()
) -> SmoothnessBounds:
    r"""Bounds gradient and curvature of the mean cross-entropy of given recordings, for weights in a ball (Theorem 5).

    A recursion over layers for the first and second derivative along any unit direction of weight space. With
    :math:`a, d` bounds of those of a layer's input and :math:`R, C, N` of its current's dependence on its weights and input,

    .. math::
        i_1 &= R + N a, & i_2 &= 2 C a + N d \\
        v_1 &= S_T(\kappa)\, i_1, & v_2 &= S_T(\kappa) (M_2 v_1^2 + i_2) \\
        a' &= L_1 v_1, & d' &= L_1 v_2 + L_2 v_1^2

    and for the loss :math:`\|\nabla F\| \le \sqrt 2\, y_1`, :math:`\|\nabla^2 F\| \le \tfrac12 y_1^2 + \sqrt 2\, y_2` of the
    logits. Proved. For :math:`\kappa > 1` exponential in :math:`T`, and infinite where a float64 cannot hold it.

    Args:
        network: In surrogate mode.
        params: Centre of the ball.
        frames: `[T, B, H, W, C]`, the recordings (their largest norm counts).
        radius: Radius of the ball, in the norm of all weights as one vector.
        layers: Names of the layers that are trained, all by default. If only the first is, its weights may be any.
    """
    if radius < 0:
        raise ValueError(f"radius must be at least 0; got {radius!r}")
    unknown = set(layers) - set(network.layer_names)
    if unknown:
        raise ValueError(f"layers must be of {', '.join(network.layer_names)}; got {', '.join(sorted(unknown))}")
    params, x = _wide(params), np.asarray(frames, np.float64)
    num_time_steps = x.shape[0]
    neuron, family = neuron_parameters(network), FAMILIES[network.family]
    steep, bend = family.max_derivative(network.slope), family.max_second_derivative(network.slope)
    curl = neuron_lib.max_second_derivative(**neuron)
    gain = float(time_gain(neuron_lib.contraction_factor(**neuron), num_time_steps))
    ones = jax.tree.map(np.ones_like, params)
    first = second = 0.0
    squares = np.square(x).reshape(-1, *x.shape[2:])
    for index, name in enumerate(network.layer_names):
        patch, column, norm, squares = _derivative_bounds(network, index, params, ones, squares)
        is_trained = not layers or name in layers
        weight_norm, both = (math.sqrt(float(each)) if is_trained else 0.0 for each in (patch, column))
        norm = float(norm) + both * radius
        current_first, current_second = weight_norm + norm * first, 2 * both * first + norm * second
        if index < network.num_spiking:
            state_first = gain * current_first
            square = state_first * state_first  # A power would raise where a product overflows.
            state_second = gain * (curl * square + current_second)
            first, second = steep * state_first, steep * state_second + bend * square
            scale = num_time_steps if index == len(network.layer_names) - 1 else 1
        else:
            first, second, scale = current_first, current_second, _readout_gain(network.readout_decay, num_time_steps)
    first, second = scale * first, scale * second
    bounds = math.sqrt(2) * first, first * first / 2 + math.sqrt(2) * second
    return SmoothnessBounds(*(math.inf if math.isnan(bound) else bound for bound in bounds))  # NaN: 0 times infinity.


@functools.partial(jax.jit, static_argnums=(0, 1))
def _derivative_bounds(network, index, params, ones, squares):
    """The squares of R and C of `smoothness_bounds`, the norm of the synapse, and the squares of the largest spikes.

    `ones` are weights of 1. They are an argument because the compiled sum of a large convolution with a constant kernel is wrong
    on a CPU (jaxlib 0.10.2).
    """
    # Sums over the places of a kernel, for one channel: all are equal.
    patches = _synapse(network, ones, index)(squares)
    no_bias = _synapse(network, _magnitudes(ones), index)
    columns = jax.grad(lambda v: no_bias(v).mean(-1).sum())(jnp.zeros_like(squares[:1]))
    patch = patches.mean(-1).reshape(len(squares), -1).sum(-1).max()
    return patch, columns.max(), _norms_2(network, index, squares.shape[1:], params)[0], jnp.ones_like(patches[:1])


class Certificate(NamedTuple):
    """Whether hard spikes are certain to decide as smooth ones, per sample, from the smooth trajectory alone.

    Attributes:
        decision: Class that the smooth spikes decide for, `[B]`.
        ratio: Smallest ratio of a lead in logits over its largest possible change by the swap, `[B]`; above 1 is certain.
        spikes_known: Share of the hard spikes that are certain, `[B]`.
    """

    decision: jax.Array
    ratio: jax.Array
    spikes_known: jax.Array


def certify_agreement(network: SpikingNetwork, params: Any, frames: jax.Array) -> Certificate:
    r"""Bounds what the swap to hard spikes can change, along the smooth trajectory (Theorem 6).

    If the hard potential is within :math:`\epsilon` of the smooth one :math:`v`, and :math:`|v - \vartheta| > \epsilon`, the hard
    spike is :math:`H(v - \vartheta)` and differs from the smooth one by :math:`\sigma(-|v - \vartheta|)`; otherwise by at most
    :math:`\max(s, 1 - s)`. The differences of a layer's spikes bound those of the next layer's currents through :math:`|A|`, and
    the neuron carries them on to the next step. Proved; sufficient and not necessary. It uses no hard simulation.

    Args:
        network: The network.
        params: Its weights.
        frames: `[T, B, H, W, C]`.
    """
    magnitudes = _magnitudes(params)
    threshold = network.threshold
    x, difference, known_share = frames, jnp.zeros_like(frames), []
    for index in range(network.num_spiking):
        smooth = run_layer(network, params, index, x)
        error = _currents(network, magnitudes, index, difference)

        def step(carried, now):
            (v, p), error = now
            epsilon = carried + error
            known = jnp.abs(v - threshold) > epsilon
            hard = (v > threshold).astype(v.dtype)
            change = jnp.where(known, jnp.abs(hard - p), jnp.maximum(p, 1 - p))
            if network.reset == "zero":
                size = jnp.abs(v)
                unsure = jnp.maximum(epsilon + size * p, size * (1 - p))
                carried = network.decay * jnp.where(known, (1 - hard) * epsilon + size * change, unsure)
            else:
                carried = network.decay * epsilon + (threshold * change if network.reset == "subtract" else 0)
            return carried, (change, known)

        _, (difference, known) = jax.lax.scan(step, jnp.zeros_like(error[0]), (smooth, error))
        known_share.append(jnp.mean(known.astype(x.dtype), axis=(0, *range(2, known.ndim))))
        x = smooth.spikes
    if network.readout == "rate":
        logits = jnp.sum(x, axis=0)
        each = jnp.sum(difference, axis=0)
        decision = jnp.argmax(logits, -1)
        change = each + jnp.take_along_axis(each, decision[:, None], 1)
    else:

        def run(params, value):
            return leaky_readout(_currents(network, params, network.num_spiking, value), network.readout_decay)

        logits = run(params, x)
        decision = jnp.argmax(logits, -1)
        kernel = params["readout"]["kernel"]
        no_bias = jnp.zeros_like(params["readout"]["bias"])

        def change_from(leader):
            return run({"readout": {"kernel": jnp.abs(kernel[:, [leader]] - kernel), "bias": no_bias}}, difference)

        change = jnp.stack([change_from(leader) for leader in range(kernel.shape[1])])[decision, jnp.arange(len(decision))]
    lead = jnp.take_along_axis(logits, decision[:, None], 1) - logits
    others = jnp.arange(logits.shape[1]) != decision[:, None]
    ratio = jnp.min(jnp.where(others, lead / jnp.maximum(change, jnp.finfo(change.dtype).tiny), jnp.inf), axis=1)
    return Certificate(decision, ratio, jnp.mean(jnp.stack(known_share), axis=0))
