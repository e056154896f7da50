"""Which assumptions of the theory a trained network meets, what its bounds are, and how far they are from what is measured."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sast_jax.data import Recordings, take_batch
from sast_jax.networks import SpikingNetwork
from sast_jax.theory import network as network_lib
from sast_jax.theory import neuron as neuron_lib
from sast_jax.theory import training as training_lib

NUM_RECORDINGS = 64
"""At most so many recordings are measured."""

NUM_MECHANISM = 8
"""At most so many are measured one by one for the mechanism bound, which takes a gradient per class."""


class Statement(NamedTuple):
    """A row of the report; what does not apply is `None`.

    Attributes:
        layer: Name of the layer, or `network` or `training`.
        statement: What is stated, and where it is proved in `docs/theory.md`.
        assumption: What must hold, with its value.
        holds: Whether it does.
        measured: What the bound is of, as measured.
        bound: The bound.
        vacuous: Whether the bound says no more than is known without it.
    """

    layer: str
    statement: str
    assumption: str
    holds: bool
    measured: float | None = None
    bound: float | None = None
    vacuous: bool = False

    @property
    def tightness(self) -> float | None:
        """Measured over bound: 1 is tight, 0 loose."""
        return self.measured / self.bound if self.measured is not None and self.bound else None


def evaluate_theory(
    network: SpikingNetwork,
    params: Any,
    recordings: Recordings,
    *,
    rho: float,
    max_count: int,
    covered: dict[str, bool],
) -> list[Statement]:
    """Compares the bounds of a network with what some recordings measure.

    Args:
        network: The network; all but the certificate is about surrogate mode.
        params: Its weights.
        recordings: At least one; the first `NUM_RECORDINGS` are used.
        rho: Radius of SAM, for its first-order bounds.
        max_count: Largest value of a pixel.
        covered: What the convergence theorem assumes of training, in words, and whether it is so.

    Returns:
        The statements, layer by layer.
    """
    batch = take_batch(recordings, np.arange(min(NUM_RECORDINGS, len(recordings.labels))))
    frames, labels = jnp.asarray(batch.frames, jnp.float32), jnp.asarray(batch.labels)
    return [
        *_layer_statements(network, params, frames, max_count),
        *_curvature_statements(network, params, frames, labels, rho),
        _mechanism_statement(network, params, frames[:, :NUM_MECHANISM], labels[:NUM_MECHANISM]),
        _certificate_statement(network, params, frames),
        Statement(
            "training",
            "convergence (theorem 8)",
            "not met: " + (", ".join(name for name, holds in covered.items() if not holds) or "none"),
            all(covered.values()),
        ),
    ]


def _layer_statements(network, params, frames, max_count):
    neuron = network_lib.neuron_parameters(network)
    shape = frames.shape[2:]
    bounds = network_lib.layer_bounds(network, params, np.zeros(shape), np.full(shape, max_count), frames.shape[0])
    inputs = f"pixels in [0, {max_count}], {frames.shape[0]} steps"
    states = jax.device_get(jax.jit(functools.partial(network_lib.run_layers, network))(params, frames))
    x = frames
    for index, (layer, state) in enumerate(zip(bounds, states, strict=False)):
        measured = float(np.max(np.abs(neuron_lib.carry_over_slope(state.potential, **neuron))))
        yield Statement(
            layer.name,
            "contraction, all potentials (theorem 2)",
            f"kappa < 1: {layer.contraction:.3f}",
            layer.contraction < 1,
            measured,
            layer.contraction,
            layer.contraction >= 1,
        )
        yield Statement(
            layer.name,
            "contraction, potentials within reach (theorem 2)",
            f"kappa < 1: {layer.contraction_reachable:.3f}; {inputs}",
            layer.contraction_reachable < 1,
            measured,
            layer.contraction_reachable,
            layer.contraction_reachable >= 1,
        )
        reach = float(np.maximum(-layer.potential_low, layer.potential_high).max())
        yield Statement(
            layer.name, "size of the potential (theorem 1)", inputs, True, float(np.abs(state.potential).max()), reach
        )
        gain = network_lib.measured_gain(lambda x, i=index: network_lib.run_layer(network, params, i, x).spikes, x)
        is_trivial = layer.gain >= 1  # A smooth spike stays within (0, 1) whatever happens.
        yield Statement(layer.name, "gain of the layer, sup norm (theorem 3)", inputs, True, gain, layer.gain, is_trivial)
        yield _norm_statement(layer)
        x = state.spikes
    if network.readout == "leaky":
        yield _norm_statement(bounds[-1])
    gain = network_lib.measured_gain(lambda x: network.apply({"params": params}, x).logits, frames)
    # What the logits can change at most, as spikes lie in (0, 1).
    known = bounds[-1].gain if network.readout == "leaky" else frames.shape[0]
    bound = bounds[-1].lipschitz
    yield Statement("network", "gain from pixels to logits, sup norm (theorem 3)", inputs, True, gain, bound, bound >= known)


def _norm_statement(layer):
    return Statement(
        layer.name, "Euclidean norm of the synapse (estimated, certified)", "none", True, layer.norm_2_estimate, layer.norm_2
    )


def _curvature_statements(network, params, frames, labels, rho):
    in_loop = network.clone(time_loop="scan")  # The kernels of GPUs have no second derivative.

    def loss_fn(params, frames, labels):
        logits = in_loop.apply({"params": params}, frames).logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    value_and_grad = jax.jit(jax.value_and_grad(loss_fn))
    loss, gradient = value_and_grad(params, frames, labels)
    norm = float(optax.tree.norm(gradient))
    analytic = network_lib.smoothness_bounds(network, params, frames, rho)
    sizes = [max(map(abs, training_lib.hessian_extremes(loss_fn, params, frames, labels, tolerance=1e-2)))]
    near = f"weights within {rho:g}"
    # An infinite bound says nothing, and JSON has no number for it.
    gradient_bound, smoothness = (bound if math.isfinite(bound) else None for bound in analytic)
    title = "norm of the loss's gradient (theorem 5)"
    yield Statement("network", title, near, True, norm, gradient_bound, gradient_bound is None)
    # Where its first-order bound allows a negative loss, which there is none of, it says nothing either.
    says_nothing = smoothness is None or training_lib.sam_sandwich(float(loss), norm, rho, smoothness)[0] < 0
    yield Statement("network", "curvature of the loss (theorem 5)", near, True, sizes[0], smoothness, says_nothing)
    if not rho:
        return
    perturbed = jax.tree.map(lambda w, g: w + rho * g / norm, params, gradient)
    sizes.append(max(map(abs, training_lib.hessian_extremes(loss_fn, perturbed, frames, labels, tolerance=1e-2))))
    value = float(value_and_grad(perturbed, frames, labels)[0])
    lower, upper = training_lib.sam_sandwich(float(loss), norm, rho, max(sizes))
    yield Statement(
        "network",
        "loss at the perturbed weights (lemma 7)",
        f"estimate, curvature {max(sizes):.3g} as at both ends; >= {lower:.3g}",
        lower <= value <= upper,
        value,
        upper,
    )


def _mechanism_statement(network, params, frames, labels):
    @jax.jit
    def each(params, frames, label):
        logits = lambda params, frames: network.apply({"params": params}, frames[:, None]).logits[0]  # noqa: E731
        jacobian_w, jacobian_x = jax.jacrev(logits, argnums=(0, 1))(params, frames)
        error = jax.nn.softmax(logits(params, frames)) - jax.nn.one_hot(label, network.num_classes)
        flat = jnp.concatenate([leaf.reshape(network.num_classes, -1) for leaf in jax.tree.leaves(jacobian_w)], axis=1)
        return jacobian_x.reshape(network.num_classes, -1), flat, error

    name, ratios, factors = "input gradient over weight gradient (lemma 9)", [], []
    for sample, label in zip(frames.swapaxes(0, 1), labels, strict=True):
        x, w, error = (np.asarray(value, float) for value in each(params, sample, label))
        try:
            factors.append(training_lib.mechanism_factor(x, w)[0])
        except ValueError:
            return Statement(
                "network", "input gradient over weight gradient (lemma 9)", "independent weight gradients: no", False
            )
        ratios.append(np.linalg.norm(error @ x) / np.linalg.norm(error @ w))
    worst = int(np.argmax(np.divide(ratios, factors)))
    return Statement("network", name, "independent weight gradients: yes", True, float(ratios[worst]), float(factors[worst]))


def _certificate_statement(network, params, frames):
    @jax.jit
    def decide(params, frames):
        hard = network.apply({"params": params}, frames, "hard").logits.argmax(-1)
        return network_lib.certify_agreement(network, params, frames), hard

    certificate, hard = jax.device_get(decide(params, frames))
    certified = float(np.mean(certificate.ratio > 1))
    return Statement(
        "network",
        "decisions that the swap keeps, and certified share of them (theorem 6)",
        f"lead over its largest change, median: {float(np.median(certificate.ratio)):.2g}",
        certified > 0,
        float(np.mean(hard == certificate.decision)),
        certified,
        certified == 0,
    )


def format_statements(statements: list[dict[str, Any]]) -> str:
    """Returns the table of the report as text; a statement is the dict of a `Statement` and its `tightness`."""
    header = ("layer", "statement", "assumption", "holds", "measured", "bound", "measured / bound")

    def number(value):
        return "-" if value is None else f"{value:.3g}"

    rows = [
        (
            each["layer"],
            each["statement"],
            each["assumption"],
            "yes" if each["holds"] else "no",
            number(each["measured"]),
            number(each["bound"]) + (" (vacuous)" if each["vacuous"] else ""),
            number(each["tightness"]),
        )
        for each in statements
    ]
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    return "\n".join(
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in [header, *rows]
    )
