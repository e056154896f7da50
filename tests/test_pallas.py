import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractDevice

from sast_jax import FAMILIES, LIFState, SpikingConvNet, lif, pallas, spike_fn
from sast_jax.networks import MAX_UNROLL
from sast_jax.neurons import RESETS
from sast_jax.pallas import lif_pallas
from sast_jax.spikes import MODES, mixed_spike_fn


def value_and_gradient(run, current, state, neuron):
    """Spikes, last state, and the gradients of all that goes in."""
    weights = np.random.default_rng(1).normal(size=current.shape).astype(np.float32)

    def loss(current, state):
        spikes, last = run(current, initial_state=state, **neuron)
        return jnp.sum(weights * spikes) + jnp.sum(jnp.sin(last.potential)) + jnp.sum(last.spikes), (spikes, last)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(current, state)


def assert_equal_to_scan(current, state, neuron):
    scan, kernel = (value_and_gradient(run, current, state, neuron) for run in (lif, lif_pallas))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), scan, kernel)


SPIKES = [*((mode, family) for mode in ("surrogate", "straight_through") for family in FAMILIES), ("hard", "arctan")]


@pytest.mark.parametrize(
    ("mode", "family", "reset"),
    [
        # By default each spike function with one reset, and each reset with both kinds of gradient.
        pytest.param(*spikes, reset, marks=() if (i + i // 3 + j) % 3 == 0 else pytest.mark.slow)
        for i, spikes in enumerate(SPIKES)
        for j, reset in enumerate(RESETS)
    ],
)
def test_kernels_equal_the_scan_in_value_and_gradient(mode, family, reset):
    rng = np.random.default_rng(0)
    current = rng.normal(0.4, 0.8, (5, 3, 7)).astype(np.float32)
    state = LIFState(*(rng.random((3, 7)).astype(np.float32) for _ in range(2)))
    neuron = {"decay": 0.9, "threshold": 0.8, "reset": reset, "spike_fn": spike_fn(mode, family, 3.0)}
    assert_equal_to_scan(current, state, neuron)


def assert_equal_to_scan_at(shape, num_time_steps, seed):
    current = np.random.default_rng(seed).normal(0.4, 0.8, (num_time_steps, *shape)).astype(np.float32)
    assert_equal_to_scan(current, None, {"decay": 0.9, "spike_fn": spike_fn("surrogate")})


@pytest.mark.parametrize(
    ("shape", "num_time_steps"),
    [((3,), 1), ((25, 41), 4), ((2, 3, 128), 3)],
    ids=["part of a block", "a block and one neuron", "full blocks"],
)
def test_neurons_need_not_fill_the_blocks(shape, num_time_steps):
    assert_equal_to_scan_at(shape, num_time_steps, seed=0)


@pytest.mark.slow
@given(shape=st.lists(st.integers(1, 40), min_size=1, max_size=3), num_time_steps=st.integers(1, 4), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_neurons_of_any_number_need_not_fill_the_blocks(shape, num_time_steps, seed):
    assert_equal_to_scan_at(shape, num_time_steps, seed)


def kernels_in(run, *arguments):
    return str(jax.make_jaxpr(run)(*arguments)).count("pallas_call[")


@pytest.mark.parametrize(
    "change",
    [
        {"decay": jnp.float32(0.9)},
        {"threshold": jnp.full(4, 0.8)},
        {"spike_fn": spike_fn("surrogate", "arctan", jnp.float32(2.0))},
        {"spike_fn": spike_fn("straight_through", "arctan", jnp.float32(2.0))},
        {"spike_fn": mixed_spike_fn(lambda x: jax.random.bernoulli(jax.random.key(0), 0.5, x.shape))},
    ],
)
def test_what_the_kernels_do_not_cover_is_scanned(change):
    neuron = {"decay": 0.9, "threshold": 0.8, "spike_fn": spike_fn("surrogate")}
    current = jnp.full((3, 2, 4), 0.5)
    assert kernels_in(lambda x: lif_pallas(x, **neuron), current) == 1
    assert kernels_in(lambda x: lif_pallas(x, **neuron | change), current) == 0
    assert_equal_to_scan(current, None, neuron | change)


def test_currents_of_another_dtype_are_scanned(float64):
    run = lambda x: lif_pallas(x, decay=0.9, spike_fn=spike_fn("surrogate"))  # noqa: E731
    assert kernels_in(run, jnp.ones((3, 2), jnp.float64)) == kernels_in(run, jnp.ones((3, 2), jnp.bfloat16)) == 0


@pytest.mark.slow
def test_network_on_kernels_equals_the_one_on_scans():
    frames = (np.random.default_rng(0).random((5, 2, 9, 8, 2)) < 0.3).astype(np.float32)
    sizes = {"num_classes": 3, "features": (4, 5), "kernel_size": 3}
    params = jax.jit(SpikingConvNet(**sizes).init)(jax.random.key(0), frames)["params"]
    results = []
    for choice in ({"time_loop": "scan"}, {"time_loop": "pallas"}, {"time_loop": "pallas", "time_chunk": 2}):
        net = SpikingConvNet(**sizes, **choice)

        def loss(params, net=net):
            return jnp.sum(net.apply({"params": params}, frames, ("surrogate", "straight_through")).logits ** 2)

        assert bool(kernels_in(loss, params)) == (choice["time_loop"] == "pallas")
        results.append(jax.jit(jax.value_and_grad(loss))(params))
    for result in results[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), results[0], result)


@pytest.mark.parametrize(
    ("platform", "backend", "device"),
    [("cuda", "gpu", AbstractDevice("NVIDIA H100", 1, "gpu")), ("tpu", "tpu", AbstractDevice("TPU v5 lite", 1, "tpu"))],
)
@pytest.mark.parametrize("mode", MODES)
def test_kernels_are_lowered_for_devices_that_are_not_here(mode, platform, backend, device, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)

    def loss(current):
        return jnp.sum(lif_pallas(current, decay=0.9, spike_fn=spike_fn(mode))[0] ** 2)

    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)):
        traced = jax.jit(jax.grad(loss)).trace(jax.ShapeDtypeStruct((6, 1500), jnp.float32))
        lowered = traced.lower(lowering_platforms=(platform,))
    assert lowered.as_text().count("custom_call @") >= 2


