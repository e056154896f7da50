import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sast_jax import FAMILIES, spike_fn

SLOPES = (0.5, 2.0, 10.0)
GRID = np.linspace(-6.0, 6.0, 20_001)  # Not through the kink of the fast sigmoid's second derivative but for x = 0.

# sigma(x) at slope 2, worked out by hand: 1/2 + atan(pi x)/pi; 1/(1 + e^-2x); 1/2 + x/(1 + 2|x|).
BY_HAND = {
    "arctan": {0.0: 0.5, 1.0: 0.90191, -1.0: 0.09809},
    "logistic": {0.0: 0.5, 1.0: 0.88080, -1.0: 0.11920},
    "fast_sigmoid": {0.0: 0.5, 1.0: 0.83333, -1.0: 0.16667},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_values_agree_with_those_worked_out_by_hand(family):
    xs, values = zip(*BY_HAND[family].items(), strict=True)
    assert jax.jit(spike_fn("surrogate", family, 2.0))(jnp.array(xs)).tolist() == pytest.approx(values, abs=1e-5)


def test_arctan_in_float32_agrees_with_that_of_numpy_in_float64():
    x = np.concatenate([np.linspace(-4, 4, 40_001), np.geomspace(1e-30, 1e30, 2000), [0.0, np.inf, -np.inf]]).astype(np.float32)
    x = np.concatenate([x, -x])
    ours = jax.jit(FAMILIES["arctan"].value)(x, 2 / np.pi)
    np.testing.assert_allclose(ours, 0.5 + np.arctan(x.astype(np.float64)) / np.pi, atol=2e-7)
    slope = jax.jit(jax.vmap(jax.grad(lambda x: FAMILIES["arctan"].value(x, 2.0))))(x[:40_001])
    np.testing.assert_allclose(slope, FAMILIES["arctan"].derivative(x[:40_001].astype(np.float64), 2.0), rtol=1e-5)


@pytest.mark.parametrize("slope", SLOPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_derivative_agrees_with_finite_differences(family, slope, float64):
    step = 1e-6
    value = jax.jit(FAMILIES[family].value)
    difference = (value(GRID + step, slope) - value(GRID - step, slope)) / (2 * step)
    np.testing.assert_allclose(FAMILIES[family].derivative(GRID, slope), difference, atol=1e-4 * slope**2)


@pytest.mark.parametrize("slope", SLOPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_stated_bounds_are_the_suprema(family, slope, float64):
    first = FAMILIES[family].derivative(GRID, slope)
    second = np.abs(np.diff(first) / np.diff(GRID))
    assert first.max() == pytest.approx(FAMILIES[family].max_derivative(slope), rel=1e-6)
    assert second.max() <= FAMILIES[family].max_second_derivative(slope) * (1 + 1e-9)
    assert second.max() == pytest.approx(FAMILIES[family].max_second_derivative(slope), rel=0.01)


@pytest.mark.parametrize("family", FAMILIES)
def test_steep_surrogate_becomes_the_step_function(family):
    x = jnp.array([-1.0, -0.1, 0.1, 1.0])
    np.testing.assert_allclose(jax.jit(spike_fn("surrogate", family, 1e6))(x), spike_fn("hard")(x), atol=1e-4)


def test_hard_spike_needs_more_than_the_threshold():
    x = jnp.array([-1e-6, 0.0, 1e-6])
    for mode in ("hard", "straight_through"):
        assert spike_fn(mode)(x).tolist() == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("family", FAMILIES)
def test_straight_through_has_the_surrogates_derivative_and_hard_has_none(family):
    x = jnp.linspace(-2.0, 2.0, 9)
    slopes = {mode: jax.jit(jax.vmap(jax.grad(spike_fn(mode, family, 3.0))))(x) for mode in ("straight_through", "hard")}
    np.testing.assert_allclose(slopes["straight_through"], FAMILIES[family].derivative(x, 3.0), rtol=1e-6)
    assert not slopes["hard"].any()


@pytest.mark.parametrize("mode", ["surrogate", "hard", "straight_through"])
def test_dtype_is_kept(mode):
    for slope in (2.0, jnp.float32(2.0)):
        assert jax.eval_shape(spike_fn(mode, "arctan", slope), jnp.ones(3, jnp.bfloat16)).dtype == jnp.bfloat16


def test_slope_may_be_traced():
    slopes = jnp.array([1.0, 2.0])
    gradients = jax.jit(jax.vmap(lambda k: jax.grad(lambda x: spike_fn("straight_through", "arctan", k)(x))(0.0)))(slopes)
    np.testing.assert_allclose(gradients, slopes / 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("soft",), "mode must be one of"),
        (("hard", "tanh"), "family must be"),
        (("hard", "arctan", 0.0), "slope must be positive"),
    ],
)
def test_unknown_mode_family_or_slope_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        spike_fn(*arguments)
