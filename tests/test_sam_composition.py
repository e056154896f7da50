"""`sam` in front of everything that optax has: either equal to two gradients taken by hand, or refused with a way out."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from sast_jax import sam

RHO = 0.3
PARAMS = {"w": jnp.array([[1.0, -2.0, 0.3], [0.5, 3.0, -0.7]]), "b": jnp.array([0.1, -0.3, 0.2])}

# What optax has beside optimizers that take gradients alone, and why it is not in the test that covers those.
NEEDS_MORE = {
    **dict.fromkeys(
        ["lbfgs", "scale_by_lbfgs", "scale_by_backtracking_linesearch", "scale_by_zoom_linesearch"], "evaluates the loss"
    ),
    **dict.fromkeys(["polyak_sgd", "scale_by_polyak", "momo", "momo_adam", "reduce_on_plateau"], "takes the loss: tested below"),
    **dict.fromkeys(["differentially_private_aggregate", "dpsgd"], "takes a gradient per sample"),
    **dict.fromkeys(["add_noise", "noisy_sgd"], "takes a key: tested below"),
    **dict.fromkeys(["chain", "named_chain", "identity"], "what the test itself uses"),
    **dict.fromkeys(
        ["masked", "multi_transform", "partition", "selective_transform", "flatten", "apply_if_finite", "inject_hyperparams"],
        "wraps others: tested below",
    ),
    **dict.fromkeys(["schedule_free", "mechanize", "lookahead", "inject_stateful_hyperparams"], "wraps others"),
    **dict.fromkeys(["conditionally_mask", "conditionally_transform", "with_extra_args_support", "snapshot"], "wraps others"),
    **dict.fromkeys(
        ["measure_with_ema", "stateless", "stateless_with_tree_map", "freeze", "split_real_and_imaginary"], "wraps others"
    ),
    "sam": "another SAM",
    "sophia": "evaluates the loss for its Hessian",
    "scale_by_muon": "the inside of muon, which is tested, for matrices only",
    "optimistic_adam": "deprecated for optimistic_adam_v2, which is tested",
}


# These see signs alone, or hardly move within a few steps, and go the same way with and without a perturbation.
INSENSITIVE = (
    "lars",
    "lion",
    "rprop",
    "scale_by_distance_over_gradients",
    "set_to_zero",
    "sign",
    "sign_sgd",
    "dadapt_adamw",
    "prodigy",
)


def alone():
    """All transformations that take gradients alone, made with a learning rate, or a number for what they require."""
    for module in (optax, optax.contrib):
        for name in sorted(dir(module)):
            make = getattr(module, name)
            if name.startswith("_") or inspect.isclass(make) or not inspect.isfunction(make):
                continue
            signature = inspect.signature(make)
            if "GradientTransformation" not in str(signature.return_annotation) or name in NEEDS_MORE:
                continue
            required = [key for key, p in signature.parameters.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
            arguments = dict.fromkeys(required, 0.1)
            arguments |= {"step_size_fn": lambda count: 0.1} if "step_size_fn" in arguments else {}
            yield pytest.param(make, arguments, not name.endswith(INSENSITIVE), id=f"{module.__name__}.{name}")


def loss(params, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ params["w"] + params["b"]) - y) ** 2)


gradient = jax.jit(jax.grad(loss))


@functools.cache
def draw(seed):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(5, 2)).astype(np.float32), rng.normal(size=(5, 3)).astype(np.float32)


def by_hand(params, step):
    """The gradient at the perturbed weights, the published algorithm leaf by leaf."""
    grads = gradient(params, draw(2 * step))
    norm = np.sqrt(sum(np.sum(np.asarray(g, np.float64) ** 2) for g in jax.tree.leaves(grads)))
    return gradient(jax.tree.map(lambda w, g: w + RHO * g / norm, params, grads), draw(2 * step + 1))


def run(tx, update, num_steps=4, **extra):
    """The weights after each step, and the last state."""
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(float)), PARAMS)  # In float64 where that is enabled.
    state, trajectory = tx.init(params), []
    for step in range(num_steps):
        updates, state = update(tx, params, state, step, **extra)
        params = optax.apply_updates(params, updates)
        trajectory.append(params)
    return trajectory, state


def with_sam(tx, params, state, step, **extra):
    grads = gradient(params, draw(2 * step))
    return tx.update(grads, state, params, grad_fn=lambda p: gradient(p, draw(2 * step + 1)), **extra)


def without(tx, params, state, step, **extra):
    return optax.with_extra_args_support(tx).update(by_hand(params, step), state, params, **extra)


def assert_close(ours, expected, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), ours, expected)


def assert_equal_by_hand(composed, base, **extra):
    """In float64; returns the weights after each step by hand."""
    ours, expected = run(composed, with_sam, **extra)[0], run(base, without, **extra)[0]
    assert_close(ours[-1], expected[-1], rtol=1e-6, atol=1e-8)
    return expected


@pytest.mark.parametrize(("make", "arguments", "is_sensitive"), list(alone()))
def test_chain_with_every_optimizer_is_as_by_hand(make, arguments, is_sensitive, float64):
    expected = assert_equal_by_hand(optax.chain(sam(RHO), make(**arguments)), make(**arguments))
    if is_sensitive:  # The comparison sees a missing perturbation.
        without_perturbation, _ = run(optax.chain(sam(0.0), make(**arguments)), with_sam, 2)
        with pytest.raises(AssertionError):
            assert_close(without_perturbation[1], expected[1], rtol=2e-4, atol=2e-5)


WRAPPERS = {
    "named_chain": (lambda tx, base: optax.named_chain(("sam", tx), ("base", base)), lambda base: base),
    "clip, decay and schedule behind it": (
        lambda tx, base: optax.chain(tx, optax.clip_by_global_norm(0.1), optax.add_decayed_weights(0.1), base),
        lambda base: optax.chain(optax.clip_by_global_norm(0.1), optax.add_decayed_weights(0.1), base),
    ),
    "masked optimizer": (
        lambda tx, base: optax.chain(tx, optax.masked(base, {"w": True, "b": False})),
        lambda base: optax.masked(base, {"w": True, "b": False}),
    ),
    "multi_transform optimizer": (
        lambda tx, base: optax.chain(tx, optax.multi_transform({"x": base, "y": optax.sgd(0.01)}, {"w": "x", "b": "y"})),
        lambda base: optax.multi_transform({"x": base, "y": optax.sgd(0.01)}, {"w": "x", "b": "y"}),
    ),
    "flattened optimizer": (lambda tx, base: optax.chain(tx, optax.flatten(base)), optax.flatten),
    "apply_if_finite": (lambda tx, base: optax.chain(tx, optax.apply_if_finite(base, 2)), lambda base: base),
    "MultiSteps behind it": (
        lambda tx, base: optax.chain(tx, optax.MultiSteps(base, 2).gradient_transformation()),
        lambda base: optax.MultiSteps(base, 2).gradient_transformation(),
    ),
    "schedule_free": (
        lambda tx, base: optax.chain(tx, optax.contrib.schedule_free(base, 0.1)),
        lambda base: optax.contrib.schedule_free(base, 0.1),
    ),
    "schedule_free around both": (
        lambda tx, base: optax.contrib.schedule_free(optax.chain(tx, base), 0.1),
        lambda base: optax.contrib.schedule_free(base, 0.1),
    ),
    "mechanize around both": (
        lambda tx, base: optax.contrib.mechanize(optax.chain(tx, base)),
        lambda base: optax.contrib.mechanize(base),
    ),
    "ema": (lambda tx, base: optax.chain(tx, base, optax.ema(0.9)), lambda base: optax.chain(base, optax.ema(0.9))),
    "inject_hyperparams": (
        lambda tx, base: optax.chain(optax.inject_hyperparams(sam)(rho=RHO), base),
        lambda base: base,
    ),
    "inject_hyperparams of the optimizer": (
        lambda tx, base: optax.chain(tx, optax.inject_hyperparams(optax.sgd)(optax.linear_schedule(0.1, 0.0, 4))),
        lambda base: optax.sgd(optax.linear_schedule(0.1, 0.0, 4)),
    ),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapper_equals_two_gradients_by_hand(name, float64):
    composed, base = WRAPPERS[name]
    optimizer = optax.sgd(0.1, momentum=0.9)
    assert_equal_by_hand(composed(sam(RHO), optimizer), base(optimizer))


@pytest.mark.parametrize(
    "make",
    [
        lambda: optax.polyak_sgd(0.5),
        lambda: optax.contrib.momo(0.1),
        lambda: optax.contrib.momo_adam(0.1),
        lambda: optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(factor=0.5, patience=0, cooldown=0)),
    ],
    ids=["polyak_sgd", "momo", "momo_adam", "reduce_on_plateau"],
)
def test_the_loss_reaches_the_links_that_take_it(make, float64):
    assert_equal_by_hand(optax.chain(sam(RHO), make()), make(), value=jnp.array(0.7))


def test_optimizer_with_a_key_of_its_own_draws_the_same_noise(float64):
    assert_equal_by_hand(
        optax.chain(sam(RHO), optax.noisy_sgd(0.1, key=jax.random.key(3))), optax.noisy_sgd(0.1, key=jax.random.key(3))
    )


def test_rho_is_scheduled_through_inject_hyperparams():
    schedule = optax.piecewise_constant_schedule(RHO, {2: 0.0})
    tx = optax.chain(optax.inject_hyperparams(sam)(rho=schedule), optax.sgd(0.1))
    (_, params), state = run(tx, with_sam, 2)
    (_, expected), _ = run(optax.sgd(0.1), without, 2)
    np.testing.assert_allclose(params["w"], expected["w"], rtol=1e-5)
    updates, state = jax.jit(lambda params, state: with_sam(tx, params, state, 2))(params, state)
    np.testing.assert_allclose(updates["w"], -0.1 * gradient(params, draw(5))["w"], rtol=1e-4, atol=1e-6)
    assert state[0].hyperparams["rho"] == 0.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optax.masked(sam(RHO), {"w": True, "b": False}), r"write chain\(sam\(rho, mask=...\), masked"),
        (
            lambda: optax.multi_transform({"x": sam(RHO), "y": optax.sgd(0.1)}, {"w": "x", "b": "y"}),
            r"write chain\(sam\(rho, mask",
        ),
        (
            lambda: optax.partition({"x": optax.chain(sam(RHO), optax.sgd(0.1)), "y": optax.adam(1)}, {"w": "x", "b": "y"}),
            "mask=",
        ),
        (lambda: optax.MultiSteps(optax.chain(sam(RHO), optax.sgd(0.1)), 2), r"write chain\(sam\(...\), MultiSteps"),
        (lambda: optax.MultiSteps(sam(RHO), 2).gradient_transformation(), r"write chain\(sam\(...\), MultiSteps"),
        (lambda: optax.apply_if_finite(optax.chain(sam(RHO), optax.sgd(0.1)), 2), r"write chain\(sam\(...\), apply_if_finite"),
        (lambda: optax.lookahead(optax.chain(sam(RHO), optax.sgd(0.1)), 2, 0.5), r"write chain\(sam\(...\), optimizer"),
    ],
)
def test_wrapper_that_would_be_wrong_is_refused_at_init(make, message):
    with pytest.raises(ValueError, match=message):
        make().init(optax.LookaheadParams.init_synced(PARAMS) if "lookahead" in message or "optimizer" in message else PARAMS)


@pytest.mark.parametrize(
    "tx",
    [
        optax.chain(optax.add_decayed_weights(0.1), sam(RHO), optax.sgd(0.1)),
        optax.chain(optax.clip(1.0), optax.chain(optax.identity(), sam(RHO)), optax.sgd(0.1)),
        optax.named_chain(("decay", optax.add_decayed_weights(0.1)), ("sam", sam(RHO))),
        optax.chain(optax.add_decayed_weights(0.1), optax.chain(sam(RHO), optax.sgd(0.1))),
        optax.chain(optax.clip(0.1), optax.inject_hyperparams(sam)(rho=RHO), optax.sgd(0.1)),
        optax.chain(optax.clip(1.0), optax.named_chain(("sam", sam(RHO)), ("sgd", optax.sgd(0.1)))),
    ],
)
def test_link_before_sam_is_refused_with_what_to_write(tx):
    with pytest.raises(ValueError, match=r"sam must be the first link.*write chain\(sam\(...\), add_decayed_weights"):
        with_sam(tx, PARAMS, tx.init(PARAMS), 0)


def test_function_that_inject_hyperparams_would_call_is_refused():
    def kernels(params):
        return jax.tree.map(lambda w: jnp.ndim(w) > 1, params)

    for parts in ({"mask": kernels}, {"active": lambda count: count > 2}):
        tx = optax.inject_hyperparams(sam)(rho=RHO, **parts)
        with pytest.raises(ValueError, match=r'static_args=\("active", "mask"\)'):
            with_sam(tx, PARAMS, tx.init(PARAMS), 0)
        tx = optax.inject_hyperparams(sam, static_args=("active", "mask"))(rho=RHO, **parts)
        updates, _ = with_sam(tx, PARAMS, tx.init(PARAMS), 0)
        expected, _ = with_sam(sam(RHO, **parts), PARAMS, sam(RHO, **parts).init(PARAMS), 0)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), updates, expected)


def test_flatten_around_sam_fails_with_what_to_write():
    tx = optax.flatten(optax.chain(sam(RHO), optax.sgd(0.1)))
    with pytest.raises(Exception, match=r".") as error:
        with_sam(tx, PARAMS, tx.init(PARAMS), 0)
    assert any("chain(sam(...), flatten(optimizer))" in note for note in error.value.__notes__)


def test_sam_works_inside_scan_cond_and_vmap():
    tx = optax.chain(sam(RHO), optax.adam(0.05))
    batches = [jax.tree.map(lambda *leaves: np.stack(leaves), *(draw(2 * step + i) for step in range(4))) for i in (0, 1)]

    def step(carry, pair):
        params, state = carry
        perturbation, descent = pair
        grads = gradient(params, perturbation)
        updates, state = jax.lax.cond(
            state[0].count >= 0,
            lambda: tx.update(grads, state, params, grad_fn=lambda p: gradient(p, descent)),
            lambda: (grads, state),
        )
        return (optax.apply_updates(params, updates), state), None

    (*_, expected), _ = run(optax.adam(0.05), without)
    many = jax.tree.map(lambda w: jnp.stack([w, 2 * w]), PARAMS)
    (params, _), _ = jax.vmap(lambda w: jax.lax.scan(step, (w, tx.init(w)), tuple(batches)))(many)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0], b, rtol=1e-4, atol=1e-5), params, expected)