@pytest.mark.parametrize(
    ("backend", "choice", "has_kernels", "num_loops"),
    [
        ("cpu", {}, False, 1),
        ("gpu", {}, True, 0),
        ("gpu", {"time_loop": "scan"}, False, 0),
        ("gpu", {"time_loop": "scan", "unroll": 2}, False, 2),
        ("gpu", {"time_loop": "scan", "num_time_steps": MAX_UNROLL + 1}, False, 2),
        ("gpu", {"order": "step_major"}, False, 0),
        ("gpu", {"order": "step_major", "unroll": 1}, False, 1),
        ("tpu", {}, False, 0),
    ],
)
def test_networks_take_kernels_on_gpus_and_unrolled_loops_off_cpus(backend, choice, has_kernels, num_loops, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    choice = dict(choice)
    frames = jnp.zeros((choice.pop("num_time_steps", 3), 2, 8, 8, 2))
    net = SpikingConvNet(3, features=(4, 4), kernel_size=3, **choice)
    params = jax.eval_shape(net.init, jax.random.key(0), frames)
    program = jax.make_jaxpr(lambda params: net.apply(params, frames).logits)(params)
    assert str(program).count("pallas_call[") == 2 * has_kernels
    scans = [equation for equation in program.eqns if equation.primitive.name == "scan"]
    assert sum(equation.params["length"] > equation.params["unroll"] for equation in scans) == num_loops


def test_without_triton_gpus_have_no_kernels(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    def num_kernels():  # A function of its own each time, as traces are kept.
        return kernels_in(lambda x: lif_pallas(x, decay=0.9, spike_fn=spike_fn("surrogate")), jnp.ones((2, 256)))

    assert pallas.are_fast()
    assert num_kernels() == 1
    with jax.default_device("cpu"):
        assert not pallas.are_fast()
    monkeypatch.setattr(pallas, "triton", None)
    assert not pallas.are_fast()
    assert num_kernels() == 0


@pytest.mark.perf
@pytest.mark.parametrize(("num_neurons", "is_padded"), [(3 * 256, False), (2 * 1024, False), (3 * 64, True)])
def test_layers_that_blocks_divide_are_not_copied(num_neurons, is_padded):
    run = functools.partial(lif_pallas, decay=0.9, spike_fn=spike_fn("surrogate"))
    assert ("pad[" in str(jax.make_jaxpr(run)(jnp.ones((2, num_neurons))))) == is_padded
