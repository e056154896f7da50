import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sast_jax import FAMILIES, SpikingConvNet, SpikingMLP, sam
from sast_jax.data import Recordings
from sast_jax.evaluation.theory import evaluate_theory
from sast_jax.theory.certified import cap_currents, keep_projected
from sast_jax.theory.network import (
    certify_agreement,
    layer_bounds,
    measured_gain,
    neuron_parameters,
    run_layers,
    smoothness_bounds,
)
from sast_jax.theory.neuron import contraction_factor, max_current
from tests.test_theory_neuron import COMBINATIONS, SIGMAS, step_map
from tests.weights import random_params

CONV = SpikingConvNet(num_classes=3, features=(3, 4), kernel_size=3, pool_size=2)
MLP = SpikingMLP(num_classes=3, features=(6, 5))


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def init(network, shape, seed=0, scale=1.0):
    """Random weights and, unlike those at the start of training, random biases."""
    return jax.tree.map(lambda leaf: np.float32(scale) * leaf, random_params(network, shape, seed=seed, bias=0.2))


def many_params(network, shape, number):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *(random_params(network, shape, seed=seed) for seed in range(number)))


def as_matrices(network, params, shape):
    """The synapse of each layer as an explicit matrix, from unit vectors."""
    bound, frames = network.bind({"params": params}), jnp.zeros((1, 1, *shape))
    spikes = jax.eval_shape(lambda: network.apply({"params": params}, frames).spikes)
    shapes = [shape, *(each.shape[2:] for each in spikes)][: len(network.layer_names)]

    @jax.jit
    def columns():
        units = [jnp.eye(int(np.prod(each))).reshape(-1, *each) for each in shapes]
        return [bound.current(index, unit) - bound.current(index, 0 * unit) for index, unit in enumerate(units)]

    return [np.asarray(each.reshape(len(each), -1), float).T for each in columns()]


@pytest.mark.parametrize(
    "network", [CONV, slow(MLP), slow(dataclasses.replace(CONV, readout="rate", kernel_size=2))], ids=["conv", "mlp", "rate"]
)
def test_norms_are_those_of_the_explicit_matrix(network):
    shape = (7, 6, 2)  # Neither is a multiple of the pooling twice over.
    params = init(network, shape)
    bounds = layer_bounds(network, params, np.zeros(shape), np.ones(shape), 4)
    assert [layer.name for layer in bounds] == list(network.layer_names)
    for layer, matrix in zip(bounds, as_matrices(network, params, shape), strict=True):
        exact = np.linalg.norm(matrix, 2)
        assert layer.norm_inf == pytest.approx(np.abs(matrix).sum(1).max(), rel=1e-5)
        assert exact * (1 - 0.05) <= layer.norm_2_estimate <= exact * (1 + 1e-5)
        assert (
            exact * (1 - 1e-5) <= layer.norm_2 <= np.sqrt(np.linalg.norm(matrix, 1) * np.linalg.norm(matrix, np.inf)) * (1 + 1e-5)
        )
        assert layer.norm_2 == pytest.approx(np.linalg.norm(np.abs(matrix), 2), rel=0.02)


VARIANTS = [
    slow(dataclasses.replace(CONV, readout="leaky", readout_decay=0.5)),
    dataclasses.replace(CONV, reset="subtract", family="logistic", slope=5.0, readout="rate"),
    slow(dataclasses.replace(MLP, reset="none", family="fast_sigmoid", slope=3.0)),
    dataclasses.replace(MLP, features=(6,), reset="zero", family="arctan", slope=8.0, decay=0.5),
    slow(dataclasses.replace(MLP, reset="zero", family="arctan", slope=8.0, decay=0.5)),
]


