import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from sast_jax import FAMILIES, LIFState, leaky_readout, lif, lif_init, lif_step, rate_readout, spike_fn
from sast_jax.spikes import MODES

RESETS = ("zero", "subtract", "none")

# Constant current 0.6, decay 0.5, threshold 1; worked out by hand: potential before the reset, and spikes.
BY_HAND = {
    "zero": ([0.6, 0.9, 1.05, 0.6, 0.9], [0, 0, 1, 0, 0]),
    "subtract": ([0.6, 0.9, 1.05, 0.125, 0.6625], [0, 0, 1, 0, 0]),
    "none": ([0.6, 0.9, 1.05, 1.125, 1.1625], [0, 0, 1, 1, 1]),
}


def numpy_lif(current, decay, threshold, reset, sigma):
    """The equations as a loop over Python floats, one neuron at a time."""
    spikes = np.zeros_like(current)
    potentials = np.zeros_like(current)
    for neuron in np.ndindex(current.shape[1:]):
        u, s = 0.0, 0.0
        for t in range(len(current)):
            if reset == "zero":
                u = decay * u * (1 - s)
            elif reset == "subtract":
                u = decay * u - threshold * s
            else:
                u = decay * u
            u += current[(t, *neuron)]
            s = sigma(u - threshold)
            spikes[(t, *neuron)], potentials[(t, *neuron)] = s, u
    return spikes, potentials


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def run_lif(current, decay, threshold, reset, mode, unroll):
    neuron = {"decay": decay, "threshold": threshold, "reset": reset, "spike_fn": spike_fn(mode, "arctan", 2.0)}
    return lif(current, **neuron, unroll=unroll)


@pytest.mark.parametrize("reset", RESETS)
def test_trace_agrees_with_the_one_worked_out_by_hand(reset):
    potentials, spikes = BY_HAND[reset]
    state = lif_init(jnp.zeros(1))
    for potential, spike in zip(potentials, spikes, strict=True):
        state = lif_step(state, jnp.array([0.6]), decay=0.5, reset=reset, spike_fn=spike_fn("hard"))
        assert state.potential.item() == pytest.approx(potential)
        assert state.spikes.item() == spike


@pytest.mark.parametrize("mode", ["surrogate", "hard"])
@pytest.mark.parametrize("reset", RESETS)
@given(seed=st.integers(0, 2**32 - 1), decay=st.floats(0, 1), threshold=st.floats(0.1, 3), unroll=st.sampled_from([1, 3]))
@settings(max_examples=15, deadline=None)
def test_scan_agrees_with_a_loop_over_numbers(reset, mode, seed, decay, threshold, unroll):
    with jax.enable_x64(True):
        current = np.random.default_rng(seed).normal(0.3, 1.0, (9, 2, 3))
        sigma = {
            "surrogate": lambda x: 0.5 + np.arctan(0.5 * np.pi * 2.0 * x) / np.pi,
            "hard": lambda x: float(x > 0),
        }[mode]
        spikes, state = run_lif(current, decay, threshold, reset, mode, unroll)
        expected, potentials = numpy_lif(current, decay, threshold, reset, sigma)
        np.testing.assert_allclose(spikes, expected, atol=1e-12)
        np.testing.assert_allclose(state.potential, potentials[-1], atol=1e-12)
        np.testing.assert_array_equal(state.spikes, spikes[-1])


@pytest.mark.parametrize(
    ("family", "reset"),  # Each once by default.
    [
        *zip(FAMILIES, RESETS, strict=True),
        *(
            pytest.param(family, reset, marks=pytest.mark.slow)
            for family, once in zip(FAMILIES, RESETS, strict=True)
            for reset in RESETS
            if reset != once
        ),
    ],
)
def test_gradient_in_surrogate_mode_is_exact_to_second_order(family, reset, float64):
    current = np.random.default_rng(0).normal(0.5, 1.0, (13, 2, 3))

    @jax.jit
    def loss(current, decay, threshold):
        spikes, state = lif(current, decay=decay, threshold=threshold, reset=reset, spike_fn=spike_fn("surrogate", family, 2.0))
        return jnp.sum(jnp.sin(spikes)) + jnp.sum(state.potential**2)

    check_grads(loss, (current, 0.9, 1.0), order=2, modes=("rev",), atol=1e-5, rtol=1e-5)


