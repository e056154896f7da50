"""Forward-mode derivatives: those of reverse mode, in the other direction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sast_jax import FAMILIES, SpikingConvNet, lif, spike_fn
from sast_jax.pallas import lif_pallas

X = jnp.array([-1.5, -0.1, 0.0, 0.3, 2.0])


@pytest.mark.parametrize("family", FAMILIES)
def test_straight_through_spikes_have_the_surrogates_derivative_in_either_mode(family):
    forward = spike_fn("straight_through", family, 3.0, derivative_rule="jvp")
    expected = FAMILIES[family].derivative(X, 3.0)
    spikes, tangent = jax.jvp(forward, (X,), (jnp.full(5, 2.0),))
    np.testing.assert_array_equal(spikes, [0, 0, 0, 1, 1])
    np.testing.assert_allclose(tangent, 2 * expected, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(jax.grad(forward))(X), expected, rtol=1e-6)
    assert jax.jvp(forward, (X.astype(jnp.bfloat16),), (X.astype(jnp.bfloat16),))[1].dtype == jnp.bfloat16


@pytest.mark.parametrize("rule", ["vjp", "jvp"])
def test_hessian_of_straight_through_spikes_is_that_of_the_surrogate(rule, float64):
    spike = spike_fn("straight_through", "logistic", 2.0, derivative_rule=rule)
    x, step = 0.4, 1e-6
    first = [float(FAMILIES["logistic"].derivative(x + side, 2.0)) for side in (-step, step)]
    assert float(jax.hessian(spike)(x)) == pytest.approx((first[1] - first[0]) / (2 * step), rel=1e-6)


def test_slope_has_a_zero_derivative_in_either_mode():
    for rule in ("vjp", "jvp"):
        slope = jax.grad(lambda k, rule=rule: spike_fn("straight_through", "arctan", k, derivative_rule=rule)(jnp.array(0.3)))(
            2.0
        )
        assert float(slope) == 0.0


@pytest.mark.parametrize("run", [lif, lif_pallas])
def test_jacobians_of_a_neuron_are_equal_in_both_modes(run):
    current = jnp.array([[0.6], [0.9], [0.2], [1.1]])

    def total(current, rule):
        return run(current, decay=0.9, spike_fn=spike_fn("straight_through", derivative_rule=rule))[0][:, 0]

    forward = jax.jacfwd(lambda current: total(current, "jvp"))(current)
    np.testing.assert_allclose(forward, jax.jacrev(lambda current: total(current, "vjp"))(current), rtol=1e-5, atol=1e-7)
    assert np.count_nonzero(forward) > 6


@pytest.mark.parametrize("order", ["layer_major", "step_major"])
def test_directional_derivative_of_a_network_is_that_of_its_gradient(order):
    network = SpikingConvNet(3, features=(2, 3), kernel_size=3, order=order)
    rng = np.random.default_rng(0)
    frames = jnp.asarray(rng.integers(0, 2, (3, 2, 6, 6, 2)), jnp.float32)
    params = jax.jit(network.init)(jax.random.key(0), frames)["params"]
    direction = jax.tree.map(lambda w: jnp.asarray(rng.normal(size=w.shape), w.dtype), params)

    def loss(params, network):
        return jnp.sum(network.apply({"params": params}, frames, "straight_through").logits ** 2)

    either = network.clone(derivative_rule="jvp")

    @jax.jit
    def both(params, direction):
        gradient = jax.grad(loss)(params, network)
        in_forward_mode = jax.jvp(lambda params: loss(params, either), (params,), (direction,))[1]
        linear = jax.linearize(lambda params: loss(params, either), params)[1](direction)
        return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, gradient, direction))), in_forward_mode, linear

    expected, *ours = both(params, direction)
    np.testing.assert_allclose(ours, [float(expected)] * 2, rtol=1e-4)
    assert abs(float(expected)) > 1e-2


@pytest.mark.parametrize("make", [lambda: spike_fn("hard", derivative_rule="jacfwd"), lambda: _init("jacfwd")])
def test_unknown_rule_is_refused(make):
    with pytest.raises(ValueError, match="derivative_rule must be one of vjp, jvp; got 'jacfwd'"):
        make()


def _init(rule):
    return jax.eval_shape(SpikingConvNet(3, derivative_rule=rule).init, jax.random.key(0), jnp.zeros((2, 1, 8, 8, 2)))
