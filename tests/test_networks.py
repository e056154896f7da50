import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

from sast_jax import SpikingConvNet, SpikingMLP, sam, spike_fn
from sast_jax.data import Batch
from sast_jax.errors import UserError
from sast_jax.networks import Calibration
from sast_jax.training import init_state, make_train_step

CONV = {"num_classes": 3, "features": (4, 5), "kernel_size": 3}
MLP = {"num_classes": 3, "features": (8, 6)}
NETWORKS = [(SpikingConvNet, CONV), (SpikingMLP, MLP)]


FRAMES = (np.random.default_rng(0).random((6, 2, 9, 8, 2)) < 0.3).astype(np.float32)


@pytest.fixture
def frames():
    return FRAMES.copy()


def init(network, frames):
    return jax.jit(network.init)(jax.random.key(0), frames)["params"]


@functools.cache
def draw_params(network):
    """The weights of a network for `FRAMES`, drawn once, in float32."""
    with jax.enable_x64(False):
        return init(network, FRAMES)


def in_float64(params):
    return jax.tree.map(lambda p: p.astype(jnp.float64), params)


@functools.partial(jax.jit, static_argnums=(0, 3))
def apply(network, params, frames, mode="surrogate", calibration=None):
    """The network as one compiled program."""
    return network.apply({"params": params}, frames, mode, calibration)


WAYS = {  # Of the same work, each in value and gradient.
    "step by step": {"order": "step_major"},
    "two steps unrolled": {"order": "step_major", "unroll": 2},
    "all steps unrolled": {"order": "step_major", "unroll": None},
    "layers in chunks": {"order": "layer_major", "time_chunk": 4},
    "steps in chunks": {"order": "step_major", "time_chunk": 4},
    "layers in chunks of one step": {"order": "layer_major", "time_chunk": 1},
    "steps in chunks of one step": {"order": "step_major", "time_chunk": 1},
    "one chunk": {"order": "layer_major", "time_chunk": 6},
    "one chunk of steps": {"order": "step_major", "time_chunk": 6},
}


@pytest.mark.parametrize(
    ("network", "sizes", "mode", "readout", "ways"),
    [
        (*NETWORKS[0], "surrogate", "leaky", ("step by step", "steps in chunks", "layers in chunks")),
        (SpikingConvNet, CONV | {"features": (4,)}, "straight_through", "rate", ("step by step", "two steps unrolled")),
        (*NETWORKS[1], "straight_through", "leaky", ("step by step", "all steps unrolled", "steps in chunks")),
        (*NETWORKS[1], "surrogate", "rate", ("step by step", "layers in chunks of one step", "one chunk")),
        *(
            pytest.param(*each, mode, readout, ways, marks=pytest.mark.slow)
            for each in NETWORKS
            for mode, readout, ways in (
                ("surrogate", "leaky", tuple(WAYS)),
                ("surrogate", "rate", tuple(WAYS)[:3]),
                ("straight_through", "leaky", tuple(WAYS)[:3]),
                ("straight_through", "rate", tuple(WAYS)[:3]),
            )
        ),
    ],
)
def test_orders_and_chunks_agree_in_value_and_gradient(network, sizes, mode, readout, ways, frames, float64):
    frames = frames.astype(np.float64)
    params = in_float64(draw_params(network(**sizes, readout=readout)))
    results = []
    for way in ({"order": "layer_major"}, *(WAYS[name] for name in ways)):
        net = network(**sizes, readout=readout, **way)

        def loss(params, net=net):
            output = net.apply({"params": params}, frames, mode)
            return jnp.sum(output.logits**2) + sum(jnp.sum(jnp.sin(s)) for s in output.spikes), output

        results.append(jax.jit(jax.value_and_grad(loss, has_aux=True))(params))
    for result in results[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), results[0], result)


