"""What `sam` takes for a gradient, and what it says of a mistake."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

from sast_jax import sam

W = jnp.array([3.0, 4.0])


def loss(w):
    return 0.5 * jnp.sum(w**2)


def update(grad_fn, params=W, grads=W, **parts):
    tx = sam(0.5, **parts)
    return tx.update(grads, tx.init(params), params, grad_fn=grad_fn)


@pytest.mark.parametrize("parts", [{}, {"aux": 0.0}, {"aux": 0.0, "active": lambda count: count < 1}])
@pytest.mark.parametrize("params", [W, {"a": W, "b": jnp.ones((2, 2))}])
def test_loss_in_place_of_the_gradient_is_refused(params, parts):
    grad_fn = jax.value_and_grad(lambda params: sum(map(loss, jax.tree.leaves(params))))
    with pytest.raises(ValueError, match=r"grad_fn must return .*jax\.value_and_grad returns the loss first: take jax\.grad"):
        update(grad_fn, params, jax.tree.map(jnp.ones_like, params), **parts)


def test_value_and_grad_the_other_way_round_keeps_the_loss():
    # w + 0.5 w / |w| = (3.3, 4.4), whose loss is 0.5 * 5.5^2.
    gradient, state = update(lambda w: jax.value_and_grad(loss)(w)[::-1], aux=0.0)
    np.testing.assert_allclose(gradient, [3.3, 4.4], rtol=1e-6)
    assert float(state.aux) == pytest.approx(15.125)


def test_loss_is_not_cut_to_an_integer():
    with pytest.raises(ValueError, match=r"sam\(aux=...\) is int32\[\], which cannot hold float32\[\]: write aux=0.0, not aux=0"):
        update(lambda w: jax.value_and_grad(loss)(w)[::-1], aux=0)
    _, state = update(lambda w: (w, jnp.int32(7)), aux=0)  # What counts may be an integer.
    assert int(state.aux) == 7
    _, state = update(lambda w: (w, jnp.bfloat16(0.5)), aux=0.0)
    assert state.aux.dtype == jnp.float32


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda w: w[:1], r"shaped as the weights, float32\[2\]; got float32\[1\]"),
        (lambda w: {"w": w}, r"shaped as the weights, float32\[2\]; got \{w: float32\[2\]\}"),
        (lambda w: w > 0, r"floating-point numbers shaped .* got bool\[2\]"),
        (lambda w: None, "got None"),
    ],
)
def test_gradient_of_another_structure_shape_or_dtype_is_refused(output, message):
    with pytest.raises(ValueError, match=message):
        update(output)
    with pytest.raises(ValueError, match="perturbation_grads must be floating-point numbers shaped as the weights"):
        update(lambda w: w, grads=output(W))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda w: w, r"grad_fn must return \(gradient, aux\), as sam was given aux; got float32\[2\]"),
        (lambda w: (w, w), r"an aux shaped as that of sam\(aux=...\), float32\[\]; got float32\[2\]"),
        (lambda w: (w, {"loss": w.sum()}), r"an aux shaped as .*; got \{loss: float32\[\]\}"),
    ],
)
def test_missing_or_other_aux_is_refused(output, message):
    with pytest.raises(ValueError, match=message):
        update(output, aux=0.0)


def test_flax_train_state_is_told_to_pass_grad_fn_on():
    state = TrainState.create(apply_fn=None, params={"w": W}, tx=optax.chain(sam(0.1), optax.sgd(0.1)))
    with pytest.raises(ValueError, match=r"TrainState\.apply_gradients does not pass grad_fn on: call state\.tx\.update"):
        state.apply_gradients(grads={"w": W}, grad_fn=jax.grad(loss))


@pytest.mark.parametrize("rho", [np.float32(-0.1), jnp.float32(-0.1), np.nan, "0.1"])
def test_radius_of_any_kind_of_number_is_checked(rho):
    with pytest.raises(ValueError, match="rho must be a finite number >= 0"):
        sam(rho)