@pytest.mark.parametrize("network", VARIANTS, ids=lambda n: f"{type(n).__name__}-{len(n.features)}-{n.reset}")
def test_no_recording_leaves_the_bounds_of_a_network(network):
    shape, num_time_steps = (6, 6, 2), 5
    params = init(network, shape, scale=0.6)
    bounds = layer_bounds(network, params, np.zeros(shape), np.full(shape, 2.0), num_time_steps)
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 3, (2, num_time_steps, 200, *shape)).astype(np.float32)
    frames[:, :, ::3] = 2.0 * rng.integers(0, 2, frames[:, :, ::3].shape)
    near = frames[0] + np.float32(0.01) * rng.choice([-1, 1], frames[0].shape) * (frames[0] == 1)
    run = jax.jit(lambda x: (run_layers(network, params, x), network.apply({"params": params}, x).logits))
    (states, logits), (others, far_logits), (_, near_logits) = (jax.device_get(run(x)) for x in (frames[0], frames[1], near))
    for layer, state, other in zip(bounds, states, others, strict=False):
        for each in (state, other):
            low, high = layer.potential_low, layer.potential_high
            assert ((low - 1e-4 <= each.potential) & (each.potential <= high + 1e-4)).all()
            assert ((layer.spikes[0] - 1e-5 <= each.spikes) & (each.spikes <= layer.spikes[1] + 1e-5)).all()
        assert np.max(layer.spikes[1] - layer.spikes[0]) <= 1
        assert layer.contraction_reachable <= layer.contraction + 1e-12
        assert np.abs(state.spikes - other.spikes).max() <= 2 * layer.lipschitz
    assert np.abs(logits - far_logits).max() <= 2 * bounds[-1].lipschitz
    assert np.abs(logits - near_logits).max() <= 0.01 * bounds[-1].lipschitz * (1 + 1e-3)
    assert bounds[-1].lipschitz <= np.prod([layer.gain for layer in bounds]) * (1 + 1e-9)
    gain = measured_gain(lambda x: network.apply({"params": params}, x).logits, jnp.asarray(frames[0, :, :20]))
    assert gain <= bounds[-1].lipschitz * (1 + 1e-5)
    # The first layer in the Euclidean norm over time and pixels.
    change = np.sqrt(((frames[0] - frames[1]) ** 2).sum((0, 2, 3, 4)))
    moved = np.sqrt(np.square(states[0].spikes - others[0].spikes).reshape(num_time_steps, 200, -1).sum((0, 2)))
    assert (moved <= bounds[0].gain_2 * change * (1 + 1e-5)).all()


def test_a_one_layer_bound_is_nearly_reached():
    network = SpikingMLP(num_classes=2, features=(4,), reset="none", slope=0.5, decay=0.5)
    shape = (2, 2, 1)
    params = {
        name: {**layer, "bias": np.full_like(layer["bias"], 0.5)} for name, layer in init(network, shape, scale=0.3).items()
    }
    (layer, _) = layer_bounds(network, params, np.zeros(shape), np.ones(shape), 6)
    frames = jnp.asarray(np.random.default_rng(0).random((6, 200, *shape)), jnp.float32)
    gain = measured_gain(lambda x: run_layers(network, params, x)[0].spikes, frames)
    assert 0.85 * layer.gain <= gain <= layer.gain


@pytest.mark.parametrize(("family", "reset"), COMBINATIONS)
def test_no_random_network_of_two_layers_exceeds_the_product_bound(family, reset):
    """1,350 networks in numpy: METHOD's product of L1 ||W||_inf / (1 - kappa), with the sum over T steps in its place."""
    number, num_time_steps = 150, 6
    rng = np.random.default_rng(2)
    neuron = {
        "decay": rng.uniform(0, 1, (number, 1)),
        "threshold": rng.uniform(0.2, 2, (number, 1)),
        "slope": rng.uniform(0.5, 8, (number, 1)),
    }
    weights = [rng.normal(0, rng.uniform(0.1, 1.5, (number, 1, 1)), (number, 5, n)) for n in (7, 5)]
    kappa = contraction_factor(family=family, reset=reset, **neuron)[:, 0]
    gain = FAMILIES[family].max_derivative(neuron["slope"][:, 0]) * sum(kappa**j for j in range(num_time_steps))
    x = rng.random((2, num_time_steps, number, 7))
    x[1] = np.where(rng.random((number, 1)) < 0.5, x[1], x[0] + 1e-3 * rng.choice([-1, 1], x[0].shape))
    change, bound = np.abs(x[0] - x[1]).max((0, 2)), 1.0
    for matrix in weights:
        u, outputs = np.zeros((2, number, 5)), []
        for t in range(num_time_steps):
            carried = step_map(u, family, reset, **neuron) if t else 0
            u = carried + np.einsum("nij,anj->ani", matrix, x[:, t])
            outputs.append(SIGMAS[family][0](u - neuron["threshold"], neuron["slope"]))
        x = np.stack(outputs, axis=1)
        bound = bound * gain * np.abs(matrix).sum(2).max(1)
        assert (np.abs(x[0] - x[1]).max((0, 2)) <= bound * change * (1 + 1e-6) + 1e-9).all()