@pytest.mark.parametrize(("network", "sizes"), NETWORKS)
def test_orders_of_work_create_equal_weights(network, sizes, frames):
    layer, step = (init(network(**sizes, order=order), frames) for order in ("layer_major", "step_major"))
    jax.tree.map(np.testing.assert_array_equal, layer, step)


@pytest.mark.parametrize(("network", "sizes"), NETWORKS)
def test_every_mode_runs_on_the_same_weights(network, sizes, frames):
    net = network(**sizes)
    params = draw_params(net)
    outputs = {mode: apply(net, params, frames, mode) for mode in ("surrogate", "hard", "straight_through")}
    assert all(set(np.unique(s)) <= {0.0, 1.0} for mode in ("hard", "straight_through") for s in outputs[mode].spikes)
    assert all(((s > 0) & (s < 1)).all() for s in outputs["surrogate"].spikes)
    np.testing.assert_array_equal(outputs["hard"].logits, outputs["straight_through"].logits)
    assert np.abs(outputs["hard"].logits - outputs["surrogate"].logits).max() > 1e-3


@pytest.mark.perf
def test_potentials_of_hard_neurons_are_written_in_place(frames):
    net = SpikingConvNet(**CONV, order="step_major")
    params = draw_params(net)
    batch_size, height, width = frames.shape[1:4]

    def copies(mode):
        compiled = jax.jit(lambda params: net.apply({"params": params}, frames, mode).logits).lower(params).compile().as_text()
        return re.findall(rf"f32\[{batch_size},(?:{height},{4 * width}|{height // 2},{5 * (width // 2)})\]\S* copy\(", compiled)

    assert (copies("hard"), len(copies("surrogate"))) == ([], 2)


@pytest.mark.parametrize("network", [SpikingConvNet, SpikingMLP])
@pytest.mark.parametrize("order", ["layer_major", "step_major"])
def test_network_without_layers_is_affine_in_the_mean_of_frames(network, order, frames):
    net = network(3, features=(), order=order)
    params = draw_params(network(3, features=()))
    logits = apply(net, params, frames.astype(np.uint8), "hard").logits
    expected = frames.mean(0).reshape(2, -1) @ params["readout"]["kernel"] + params["readout"]["bias"]
    np.testing.assert_allclose(logits, expected, atol=1e-5)


@pytest.mark.parametrize("readout", ["leaky", "rate"])
@pytest.mark.parametrize(("network", "sizes"), NETWORKS)
def test_number_of_neurons_is_that_of_the_spikes_of_each_layer(network, sizes, readout, frames):
    network = network(**sizes, readout=readout)
    output, _ = jax.eval_shape(network.init_with_output, jax.random.key(0), frames)
    expected = [math.prod(spikes.shape[2:]) for spikes in output.spikes]
    assert [network.num_neurons(index, *frames.shape[2:4]) for index in range(network.num_spiking)] == expected


def test_weights_are_a_plain_tree_with_stated_names():
    shapes = jax.tree.map(jnp.shape, draw_params(SpikingConvNet(**CONV)))
    assert shapes == {
        "conv_0": {"kernel": (3, 3, 2, 4), "bias": (4,)},
        "conv_1": {"kernel": (3, 3, 4, 5), "bias": (5,)},
        "readout": {"kernel": (2 * 2 * 5, 3), "bias": (3,)},
    }


def test_network_agrees_with_the_equations_written_out_in_numpy(frames, float64):
    net = SpikingMLP(num_classes=3, features=(5,), decay=0.8, threshold=0.7)
    frames = frames.astype(np.float64)
    params = jax.tree.map(np.asarray, draw_params(net))
    u = s = np.zeros((2, 5))
    total = np.zeros((2, 3))
    for frame in frames:
        current = frame.reshape(2, -1) @ params["dense_0"]["kernel"] + params["dense_0"]["bias"]
        u = 0.8 * u * (1 - s) + current
        s = np.where(u > 0.7, 1.0, 0.0)
        total += s @ params["readout"]["kernel"] + params["readout"]["bias"]
    np.testing.assert_allclose(apply(net, params, frames, "hard").logits, total / len(frames), rtol=1e-6)


