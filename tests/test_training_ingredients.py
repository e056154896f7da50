"""What a study adds to training: spikes by schedule, and perturbations that take no gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sast_jax import SpikingMLP, spike_fn
from sast_jax.config import find_problems, load_configs, set_field
from sast_jax.data import Batch
from sast_jax.errors import UserError, refuse
from sast_jax.sharpness import perturb_weights
from sast_jax.spikes import FAMILIES, mixed_spike_fn
from sast_jax.training import init_state, make_train_step
from sast_jax.training.build import costs_a_gradient, make_network, make_optimizer, make_perturbation, make_spikes
from sast_jax.training.session import Task

X = jnp.linspace(-2.0, 2.0, 41)


def load(*overrides):
    return load_configs("configs/digits.py:baseline", overrides)[""]


def draw(seed, batch_size=6):
    rng = np.random.default_rng(seed)
    frames = (rng.random((3, batch_size, 5, 5, 2)) < 0.4).astype(np.uint8)
    return Batch(frames, rng.integers(0, 3, batch_size).astype(np.int32), np.ones(batch_size, bool))


@functools.cache
def initial_params():
    return init_state(SpikingMLP(3, features=(7,)), optax.sgd(1.0), draw(0).frames[:, :1], seed=0).params


def start(tx, network=None):
    network = network or SpikingMLP(3, features=(7,))
    return init_state(network, tx, draw(0).frames[:, :1], seed=0, params=initial_params())


def run(config, num_steps=3, total=3):
    """Weights before and after some steps of a small network, and the step function."""
    network = SpikingMLP(3, features=(7,), slope=config.network.slope)
    state = start(make_optimizer(config, total), network)
    step = make_train_step(
        network, make_optimizer(config, total), make_spikes(config, total, 1), perturb=make_perturbation(config, total)
    )
    weights = [jax.tree.map(np.asarray, state.params)]
    for number in range(num_steps):
        state, _ = step(state, draw(number))
        weights.append(jax.tree.map(np.array, state.params))
    assert step._cache_size() == 1  # Schedules compile once.
    return weights, step


@jax.jit
@jax.grad
def gradient(params, batch):
    logits = SpikingMLP(3, features=(7,)).apply({"params": params}, batch.frames.astype(jnp.float32), "surrogate").logits
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()


def norm(tree):
    return float(np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(tree))))


@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_spikes_are_hard_where_asked_with_the_smooth_derivative(family):
    mask = jnp.arange(len(X)) % 2 == 0
    own = FAMILIES[family]
    spikes, back = jax.jit(lambda x: jax.vjp(mixed_spike_fn(lambda _: mask, family, 3.0), x))(X)
    value, derivative = jax.jit(lambda x: (own.value(x, 3.0), own.derivative(x, 3.0)))(X)
    np.testing.assert_array_equal(spikes, np.where(mask, X > 0, value))
    np.testing.assert_allclose(back(jnp.ones_like(X))[0], derivative, rtol=1e-5)


def spikes_of(config, step, num_steps, layer=0, x=X):
    return np.asarray(make_spikes(config, num_steps, 2)(jnp.int32(step))[layer](x))


def test_without_its_fields_training_has_the_spikes_of_its_mode():
    assert make_spikes(load(), 10, 2) == "surrogate"
    assert make_spikes(load("mode=straight_through"), 10, 2) == "straight_through"


def test_slope_rises_geometrically_from_the_first_to_the_last_step():
    config = load("spikes.initial_slope=2", "network.slope=32")
    for step, slope in ((0, 2.0), (1, 4.0), (3, 16.0), (4, 32.0)):
        np.testing.assert_allclose(spikes_of(config, step, 5), spike_fn("surrogate", "arctan", slope)(X), atol=1e-5)
    assert make_network(config, 10).slope == 32.0  # It is evaluated with the last one.


def test_slope_may_rise_in_straight_through_mode():
    config = load("spikes.initial_slope=2", "network.slope=8", "mode=straight_through")
    fn = make_spikes(config, 3, 1)(jnp.int32(1))[0]
    np.testing.assert_array_equal(fn(X), X > 0)
    np.testing.assert_allclose(jax.jit(jax.vmap(jax.grad(fn)))(X), FAMILIES["arctan"].derivative(X, 4.0), rtol=1e-4)


def test_finish_is_hard_in_its_share_of_the_steps_and_smooth_before():
    config = load("spikes.finish=0.25")
    smooth = np.asarray(spike_fn("surrogate", "arctan", config.network.slope)(X))
    for step in range(8):
        np.testing.assert_allclose(spikes_of(config, step, 8), X > 0 if step >= 6 else smooth, atol=1e-6)


def test_hard_spikes_are_drawn_at_their_share_by_step_layer_and_seed():
    x = jnp.full((200, 50), 0.3)
    config = load("spikes.hard_share=0.2")
    masks = [spikes_of(config, 0, 9, x=x), spikes_of(config, 1, 9, x=x), spikes_of(config, 0, 9, layer=1, x=x)]
    masks.append(spikes_of(load("spikes.hard_share=0.2", "seed=1"), 0, 9, x=x))
    for mask in masks:
        assert np.mean(mask == 1.0) == pytest.approx(0.2, abs=4 * np.sqrt(0.2 * 0.8 / x.size))
    assert all(np.mean(masks[0] == other) < 0.75 for other in masks[1:])  # 0.68 if they are independent.
    np.testing.assert_array_equal(masks[0], spikes_of(config, 0, 9, x=x))
    np.testing.assert_array_equal(spikes_of(load("spikes.hard_share=1"), 0, 9), X > 0)


def test_training_with_hard_spikes_alone_is_straight_through_training():
    (*_, mixed), _ = run(load("spikes.hard_share=1"))
    (*_, plain), _ = run(load("mode=straight_through"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), mixed, plain)


@pytest.mark.perf
@pytest.mark.parametrize(
    "overrides",
    [
        ["spikes.initial_slope=1", "spikes.hard_share=0.5", "spikes.finish=0.5"],
        ["sam.rho=0.1", "sam.perturbation=noise", "sam.every_steps=2"],
        ["sam.rho=0.1", "sam.perturbation=stale", "sam.start=0.5"],
    ],
)
def test_schedules_compile_once(overrides):
    _, step = run(load(*overrides))
    assert step._cache_size() == 1


SGD = ("optimizer.name=sgd", "optimizer.learning_rate=0.5", "optimizer.schedule=constant")


def test_stale_perturbation_is_the_gradient_of_the_step_before():
    (w0, w1, w2), _ = run(load(*SGD, "sam.rho=0.3", "sam.perturbation=stale"), num_steps=2)
    g0 = gradient(w0, draw(0))  # Nothing came before the first step.
    jax.tree.map(lambda w, g, new: np.testing.assert_allclose(new, w - 0.5 * g, atol=1e-5), w0, g0, w1)
    g1 = gradient(jax.tree.map(lambda w, g: w + 0.3 * g / norm(g0), w1, g0), draw(1))
    expected = jax.tree.map(lambda w, g, before: w - 0.5 * (g + 0.9 * before), w1, g1, g0)  # Momentum 0.9.
    jax.tree.map(lambda new, e: np.testing.assert_allclose(new, e, atol=1e-5), w2, expected)


def test_noise_has_norm_rho_a_new_direction_each_step_and_costs_nothing():
    config = load("sam.rho=0.3", "sam.perturbation=noise")
    perturb = jax.jit(make_perturbation(config, 10))
    state = start(optax.sgd(1.0))
    moves = [jax.tree.map(jnp.subtract, perturb(state.replace(step=jnp.int32(step))), state.params) for step in (0, 1)]
    assert [norm(move) for move in moves] == pytest.approx([0.3, 0.3], rel=1e-4)
    cosine = sum(np.sum(a * b) for a, b in zip(*map(jax.tree.leaves, moves), strict=True)) / 0.09
    assert abs(cosine) < 0.3  # 410 weights: standard deviation 0.05.
    assert not costs_a_gradient(config)
    assert costs_a_gradient(load("sam.rho=0.3"))


def test_noise_step_takes_its_only_gradient_at_the_perturbed_weights():
    config = load(*SGD, "sam.rho=0.3", "sam.perturbation=noise")
    (w0, w1), _ = run(config, num_steps=1)
    state = start(make_optimizer(config, 3))
    point = jax.jit(make_perturbation(config, 3))(state)
    jax.tree.map(lambda w, g, new: np.testing.assert_allclose(new, w - 0.5 * g, atol=1e-5), w0, gradient(point, draw(0)), w1)


def test_noise_before_its_start_is_none():
    config = load("sam.rho=0.3", "sam.perturbation=noise", "sam.start=0.5")
    state = start(optax.sgd(1.0))
    moved = jax.jit(make_perturbation(config, 10))(state.replace(step=jnp.int32(4)))
    jax.tree.map(np.testing.assert_array_equal, moved, state.params)


def test_perturbed_weights_are_those_of_sam():
    w, g = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}, {"a": jnp.array([0.0, 3.0]), "b": jnp.array([4.0])}
    moved = jax.jit(perturb_weights)(w, g, 0.5)
    np.testing.assert_allclose(moved["a"], [3.0, 0.3])
    np.testing.assert_allclose(moved["b"], [4.4])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sam.rho=1", "sam.perturbation=noise", "sam.perturbation_batch_size=4"], "'noise' perturbs by no batch of its own"),
        (["mode=straight_through", "spikes.finish=0.5"], "all spikes are hard"),
        (["test=false", "dataset.num_validation=0"], "needs a validation part"),
        (["certified.margin=0.1", "spikes.hard_share=0.5"], "all of spikes must be 0"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        load(*overrides)


@pytest.mark.parametrize(
    "fields",
    [
        {"sam.perturbation_batch_size": 3, "num_microbatches": 2},
        {"sam.perturbation_batch_size": 3, "sam.perturbation": "noise"},
        {"sam.perturbation_batch_size": 1000},
    ],
)
def test_perturbation_batch_size_matters_only_with_sam(tiny, fields):
    baseline, sast = (tiny(variant).copy_and_resolve_references().unlock() for variant in ("baseline", "sast"))
    for key, value in fields.items():
        set_field(baseline, key, value)
        set_field(sast, key, value)
    assert not find_problems(baseline)
    assert Task(baseline).perturbation_batch_size == baseline.batch_size

    def begin(config):
        refuse(find_problems(config))
        Task(config)  # Only its data says that there are not as many samples.

    with pytest.raises(UserError, match="perturbation_batch_size"):
        begin(sast)