def test_gradient_through_the_reset_is_not_detached(float64):
    def loss(current, detach):
        def step(state, now):
            if detach:
                state = LIFState(state.potential, jax.lax.stop_gradient(state.spikes))
            state = lif_step(state, now, decay=0.9, spike_fn=spike_fn("surrogate"))
            return state, state.spikes

        return jnp.sum(jax.lax.scan(step, lif_init(current[0]), current)[1])

    current = jnp.full((5, 1), 0.8)
    exact = jax.jit(jax.grad(lambda c: jnp.sum(lif(c, decay=0.9, spike_fn=spike_fn("surrogate"))[0])))(current)
    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    np.testing.assert_allclose(gradient(current, False), exact, rtol=1e-12)
    assert np.abs(gradient(current, True) - exact).max() > 0.01


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reset", RESETS)
def test_spikes_computed_again_give_the_gradient_of_kept_steps(reset, mode, float64):
    rng = np.random.default_rng(2)
    current, weights = rng.normal(0.4, 1.0, (2, 8, 2, 3))
    start = LIFState(*rng.random((2, 2, 3)))
    neuron = {"decay": 0.9, "threshold": 0.8, "reset": reset, "spike_fn": spike_fn(mode)}

    def loss(run, current, start):
        spikes, state = run(current, start)
        return jnp.sum(weights * spikes) + jnp.sum(state.potential * jnp.cos(state.spikes))

    def steps(current, state):
        spikes = []
        for now in current:
            state = lif_step(state, now, **neuron)
            spikes.append(state.spikes)
        return jnp.stack(spikes), state

    def scan(current, state):
        return lif(current, initial_state=state, **neuron)

    (value, gradient), (expected_value, expected) = jax.jit(
        lambda *inputs: [jax.value_and_grad(functools.partial(loss, run), (0, 1))(*inputs) for run in (scan, steps)]
    )(current, start)
    np.testing.assert_allclose(value, expected_value, rtol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), gradient, expected)


@pytest.mark.perf
@pytest.mark.parametrize("mode", ["surrogate", "straight_through"])
def test_gradient_keeps_one_number_per_neuron_and_step(mode):
    current = weights = jnp.zeros((200, 1000))

    def loss(current, weights):
        return jnp.sum(weights * lif(current, decay=0.9, spike_fn=spike_fn(mode))[0])

    num_bytes = jax.jit(jax.grad(loss)).lower(current, weights).compile().memory_analysis().temp_size_in_bytes
    assert current.nbytes <= num_bytes < 1.2 * current.nbytes


@pytest.mark.parametrize("reset", RESETS)
def test_recording_may_be_cut_in_two(reset):
    current = np.random.default_rng(1).normal(0.5, 1.0, (10, 4)).astype(np.float32)
    neuron = {"decay": 0.9, "reset": reset, "spike_fn": spike_fn("hard")}
    whole, _ = lif(current, **neuron)
    first, state = lif(current[:4], **neuron)
    second, _ = lif(current[4:], initial_state=state, **neuron)
    np.testing.assert_array_equal(jnp.concatenate([first, second]), whole)


def test_dtype_is_kept_with_parameters_of_another():
    spikes, state = lif(
        jnp.ones((3, 2), jnp.bfloat16), decay=jnp.float32(0.9), threshold=jnp.ones(2), spike_fn=spike_fn("surrogate")
    )
    assert {spikes.dtype, state.potential.dtype} == {jnp.dtype(jnp.bfloat16)}


def test_unknown_reset_is_refused():
    with pytest.raises(ValueError, match="reset must be one of zero, subtract, none; got 'soft'"):
        lif(jnp.ones((2, 1)), decay=0.9, reset="soft", spike_fn=spike_fn("hard"))


def test_integer_current_is_refused():
    with pytest.raises(ValueError, match="current must be of a floating-point dtype; got int32"):
        lif(jnp.ones((2, 1), jnp.int32), decay=0.9, spike_fn=spike_fn("hard"))
    with pytest.raises(ValueError, match="current must be of a floating-point dtype; got int32"):
        leaky_readout(jnp.ones((2, 1, 3), jnp.int32), decay=0.9)


def test_leaky_readout_is_the_mean_of_the_integrated_current():
    current = np.random.default_rng(0).normal(size=(6, 2, 3)).astype(np.float32)
    potential, total = np.zeros((2, 3)), np.zeros((2, 3))
    for now in current:
        potential = 0.7 * potential + now
        total += potential
    np.testing.assert_allclose(jax.jit(leaky_readout)(current, 0.7), total / 6, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(leaky_readout)(current), current.mean(0), rtol=1e-5, atol=1e-6)


def test_each_output_may_have_a_decay_of_its_own():
    current = np.random.default_rng(0).normal(size=(6, 2, 3)).astype(np.float32)
    decays = np.array([0.0, 0.5, 1.0], np.float32)
    alone = [jax.jit(leaky_readout)(current[..., [k]], decay)[:, 0] for k, decay in enumerate(decays)]
    np.testing.assert_allclose(jax.jit(leaky_readout)(current, decays), np.stack(alone, -1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.7, 1.0])
def test_gradient_of_the_readout_in_its_decay_is_that_of_the_loop(decay, float64):
    current = np.random.default_rng(0).normal(size=(5, 2, 3))
    step = 1e-6
    gradient = jax.jit(jax.grad(lambda decay: jnp.sum(jnp.sin(leaky_readout(current, decay)))))(decay)

    def loss(decay):
        potential, total = np.zeros((2, 3)), np.zeros((2, 3))
        for now in current:
            potential = decay * potential + now
            total += potential
        return np.sin(total / 5).sum()

    np.testing.assert_allclose(gradient, (loss(decay + step) - loss(decay - step)) / (2 * step), rtol=1e-6)


def test_rate_readout_counts_spikes():
    spikes = jnp.array([[[1.0, 0.0]], [[1.0, 1.0]], [[0.0, 0.0]]])
    assert rate_readout(spikes).tolist() == [[2.0, 1.0]]