def test_gradient_of_a_whole_network_in_surrogate_mode_is_exact(frames, float64):
    net = SpikingConvNet(**CONV)
    frames = frames.astype(np.float64)
    params = in_float64(draw_params(net))
    loss = jax.jit(lambda params: jnp.sum(net.apply({"params": params}, frames).logits ** 2))
    check_grads(loss, (params,), order=1, modes=("rev",), rtol=1e-4)


def test_initial_weights_have_the_stated_spread():
    kernel = draw_params(SpikingMLP(num_classes=3, features=(400,), init_gain=3.0))["dense_0"]["kernel"]
    assert np.std(kernel) * np.sqrt(kernel.shape[0]) == pytest.approx(3.0, rel=0.02)


def test_each_layer_has_the_mode_threshold_and_gain_that_it_is_given(frames, float64):
    frames = frames.astype(np.float64)
    thresholds, gains = (np.float64(0.5), np.linspace(0.4, 0.9, 6)), (np.linspace(0.5, 2.0, 8), np.float64(1.5))
    params, outputs = jax.tree.map(np.asarray, draw_params(SpikingMLP(**MLP))), []
    for order in ("layer_major", "step_major"):
        net = SpikingMLP(**MLP, order=order, decay=0.8)
        outputs.append(apply(net, params, frames, ("surrogate", "hard"), Calibration(thresholds, gains)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), *outputs)

    functions = (spike_fn("surrogate"), spike_fn("hard"))
    states, total = [(0.0, 0.0), (0.0, 0.0)], 0.0
    for x in frames.reshape(len(frames), 2, -1):
        for index, spike in enumerate(functions):
            u, s = states[index]
            u = 0.8 * u * (1 - s) + x @ params[f"dense_{index}"]["kernel"]
            states[index] = u, np.asarray(spike(u - thresholds[index]))
            x = gains[index] * states[index][1]
        total += x @ params["readout"]["kernel"]
    np.testing.assert_allclose(outputs[0].logits, total / len(frames), rtol=1e-6)


def test_thresholds_and_gains_of_channels_are_those_of_their_neurons(frames, float64):
    frames = frames.astype(np.float64)
    choice = CONV | {"reset": "subtract", "init_gain": 8.0}
    params = in_float64(draw_params(SpikingConvNet(**choice)))
    of_channels = [(np.linspace(0.6, 1.4, features), np.linspace(0.5, 2.0, features)) for features in (4, 5)]
    outputs = {}
    for order in ("layer_major", "step_major"):
        net = SpikingConvNet(**choice, order=order)
        outputs[order] = apply(net, params, frames, "hard", Calibration(*zip(*of_channels, strict=True)))
    x = frames
    for index, (thresholds, gains) in enumerate(of_channels):
        current_of = jax.jit(lambda step, net=net, index=index: net.apply({"params": params}, index, step, method="current"))
        current = np.stack([current_of(step) for step in x])
        potential, spikes = np.zeros_like(current[0]), [np.zeros_like(current[0])]
        for now in current:
            potential = net.decay * potential - thresholds * spikes[-1] + now
            spikes.append((potential > thresholds).astype(np.float64))
        for output in outputs.values():
            np.testing.assert_array_equal(output.spikes[index], spikes[1:])
        assert 0.01 < np.mean(spikes) < 0.9
        x = gains * np.stack(spikes[1:])


def test_calibration_of_nothing_changes_nothing(frames):
    net = SpikingConvNet(**CONV)
    params = draw_params(net)
    same = Calibration((1.0, np.ones(5, np.float32)), (1.0, np.ones(5, np.float32)))
    for mode in ("surrogate", "hard"):
        outputs = [apply(net, params, frames, mode, each) for each in (None, same)]
        np.testing.assert_array_equal(outputs[0].logits, outputs[1].logits)


