import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from sast_jax import sam

PARAMS = {"w": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "b": jnp.array([0.1, -0.3])}


def loss(params, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ params["w"] + params["b"]) - y) ** 2)


gradient = jax.jit(jax.grad(loss))


def draw(seed):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(5, 2)).astype(np.float32), rng.normal(size=(5, 2)).astype(np.float32)


def by_hand(params, perturbation, descent, rho):
    """The published algorithm with NumPy's norm, leaf by leaf."""
    grads = gradient(params, perturbation)
    norm = np.sqrt(sum(np.sum(np.asarray(g, np.float64) ** 2) for g in grads.values()))
    return gradient({k: params[k] + rho * grads[k] / norm for k in params}, descent)


def update(tx, params, perturbation, descent, state=None):
    return tx.update(
        gradient(params, perturbation),
        tx.init(params) if state is None else state,
        params,
        grad_fn=lambda p: gradient(p, descent),
    )


def assert_trees_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


@pytest.mark.parametrize("rho", [0.05, 0.3, 2.0])
def test_update_is_the_descent_gradient_at_the_perturbed_weights(rho):
    updates, _ = update(sam(rho), PARAMS, draw(0), draw(1))
    assert_trees_close(updates, by_hand(PARAMS, draw(0), draw(1), rho), rtol=1e-5)


def test_perturbation_batch_matters():
    one, _ = update(sam(0.3), PARAMS, draw(0), draw(1))
    other, _ = update(sam(0.3), PARAMS, draw(1), draw(1))
    assert np.abs(one["w"] - other["w"]).max() > 1e-4


def test_perturbation_has_norm_rho():
    seen = {}

    def grad_fn(params):
        seen["norm"] = optax.tree.norm(jax.tree.map(jnp.subtract, params, PARAMS))
        return params

    sam(0.7).update(gradient(PARAMS, draw(0)), sam(0.7).init(PARAMS), PARAMS, grad_fn=grad_fn)
    assert seen["norm"] == pytest.approx(0.7, rel=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1.0, 1e10, 1e30])
def test_direction_does_not_depend_on_the_gradients_scale(scale):
    grads = {"w": scale * jnp.array([[3.0, 0.0], [0.0, 4.0]]), "b": jnp.zeros(2)}
    moved, _ = sam(0.5).update(grads, sam(0.5).init(PARAMS), PARAMS, grad_fn=lambda p: jax.tree.map(jnp.subtract, p, PARAMS))
    np.testing.assert_allclose(moved["w"], [[0.3, 0.0], [0.0, 0.4]], atol=1e-6)


def test_zero_gradient_leaves_the_weights_where_they_are():
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = sam(0.3).update(zero, sam(0.3).init(PARAMS), PARAMS, grad_fn=lambda p: p)
    assert_trees_close(updates, PARAMS)


def test_unnormalised_perturbation_is_rho_times_the_gradient():
    grads = gradient(PARAMS, draw(0))
    updates, _ = sam(0.3, normalize=False).update(grads, sam(0.3).init(PARAMS), PARAMS, grad_fn=lambda p: p)
    assert_trees_close(updates, jax.tree.map(lambda w, g: w + 0.3 * g, PARAMS, grads), rtol=1e-6)


def test_radius_zero_is_the_base_optimizer():
    base = optax.adam(0.1)
    plain, _ = base.update(gradient(PARAMS, draw(1)), base.init(PARAMS), PARAMS)
    updates, _ = update(optax.chain(sam(0.0), base), PARAMS, draw(0), draw(1))
    assert_trees_close(updates, plain, rtol=1e-6)


def test_radius_follows_its_schedule():
    schedule = optax.linear_schedule(0.0, 1.0, 4)
    tx = sam(schedule)
    state = tx.init(PARAMS)
    for step in range(3):
        updates, state = update(tx, PARAMS, draw(0), draw(1), state)
        assert_trees_close(updates, by_hand(PARAMS, draw(0), draw(1), step / 4), rtol=1e-4)


def test_dtype_is_kept_and_the_second_call_does_not_compile():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    tx = optax.chain(sam(0.3), optax.adam(0.1))

    @jax.jit
    def step(params, state, perturbation, descent):
        updates, state = update(tx, params, perturbation, descent, state)
        return optax.apply_updates(params, updates), state

    params, state = step(params, tx.init(params), draw(0), draw(1))
    params, state = step(params, state, draw(2), draw(3))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    assert step._cache_size() == 1


