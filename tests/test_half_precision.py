"""Sums and derivatives in 16 bits, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sast_jax import FAMILIES, accumulate, leaky_readout, spike_fn

HALF = (jnp.float16, jnp.bfloat16)
POINTS = np.array([-3e4, -300.0, -5.0, -0.5, 0.0, 0.25, 3.0, 40.0, 1e4])


def derivative_in_float64(family, x, slope):
    y = slope * np.abs(np.asarray(x, np.float64))
    return {
        "arctan": 0.5 * slope / (1 + (np.pi / 2 * y) ** 2),
        "logistic": slope * np.exp(-y) / (1 + np.exp(-y)) ** 2,
        "fast_sigmoid": 0.5 * slope / (1 + y) ** 2,
    }[family]


@pytest.mark.parametrize("mode", ["surrogate", "straight_through"])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("family", FAMILIES)
def test_derivative_in_half_precision_is_that_of_float64(family, dtype, mode):
    x = jnp.asarray(POINTS, dtype)
    ours = jax.vmap(jax.grad(spike_fn(mode, family, 2.0)))(x)
    expected = derivative_in_float64(family, x, 2.0)
    # The last place of the dtype, and the smallest number that float16 knows.
    np.testing.assert_allclose(np.asarray(ours, np.float64), expected, rtol=2 * float(jnp.finfo(dtype).eps), atol=6e-8)


@pytest.mark.parametrize("dtype", [*HALF, jnp.float32])
@pytest.mark.parametrize("family", FAMILIES)
def test_spikes_far_from_the_threshold_are_numbers(family, dtype):
    furthest = jnp.asarray(jnp.finfo(dtype).max, dtype)
    spike = spike_fn("surrogate", family, 2.0)
    assert [float(spike(x)) for x in (-furthest, furthest)] == pytest.approx([0.0, 1.0], abs=1e-5)
    assert float(jax.grad(spike)(furthest)) == 0.0


def test_fast_sigmoid_in_float32_has_its_derivative_far_from_the_threshold():
    x = jnp.array([30.0, 3e3, 3e6])
    ours = jax.vmap(jax.grad(spike_fn("surrogate", "fast_sigmoid", 2.0)))(x)
    np.testing.assert_allclose(ours, derivative_in_float64("fast_sigmoid", x, 2.0), rtol=1e-6)


def test_slope_of_the_fast_sigmoid_has_its_gradient():
    ours = jax.grad(lambda k: spike_fn("surrogate", "fast_sigmoid", k)(jnp.array(-0.5)))(2.0)
    assert float(ours) == pytest.approx(-0.5 * 0.5 / (1 + 1) ** 2)  # d/dk of k x / (2 (1 + k |x|)).


@pytest.mark.parametrize(("dtype", "value", "num_parts"), [(jnp.float16, 60_000.0, 4), (jnp.bfloat16, 1.0, 1024)])
def test_sums_of_parts_neither_overflow_nor_stand_still(dtype, value, num_parts):
    mean = accumulate(lambda w, x: jnp.asarray(value, dtype), num_parts)(0.0, jnp.zeros(num_parts))
    assert mean.dtype == dtype
    assert float(mean) == float(dtype(value))


def test_mean_of_booleans_is_the_share_that_holds():
    share = accumulate(lambda w, x: x.sum() > 2, 4)(0.0, jnp.arange(8))  # Parts sum to 1, 5, 9, 13.
    assert share.dtype == jnp.float32
    assert float(share) == 0.75


@pytest.mark.parametrize("dtype", HALF)
def test_long_recordings_are_read_out_to_the_last_place(dtype):
    # Without a leak the weights of 1,000 steps fall from 1,000 to 1: their mean is 500.5.
    logits = leaky_readout(jnp.ones((1000, 1, 1), dtype), decay=1.0)
    assert logits.dtype == dtype
    assert float(logits.item()) == float(dtype(500.5))