def test_wrong_number_of_modes_is_refused(frames):
    net = SpikingMLP(**MLP)
    with pytest.raises(ValueError, match="mode must be one name or 2, one per layer of spiking neurons; got \\('hard',\\)"):
        jax.eval_shape(lambda: net.init(jax.random.key(0), frames, ("hard",)))


@pytest.mark.parametrize("field", ["order", "readout", "precision", "time_loop"])
def test_unknown_choice_is_refused(field, frames):
    with pytest.raises(ValueError, match=f"{field} must be one of"):
        jax.eval_shape(SpikingMLP(**MLP, **{field: "other"}).init, jax.random.key(0), frames)


def test_time_chunks_take_calibration_and_traced_slopes(frames):
    params = draw_params(SpikingConvNet(**CONV))

    def loss(thresholds, slope, time_chunk):
        net = SpikingConvNet(**CONV, time_chunk=time_chunk)
        modes = [spike_fn("surrogate", "arctan", slope), spike_fn("straight_through", "arctan", slope)]
        output = net.apply({"params": params}, frames, modes, Calibration(thresholds, (1.0, jnp.linspace(0.5, 1.5, 5))))
        return jnp.sum(output.logits**2)

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
    whole, chunks = (gradient((jnp.float32(0.8), jnp.full(5, 0.9)), jnp.float32(3.0), chunk) for chunk in (0, 4))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), whole, chunks)


def test_weights_may_be_created_in_time_chunks(frames):
    chunks, whole = (init(SpikingConvNet(**CONV, time_chunk=chunk), frames) for chunk in (2, 0))
    jax.tree.map(np.testing.assert_array_equal, chunks, whole)