def test_other_links_of_a_chain_see_their_own_arguments():
    tx = optax.chain(sam(0.1), optax.sgd(0.1), optax.contrib.reduce_on_plateau(factor=0.5, patience=0, cooldown=0))
    updates, _ = tx.update(gradient(PARAMS, draw(0)), tx.init(PARAMS), PARAMS, grad_fn=lambda p: gradient(p, draw(1)), value=1.0)
    assert np.isfinite(updates["w"]).all()


@pytest.mark.parametrize("rho", [-0.1, float("nan"), float("inf")])
def test_impossible_radius_is_refused(rho):
    with pytest.raises(ValueError, match="rho must be a finite number >= 0"):
        sam(rho)


def test_missing_arguments_are_named():
    tx = sam(0.1)
    with pytest.raises(ValueError, match="sam needs the weights"):
        tx.update(PARAMS, tx.init(PARAMS), grad_fn=lambda p: p)
    with pytest.raises(ValueError, match="sam needs the gradient function of the descent batch"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)


GRADS = {"w": jnp.array([[0.3, -0.4], [1.2, 0.0]]), "b": jnp.array([0.0, -2.0])}


def perturbation(grads=GRADS, params=PARAMS, **parts):
    """What `sam` adds to the weights before it asks for the descent gradient."""
    tx = sam(**{"rho": 0.5, **parts})
    moved, _ = tx.update(grads, tx.init(params), params, grad_fn=lambda p: jax.tree.map(jnp.subtract, p, params))
    return {key: np.asarray(value, np.float64) for key, value in moved.items()}


def scales(kind):
    w, b = (np.asarray(PARAMS[key], np.float64) for key in ("w", "b"))
    if kind == "element":
        return {"w": np.abs(w), "b": np.abs(b)}
    return {"w": np.array([[np.hypot(1.0, 0.5), np.hypot(2.0, 3.0)]] * 2), "b": np.abs(b)}


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("kind", ["element", "filter"])
def test_adaptive_perturbation_is_that_of_the_paper(kind, normalize):
    scale = scales(kind)
    scaled = {key: scale[key] * np.asarray(GRADS[key], np.float64) for key in scale}
    norm = np.sqrt(sum(np.sum(value**2) for value in scaled.values())) if normalize else 1.0
    expected = {key: 0.5 * scale[key] * scaled[key] / norm for key in scale}
    assert_trees_close(perturbation(adaptive=kind, normalize=normalize), expected, rtol=1e-5, atol=1e-7)