def ravel(tree):
    """`jax.flatten_util.ravel_pytree` in NumPy."""
    leaves, structure = jax.tree.flatten(tree)
    ends = np.cumsum([leaf.size for leaf in leaves])

    def unravel(flat):
        parts = [flat[end - leaf.size : end].reshape(leaf.shape) for leaf, end in zip(leaves, ends, strict=True)]
        return jax.tree.unflatten(structure, parts)

    return np.concatenate([leaf.ravel() for leaf in leaves]), unravel


# Each family and each reset once by default.
@pytest.mark.parametrize(("family", "reset"), [c if i in (0, 4, 8) else slow(*c) for i, c in enumerate(COMBINATIONS)])
def test_gradient_and_hessian_of_random_networks_stay_below_their_bounds(family, reset, float64):
    network = SpikingMLP(num_classes=3, features=(3, 2), family=family, reset=reset, slope=1.5, decay=0.6, readout_decay=0.3)
    shape, radius = (2, 1, 2), 0.5
    rng = np.random.default_rng(3)
    frames, labels = rng.integers(0, 2, (4, 5, *shape)).astype(float), np.arange(5) % 3
    flat, unravel = ravel(jax.tree.map(lambda leaf: leaf.astype(float), init(network, shape, scale=0.5)))
    params = unravel(flat)

    def loss(flat):
        logits = network.apply({"params": unravel(flat)}, frames).logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    steps = rng.normal(size=(100, flat.size))
    steps *= radius * rng.random((100, 1)) / np.linalg.norm(steps, axis=1, keepdims=True)
    gradients, hessians = jax.jit(jax.vmap(lambda w: (jax.grad(loss)(w), jax.hessian(loss)(w))))(flat + steps)
    bounds = smoothness_bounds(network, params, frames, radius)
    assert np.linalg.norm(gradients, axis=1).max() <= bounds.gradient
    curvature = np.abs(np.linalg.eigvalsh(hessians)).max()
    assert curvature <= bounds.smoothness
    assert bounds.smoothness < 1e5 * curvature  # Loose, but a number.
    here = smoothness_bounds(network, params, frames)
    assert here.smoothness < bounds.smoothness
    first = smoothness_bounds(network, params, frames, layers=("dense_0",))
    assert first == smoothness_bounds(
        network, params | {"dense_0": jax.tree.map(lambda w: 9 * w, params["dense_0"])}, frames, layers=("dense_0",)
    )
    is_first = [np.full(leaf.size, name == "dense_0") for name in sorted(params) for leaf in jax.tree.leaves(params[name])]
    where = np.concatenate(is_first)
    assert np.abs(np.linalg.eigvalsh(hessians[:, where][:, :, where])).max() <= bounds.smoothness


@pytest.mark.slow
def test_smoothness_bounds_cover_convolutions_and_rate_readouts(float64):
    network = SpikingConvNet(num_classes=2, features=(2,), kernel_size=2, pool_size=2, readout="rate", slope=1.0, decay=0.5)
    shape = (3, 3, 1)
    flat, unravel = ravel(jax.tree.map(lambda leaf: leaf.astype(float), init(network, shape, scale=0.7)))
    params = unravel(flat)
    frames = np.random.default_rng(0).integers(0, 2, (3, 4, *shape)).astype(float)

    def loss(flat):
        return optax.softmax_cross_entropy_with_integer_labels(
            network.apply({"params": unravel(flat)}, frames).logits, np.array([0, 1, 0, 1])
        ).mean()

    bounds = smoothness_bounds(network, params, frames)
    assert np.linalg.norm(jax.grad(loss)(flat)) <= bounds.gradient
    # Twice backward: a convolution has no forward derivative.
    hessian = jax.jacrev(jax.grad(loss))(flat)
    assert np.abs(np.linalg.eigvalsh(hessian)).max() <= bounds.smoothness