@pytest.mark.perf
@pytest.mark.parametrize(("network", "sizes"), NETWORKS)
def test_time_chunks_hold_the_memory_of_a_train_step(network, sizes):
    def megabytes(num_time_steps, time_chunk):
        net, tx = network(**sizes, time_chunk=time_chunk), optax.sgd(0.1)
        shape = (num_time_steps, 4, 16, 16, 2)
        state = jax.eval_shape(lambda: init_state(net, tx, np.zeros(shape), seed=0))
        batch = Batch(jax.ShapeDtypeStruct(shape, np.uint8), jax.ShapeDtypeStruct((4,), np.int32), None)
        compiled = make_train_step(net, tx, "surrogate").lower(state, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes / 1e6

    growth = {chunk: megabytes(400, chunk) - megabytes(100, chunk) for chunk in (0, 10)}
    assert growth[10] < growth[0] / 4


@pytest.mark.perf
def test_activity_of_a_time_loop_keeps_no_spikes_in_training(frames):
    net, frames = SpikingConvNet(**CONV), np.tile(frames, (10, 1, 1, 1, 1))

    def temporary_bytes(with_activity):
        def loss(params):
            output = net.apply({"params": params}, frames)
            return jnp.sum(output.logits), output.activity if with_activity else ()

        return jax.jit(jax.grad(loss, has_aux=True)).lower(draw_params(net)).compile().memory_analysis().temp_size_in_bytes

    spikes_bytes = 4 * len(frames) * 2 * (9 * 8 * 4 + 4 * 4 * 5)
    assert temporary_bytes(True) < temporary_bytes(False) + spikes_bytes / 10


@pytest.mark.parametrize("settings", [{}, {"time_chunk": 4}, {"order": "layer_major"}])
def test_activity_is_the_mean_of_the_spikes(frames, settings):
    net = SpikingConvNet(**CONV, **settings)
    output = apply(net, draw_params(SpikingConvNet(**CONV)), frames)
    for spikes, rate, share in zip(output.spikes, *output.activity, strict=True):
        np.testing.assert_allclose(rate, np.mean(spikes), rtol=1e-5)
        np.testing.assert_allclose(share, np.mean(spikes > 0.5), rtol=1e-5)


def test_frames_may_be_of_any_dtype(frames):
    net = SpikingConvNet(**CONV)
    params = draw_params(net)
    outputs = [apply(net, params, frames.astype(dtype)) for dtype in (np.float32, np.uint8, bool)]
    np.testing.assert_array_equal(outputs[0].logits, outputs[1].logits)
    np.testing.assert_array_equal(outputs[0].logits, outputs[2].logits)


@pytest.mark.parametrize(
    ("network", "sizes", "order"),
    [
        (*NETWORKS[0], "step_major"),
        (*NETWORKS[1], "layer_major"),
        pytest.param(*NETWORKS[0], "layer_major", marks=pytest.mark.slow),
        pytest.param(*NETWORKS[1], "step_major", marks=pytest.mark.slow),
    ],
)
def test_bfloat16_is_of_all_products_but_the_readouts(network, sizes, order, frames):
    if order == "step_major" and jax.default_backend() == "gpu":
        pytest.skip("refused on GPUs")
    params = draw_params(network(**sizes))
    gradients = {}
    for precision in ("float32", "bfloat16"):
        net = network(**sizes, order=order, precision=precision)
        output = jax.eval_shape(net.apply, {"params": params}, frames)
        assert {x.dtype for x in jax.tree.leaves(output)} == {jnp.dtype(jnp.float32)}

        def loss(params, net=net):
            return jnp.sum(net.apply({"params": params}, frames).logits ** 2)

        products = [
            line for line in str(jax.make_jaxpr(loss)(params)).splitlines() if "dot_general[" in line or "conv_general" in line
        ]
        # The readout's weights, once for its bias, and layer-major the sum over time.
        in_float32 = [line for line in products if "bf16" not in line]
        assert len(products) > 2 + (order == "layer_major")
        assert len(in_float32) == (2 + (order == "layer_major") if precision == "bfloat16" else len(products))
        assert sum(f",{net.num_classes}] = " in line for line in in_float32) == 2
        gradients[precision] = jax.jit(jax.grad(loss))(params)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(gradients))
    exact, rounded = (jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(g)]) for g in gradients.values())
    error = jnp.linalg.norm(rounded - exact) / jnp.linalg.norm(exact)
    assert 1e-5 < error < 0.05


def test_bfloat16_in_a_time_loop_is_refused_on_gpus(frames, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    init(SpikingConvNet(**CONV, precision="bfloat16", time_loop="scan"), frames)
    for choice in ({"order": "step_major"}, {"time_loop": "scan", "time_chunk": 2}):
        with pytest.raises(UserError, match="bfloat16 gave wrong gradients on a GPU"):
            init(SpikingConvNet(**CONV, precision="bfloat16", **choice), frames)


def test_in_bfloat16_weights_optimizer_and_perturbation_stay_float32(frames):
    net, radius = SpikingMLP(3, features=(8,), precision="bfloat16"), 1e-4
    tx, moved = optax.chain(sam(radius), optax.adam(1e-3)), []
    state = init_state(net, tx, frames, seed=0)
    batch = Batch(frames.astype(np.uint8), np.zeros(2, np.int32), np.ones(2, bool))
    state, metrics = make_train_step(net, tx, "surrogate")(state, batch)
    assert all(leaf.dtype in (jnp.float32, jnp.int32) for leaf in jax.tree.leaves((state, metrics)))

    gradient = jax.jit(jax.grad(lambda p: jnp.sum(net.apply({"params": p}, frames).logits ** 2)))

    def grad_fn(point):
        moved.append(point)
        return gradient(point)

    sam(radius).update(grad_fn(state.params), sam(radius).init(state.params), state.params, grad_fn=grad_fn)
    start, end = moved
    # Below half a unit of bfloat16 in most weights: rounded to it, the perturbation would vanish.
    assert optax.tree.norm(optax.tree.sub(end, start)) == pytest.approx(radius, rel=1e-3)