def test_only_an_adaptive_perturbation_follows_the_weights_scale():
    # Scaled weights with a loss that undoes the scale: the gradient shrinks by it, an adaptive perturbation grows by it.
    scaled, grads = jax.tree.map(lambda w: 10 * w, PARAMS), jax.tree.map(lambda g: g / 10, GRADS)
    assert_trees_close(
        perturbation(grads, scaled, adaptive="element"),
        {k: 10 * v for k, v in perturbation(adaptive="element").items()},
        rtol=1e-5,
        atol=1e-6,
    )
    assert_trees_close(perturbation(grads, scaled), perturbation(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mask", [{"w": True, "b": False}, lambda params: jax.tree.map(lambda w: w.ndim > 1, params)])
def test_masked_weights_are_not_perturbed_and_do_not_count(mask):
    moved = perturbation(mask=mask)
    assert not moved["b"].any()
    np.testing.assert_allclose(moved["w"], 0.5 * np.asarray(GRADS["w"]) / 1.3, rtol=1e-5)


def test_mask_may_be_entry_by_entry():
    moved = perturbation(mask={"w": jnp.array([[True, False], [False, False]]), "b": False})
    np.testing.assert_allclose(moved["w"], [[0.5, 0.0], [0.0, 0.0]], rtol=1e-5)


@pytest.mark.parametrize("jit", [False, True])
def test_inactive_update_passes_the_gradient_through_at_the_cost_of_none(jit):
    calls = []

    def grad_fn(params):
        jax.debug.callback(lambda: calls.append(1))
        return gradient(params, draw(1))

    tx = sam(0.3, active=lambda count: count % 3 == 0)
    state = tx.init(PARAMS)
    grads = gradient(PARAMS, draw(0))
    step = (lambda f: jax.jit(f) if jit else f)(lambda state: tx.update(grads, state, PARAMS, grad_fn=grad_fn))
    for count in range(7):
        updates, state = step(state)
        expected = by_hand(PARAMS, draw(0), draw(1), 0.3) if count % 3 == 0 else grads
        assert_trees_close(updates, expected, rtol=1e-4, atol=1e-6)
    jax.effects_barrier()
    assert len(calls) == 3


def flat(tree):
    return np.concatenate([np.asarray(tree[key], np.float64).ravel() for key in ("w", "b")])


def test_reuse_is_the_step_of_looksam():
    tx = sam(0.3, active=lambda count: count == 0, reuse=0.7)
    state = tx.init(PARAMS)
    sharp, state = update(tx, PARAMS, draw(0), draw(0), state)
    plain = gradient(PARAMS, draw(0))
    orthogonal = flat(sharp) - flat(sharp) @ flat(plain) / (flat(plain) @ flat(plain)) * flat(plain)
    later = gradient(PARAMS, draw(2))
    reused, _ = update(tx, PARAMS, draw(2), draw(3), state)
    expected = flat(later) + 0.7 * np.linalg.norm(flat(later)) / np.linalg.norm(orthogonal) * orthogonal
    np.testing.assert_allclose(flat(reused), expected, rtol=1e-4, atol=1e-6)


def test_gsam_takes_off_what_is_orthogonal_to_the_perturbed_gradient():
    plain, perturbed = flat(gradient(PARAMS, draw(0))), flat(by_hand(PARAMS, draw(0), draw(0), 0.3))
    orthogonal = plain - plain @ perturbed / (perturbed @ perturbed) * perturbed
    updates, _ = update(sam(0.3, gsam=0.4), PARAMS, draw(0), draw(0))
    np.testing.assert_allclose(flat(updates), perturbed - 0.4 * orthogonal, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("parts", [{}, {"active": lambda count: count < 1, "reuse": 0.5, "gsam": 0.1, "adaptive": "filter"}])
def test_loss_of_the_descent_batch_is_kept_without_another_evaluation(parts):
    tx = optax.chain(sam(0.3, aux={"loss": 0.0}, **parts), optax.sgd(0.1))

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params, draw(0))

        def grad_fn(params):
            value, grads = jax.value_and_grad(loss)(params, draw(1))
            return grads, {"loss": value}

        updates, state = tx.update(grads, state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state, value

    params, state, _ = step(PARAMS, tx.init(PARAMS))
    grads = gradient(PARAMS, draw(0))
    direction = perturbation(grads, rho=0.3, **{k: v for k, v in parts.items() if k == "adaptive"})
    expected = loss(jax.tree.map(jnp.add, PARAMS, direction), draw(1))
    assert float(optax.tree.get(state, "aux")["loss"]) == pytest.approx(float(expected), rel=1e-5)
    step(params, state)
    assert step._cache_size() == 1


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"adaptive": "layer"}, "adaptive must be None or one of element, filter; got 'layer'"),
        ({"reuse": -1.0, "active": lambda count: count > 0}, "reuse must be a finite number >= 0"),
        ({"gsam": float("nan")}, "gsam must be a finite number >= 0"),
        ({"reuse": 0.5}, "reuse needs active"),
    ],
)
def test_impossible_part_is_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        sam(0.1, **parts)


def test_reuse_before_any_active_update_passes_the_gradient_through():
    tx = sam(0.3, active=lambda count: count == 4, reuse=2.0)
    grads = jax.tree.map(lambda g: 100 * g, GRADS)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS, grad_fn=lambda p: p)
    assert_trees_close(updates, grads)


def test_weights_move_in_bfloat16_where_its_resolution_allows():
    params, grads = (jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree) for tree in (PARAMS, GRADS))
    moved, _ = sam(0.5).update(grads, sam(0.5).init(params), params, grad_fn=lambda p: jax.tree.map(jnp.subtract, p, params))
    np.testing.assert_allclose(moved["w"].astype(jnp.float32), perturbation()["w"], atol=0.01)


def test_zero_gradient_is_finite_with_every_part():
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    tx = sam(0.3, adaptive="element", gsam=0.5, active=lambda count: count < 1, reuse=1.0)
    state = tx.init(PARAMS)
    for _ in range(2):
        updates, state = tx.update(zero, state, PARAMS, grad_fn=lambda p: zero)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))