def test_weight_norms_of_convolutions_are_sums_over_their_places():
    """Where a single layer is trained the bound of the gradient is a multiple of its R, here from loops over kernels."""
    # Large enough for the kernels of XLA's library that a constant kernel would make wrong.
    network = SpikingConvNet(num_classes=2, features=(17, 4), kernel_size=3, slope=1.0, decay=0.5)
    shape, num_time_steps = (16, 16, 2), 3
    frames = np.random.default_rng(0).integers(0, 3, (num_time_steps, 4, *shape)).astype(float)
    params = init(network, shape)
    _, conv_1, readout = layer_bounds(network, params, np.zeros(shape), np.ones(shape), num_time_steps)
    spike_gain = 0.5 * sum(contraction_factor(**neuron_parameters(network)) ** t for t in range(num_time_steps))
    behind = np.sqrt(2) * spike_gain * readout.norm_2
    inputs = {"conv_1": np.ones((1, 8, 8, 17)), "conv_0": frames.reshape(-1, *shape)}  # Pooled spikes are at most 1.
    for name, each in inputs.items():
        height, width = each.shape[1:3]
        padded = np.pad(np.square(each).sum(-1), ((0, 0), (1, 1), (1, 1)))
        places = sum(padded[:, i : i + height, j : j + width] for i, j in np.ndindex(3, 3)) + 1  # The bias.
        expected = behind * np.sqrt(places.sum((1, 2)).max())
        assert smoothness_bounds(network, params, frames, layers=(name,)).gradient == pytest.approx(expected, rel=1e-9)
        behind *= spike_gain * conv_1.norm_2


def test_smoothness_bounds_refuse_a_negative_radius_and_unknown_layers():
    params = init(MLP, (2, 2, 1))
    with pytest.raises(ValueError, match="radius must be at least 0"):
        smoothness_bounds(MLP, params, np.zeros((2, 1, 2, 2, 1)), -1.0)
    with pytest.raises(ValueError, match="layers must be of dense_0, dense_1, readout; got conv_0"):
        smoothness_bounds(MLP, params, np.zeros((2, 1, 2, 2, 1)), layers=("conv_0",))


def test_bound_that_no_float_can_hold_is_reported_as_none():
    network = SpikingMLP(num_classes=3, features=(4,), slope=200.0)
    rng = np.random.default_rng(0)
    recordings = Recordings(rng.integers(0, 2, (4, 150, 2, 2, 1)).astype(np.uint8), np.arange(4) % 3, np.arange(4).astype(str))
    params = init(network, (2, 2, 1))
    bounds = smoothness_bounds(network, params, recordings.frames.swapaxes(0, 1))
    assert bounds.smoothness == np.inf
    statements = evaluate_theory(network, params, recordings, rho=0.1, max_count=1, covered={})
    (curvature,) = (each for each in statements if each.statement.startswith("curvature"))
    assert (curvature.bound, curvature.vacuous) == (None, True)
    json.dumps([each._asdict() for each in statements], allow_nan=False)


@pytest.mark.slow
def test_curvature_is_measured_of_networks_that_run_in_kernels():
    rng = np.random.default_rng(0)
    recordings = Recordings(rng.integers(0, 2, (4, 3, 2, 2, 1)).astype(np.uint8), np.arange(4) % 3, np.arange(4).astype(str))
    params = init(MLP, (2, 2, 1))
    statements = evaluate_theory(
        dataclasses.replace(MLP, time_loop="pallas"), params, recordings, rho=0.0, max_count=1, covered={}
    )
    (curvature,) = (each for each in statements if each.statement.startswith("curvature"))
    assert 0 < curvature.measured < np.inf


@pytest.mark.parametrize(
    ("reset", "readout"), [("zero", "leaky"), slow("zero", "rate"), ("subtract", "leaky"), slow("none", "leaky")]
)
def test_certified_decisions_are_those_of_hard_spikes(reset, readout):
    network = SpikingMLP(num_classes=3, features=(6, 5), reset=reset, readout=readout, family="logistic", slope=300.0)
    frames = jnp.asarray(np.random.default_rng(4).integers(0, 2, (5, 8, 2, 2, 2)), jnp.float32)

    @jax.jit
    @jax.vmap
    def check(params):
        smooth = network.apply({"params": params}, frames).logits
        hard = network.apply({"params": params}, frames, "hard").logits
        return certify_agreement(network, params, frames), smooth.argmax(-1), hard.argmax(-1)

    certificate, smooth, hard = jax.device_get(check(many_params(network, frames.shape[2:], 250)))
    np.testing.assert_array_equal(certificate.decision, smooth)
    is_certain = np.asarray(certificate.ratio > 1.001)
    assert (smooth == hard)[is_certain].all()
    assert 0.1 < is_certain.mean() < 1  # It could fail.
    assert (smooth != hard).any()
    assert certificate.spikes_known.mean() > 0.3


