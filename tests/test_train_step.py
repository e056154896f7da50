"""What a train step takes from a loop of one's own, and which batch it trains on."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sast_jax import SpikingMLP, lif, sam, spike_fn
from sast_jax.data import Batch, Recordings, batch_indices, evaluation_batches
from sast_jax.evaluation.transfer import evaluate_transfer, make_eval_step
from sast_jax.training import init_state, make_train_step

NETWORK = SpikingMLP(3, features=(4,))


def draw(seed, batch_size=4, labels=None):
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 2, (3, batch_size, 2, 2, 2)).astype(np.uint8)
    labels = rng.integers(0, 3, batch_size).astype(np.int32) if labels is None else labels
    return Batch(frames, labels, np.ones(batch_size, bool))


def new_params(tx, *batches, network=NETWORK, **parts):
    state = init_state(network, tx, draw(0).frames, seed=0)
    return make_train_step(network, tx, "surrogate", **parts)(state, *batches)[0].params


@pytest.fixture(scope="module")
def on_descent_batch():
    return new_params(optax.sgd(1.0), draw(1))


def test_without_sam_the_descent_batch_is_trained_on(on_descent_batch):
    jax.tree.map(np.testing.assert_array_equal, new_params(optax.sgd(1.0), draw(1), draw(2)), on_descent_batch)


def test_gradient_function_of_another_optimizer_gets_the_descent_batch(on_descent_batch):
    def update(updates, state, params=None, *, grad_fn, **extra_args):
        return grad_fn(params), state

    own = optax.chain(optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update), optax.sgd(1.0))
    ours = new_params(own, draw(1), draw(2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, on_descent_batch)
    assert not np.array_equal(
        new_params(optax.chain(sam(1.0), optax.sgd(1.0)), draw(1), draw(2))["dense_0"]["kernel"],
        on_descent_batch["dense_0"]["kernel"],
    )


def test_hard_spikes_are_refused_for_training():
    with pytest.raises(ValueError, match="mode must be surrogate or straight_through: the derivative of hard spikes is zero"):
        make_train_step(NETWORK, optax.sgd(1.0), "hard")


@pytest.mark.parametrize("place", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("labels", [[1, 2, 3, 3], [0, -1, 1, 2]])
def test_labels_that_are_no_class_are_refused_before_the_step(labels, place):
    state = init_state(NETWORK, optax.sgd(1.0), draw(0).frames, seed=0)
    step = make_train_step(NETWORK, optax.sgd(1.0), "surrogate")
    with pytest.raises(ValueError, match=rf"labels must be 0 to 2, .* 3 classes; got labels from {min(labels)} to {max(labels)}"):
        step(state, draw(0, labels=place(labels)))
    assert not state.params["dense_0"]["kernel"].is_deleted()


def test_labels_of_each_batch_are_looked_at():
    step = make_train_step(NETWORK, optax.sgd(1.0), "surrogate")
    state, _ = step(init_state(NETWORK, optax.sgd(1.0), draw(0).frames, seed=0), draw(0), draw(1))
    with pytest.raises(ValueError, match="labels must be 0 to 2"):
        step(state, draw(0), draw(1, labels=np.array([0, 1, 2, 3], np.int32)))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (draw(0)._replace(frames=draw(0).frames.swapaxes(0, 1)), r"frames \[T, B, ...\], time first, .* got frames \[4, 3"),
        (draw(0, labels=np.ones(4, np.float32)), r"integer labels \[B\]; .* labels float32\[4\]"),
        (draw(0, labels=np.eye(4, 3, dtype=np.int32)), r"labels int32\[4, 3\]"),
    ],
)
def test_batch_of_other_shapes_is_refused(batch, message):
    state = jax.eval_shape(lambda: init_state(NETWORK, optax.sgd(1.0), draw(0).frames, seed=0))
    with pytest.raises(ValueError, match=message):
        make_train_step(NETWORK, optax.sgd(1.0), "surrogate").eval_shape(state, batch)


class Net(nn.Module):
    """As in the README: logits alone."""

    over_time: bool = True

    @nn.compact
    def __call__(self, frames, mode="surrogate"):
        current = nn.Dense(4)(frames.reshape(*frames.shape[:2], -1))
        spikes, _ = lif(current, decay=0.9, spike_fn=spike_fn(mode))
        logits = nn.Dense(3)(spikes)
        return logits.mean(axis=0) if self.over_time else logits


def test_network_that_returns_logits_alone_is_trained_and_evaluated():
    tx = optax.chain(sam(0.1), optax.sgd(1.0))
    state = init_state(Net(), tx, draw(0).frames, seed=0)

    def loss(params, batch):
        return optax.softmax_cross_entropy_with_integer_labels(Net().apply({"params": params}, batch.frames), batch.labels).mean()

    grads = jax.grad(loss)(state.params, draw(2))
    updates, _ = tx.update(grads, state.opt_state, state.params, grad_fn=lambda params: jax.grad(loss)(params, draw(1)))
    expected = optax.apply_updates(state.params, updates)
    state, metrics = make_train_step(Net(), tx, "surrogate")(state, draw(1), draw(2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state.params, expected)
    assert {"loss", "accuracy", "gradient_norm_Dense_0"} < metrics.keys()

    frames, labels = draw(3, 5).frames.swapaxes(0, 1), draw(3, 5).labels
    measured = evaluate_transfer(make_eval_step(Net()), state.params, Recordings(frames, labels, labels.astype(str)), 4)
    for mode in ("surrogate", "hard"):
        decided = Net().apply({"params": state.params}, frames.swapaxes(0, 1), mode).argmax(-1)
        assert measured[f"{mode}_accuracy"] == pytest.approx(np.mean(decided == labels))


@pytest.mark.parametrize(
    ("network", "error", "message"),
    [
        (Net(over_time=False), ValueError, r"the network must return logits \[B, K\], here \[4, K\]; got \[3, 4, 3\]"),
        (
            nn.Sequential([Net(), lambda logits: (logits, logits)]),
            TypeError,
            r"logits \[B, K\] or a sast_jax.NetworkOutput; got tuple",
        ),
    ],
)
def test_network_that_returns_something_else_is_refused(network, error, message):
    state = jax.eval_shape(lambda: init_state(network, optax.sgd(1.0), draw(0).frames, seed=0))
    with pytest.raises(error, match=message):
        make_train_step(network, optax.sgd(1.0), "surrogate").eval_shape(state, draw(0))


@pytest.mark.parametrize("batch_size", [0, 11])
def test_batch_larger_than_the_set_or_empty_is_refused(batch_size):
    with pytest.raises(ValueError, match=f"batch_size must be 1 to 10, the number of samples; got {batch_size}"):
        batch_indices(10, batch_size, seed=0, stream=0, step=0)


def test_evaluation_of_no_recordings_is_refused():
    none = Recordings(np.zeros((0, 3, 2, 2, 2), np.uint8), np.zeros(0, np.int32), np.zeros(0, str))
    with pytest.raises(ValueError, match="an evaluation needs recordings and a batch_size of at least 1; got 0 and 0"):
        evaluate_transfer(make_eval_step(NETWORK), {}, none, 4)
    with pytest.raises(ValueError, match="batch_size of at least 1"):
        next(evaluation_batches(none._replace(labels=np.zeros(3, np.int32)), 0))
