import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sast_jax import SpikingMLP, accumulate, sam
from sast_jax.data import Batch
from sast_jax.training import init_state, make_train_step


def draw(seed, batch_size=12):
    rng = np.random.default_rng(seed)
    frames = (rng.random((4, batch_size, 5, 5, 2)) < 0.4).astype(np.uint8)
    return Batch(frames, rng.integers(0, 3, batch_size).astype(np.int32), np.ones(batch_size, bool))


@pytest.mark.parametrize("num_microbatches", [1, 2, 6])
def test_parts_average_to_the_whole_with_the_samples_on_any_axis(num_microbatches):
    rng = np.random.default_rng(0)
    batch = {"x": rng.normal(size=(3, 6, 2)), "y": rng.normal(size=6)}

    def loss(w, batch):
        return jnp.mean((jnp.tanh(jnp.einsum("tbn,n->b", batch["x"], w)) - batch["y"]) ** 2)

    w = rng.normal(size=2)
    value_and_grad = jax.jit(jax.value_and_grad(loss))
    ours = jax.jit(accumulate(value_and_grad, num_microbatches, axes={"x": -2, "y": 0}))(w, batch)
    for a, b in zip(ours, value_and_grad(w, batch), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_each_part_is_seen_once():
    seen = accumulate(lambda w, x: x.sum(), 4)(0.0, jnp.arange(8.0))
    assert float(seen) == 28 / 4


def test_train_step_of_sast_is_the_same_in_parts():
    network = SpikingMLP(3, features=(7,))
    tx = optax.chain(sam(0.3), optax.sgd(0.5))
    results = []
    for num_microbatches in (1, 3):
        state = init_state(network, tx, draw(0).frames[:, :1], seed=0)
        step = make_train_step(network, tx, "surrogate", num_microbatches=num_microbatches)
        results.append(step(state, draw(0), draw(1, 6)))
    (whole, metrics), (parts, metrics_of_parts) = results
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), whole.params, parts.params)
    for key, value in metrics.items():
        assert float(value) == pytest.approx(float(metrics_of_parts[key]), rel=1e-5), key


@pytest.mark.perf
def test_parts_need_less_memory():
    network = SpikingMLP(3, features=(256,))
    tx = optax.sgd(0.5)
    sizes = []
    for num_microbatches in (1, 8):
        state = init_state(network, tx, draw(0).frames[:, :1], seed=0)
        step = make_train_step(network, tx, "surrogate", num_microbatches=num_microbatches)
        sizes.append(step.lower(state, draw(0, 512)).compile().memory_analysis().temp_size_in_bytes)
    assert sizes[1] < 0.5 * sizes[0]


def test_parts_of_unequal_size_are_refused():
    with pytest.raises(ValueError, match="num_microbatches must divide the number of samples, 8; got 3"):
        accumulate(jax.grad(lambda w, x: (w * x).mean()), 3)(1.0, jnp.ones(8))
    with pytest.raises(ValueError, match="at least 1"):
        accumulate(jax.grad(lambda w, x: (w * x).mean()), 0)