def test_nothing_is_certified_where_the_swap_decides_otherwise():
    """At slope 2 many decisions change; all of them must be uncertain."""
    network = SpikingMLP(num_classes=3, features=(8,), slope=2.0)
    frames = jnp.asarray(np.random.default_rng(5).integers(0, 2, (6, 40, 2, 2, 2)), jnp.float32)
    check = jax.jit(jax.vmap(lambda params: _decide(network, frames, params)))
    ratio, changed = jax.device_get(check(many_params(network, frames.shape[2:], 200)))
    assert changed.mean() > 0.05
    assert (ratio[changed] <= 1).all()


def _decide(network, frames, params):
    certificate = certify_agreement(network, params, frames)
    return certificate.ratio, network.apply({"params": params}, frames, "hard").logits.argmax(-1) != certificate.decision


@pytest.mark.parametrize("optimizer", [slow(optax.sgd(0.3, momentum=0.9)), optax.adam(0.1)], ids=["sgd", "adam"])
def test_certified_training_keeps_every_layer_contracting_at_every_step(optimizer):
    network = SpikingMLP(num_classes=3, features=(8, 6), slope=10.0, init_gain=4.0)
    shape, margin = (3, 3, 2), 0.05
    limit = max_current(margin, **neuron_parameters(network))
    layers = network.layer_names[: network.num_spiking]

    def project(params):
        return cap_currents(params, limit, layers=layers)

    rng = np.random.default_rng(0)
    frames, labels = rng.integers(0, 2, (4, 16, *shape)).astype(np.float32), rng.integers(0, 3, 16)

    def loss(params):
        logits = network.apply({"params": params}, frames).logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def factors(params):
        bounds = layer_bounds(network, params, np.zeros(shape), np.ones(shape), 50)
        return [layer.contraction_reachable for layer in bounds[:-1]]

    free = init(network, shape)
    assert max(factors(free)) > 2
    params = jax.jit(project)(free)
    tx = optax.chain(sam(0.1), optimizer, keep_projected(project))
    state, grad = tx.init(params), jax.jit(jax.grad(loss))

    @jax.jit
    def update(params, state):
        updates, state = tx.update(grad(params), state, params, grad_fn=grad)
        return optax.apply_updates(params, updates), state, loss(params)

    before = None
    for _ in range(6):
        params, state, now = update(params, state)
        before = now if before is None else before
        assert max(factors(params)) <= 1 - margin
    assert update(params, state)[2] < before
    # The layers in between fill their room, and inhibition is free.
    excitation = np.maximum(params["dense_0"]["kernel"], 0).sum(0) + np.maximum(params["dense_0"]["bias"], 0)
    assert excitation.max() == pytest.approx(limit, rel=1e-4)


def test_cap_leaves_weights_that_are_within_and_other_layers_alone():
    params = init(MLP, (2, 2, 2))
    assert cap_currents(params, np.inf, layers=("dense_0",)) is params
    jax.tree.map(np.testing.assert_array_equal, cap_currents(params, 1e6, layers=("dense_0", "dense_1")), params)
    capped = cap_currents(params, 0.1, layers=("dense_0",))
    for name in ("dense_1", "readout"):
        assert capped[name] is params[name]
    negative = params["dense_0"]["kernel"] <= 0
    np.testing.assert_array_equal(capped["dense_0"]["kernel"][negative], params["dense_0"]["kernel"][negative])
    excitation = np.maximum(capped["dense_0"]["kernel"], 0).sum(0) + np.maximum(capped["dense_0"]["bias"], 0)
    assert excitation.max() <= 0.1
    assert excitation.min() > 0.09


def test_projection_needs_the_weights():
    tx = keep_projected(lambda w: w)
    with pytest.raises(ValueError, match="keep_projected needs the weights"):
        tx.update(jnp.zeros(2), tx.init(jnp.zeros(2)))
