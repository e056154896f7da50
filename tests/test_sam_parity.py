"""`sam` against other implementations: the published algorithm in NumPy, and `optax.contrib.sam`."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from sast_jax import SpikingConvNet, SpikingMLP, sam
from tests.weights import random_params

RHO, LEARNING_RATE, NUM_STEPS = 0.2, 0.3, 8


class LogisticRegression:
    """Loss and its gradient by hand."""

    @staticmethod
    def init(rng):
        return {"w": rng.normal(size=(5, 3)), "b": rng.normal(size=3)}

    @staticmethod
    def loss(params, x, y):
        logits = x @ params["w"] + params["b"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @staticmethod
    def gradient(params, x, y):
        logits = x @ params["w"] + params["b"]
        p = np.exp(logits - logits.max(1, keepdims=True))
        delta = (p / p.sum(1, keepdims=True) - np.eye(3)[y]) / len(x)
        return {"w": x.T @ delta, "b": delta.sum(0)}


class TwoLayers:
    """A hidden layer of tanh and a squared error, with backpropagation by hand."""

    @staticmethod
    def init(rng):
        return {"w": rng.normal(size=(5, 4)), "v": rng.normal(size=(4, 3))}

    @staticmethod
    def loss(params, x, y):
        return jnp.mean((jnp.tanh(x @ params["w"]) @ params["v"] - jnp.eye(3)[y]) ** 2)

    @staticmethod
    def gradient(params, x, y):
        hidden = np.tanh(x @ params["w"])
        delta = 2 * (hidden @ params["v"] - np.eye(3)[y]) / (3 * len(x))
        return {"w": x.T @ ((delta @ params["v"].T) * (1 - hidden**2)), "v": hidden.T @ delta}


def draw(rng):
    return rng.normal(size=(6, 5)), rng.integers(0, 3, 6)


@functools.cache
def compiled_step(model):
    tx = optax.chain(sam(RHO), optax.sgd(LEARNING_RATE))

    @jax.jit
    def step(params, state, perturbation, descent):
        grads = jax.grad(model.loss)(params, *perturbation)
        updates, state = tx.update(grads, state, params, grad_fn=lambda p: jax.grad(model.loss)(p, *descent))
        return optax.apply_updates(params, updates), state

    return tx, step


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("model", [LogisticRegression, TwoLayers])
@pytest.mark.parametrize("same", [True, False])
def test_agrees_with_the_published_algorithm_in_numpy(model, seed, same, float64):
    rng = np.random.default_rng(seed)
    expected = model.init(rng)
    params = jax.tree.map(jnp.asarray, expected)
    tx, step = compiled_step(model)
    state = tx.init(params)
    for _ in range(NUM_STEPS):
        descent = draw(rng)
        perturbation = descent if same else draw(rng)
        g = model.gradient(expected, *perturbation)
        norm = np.sqrt(sum(np.sum(leaf**2) for leaf in g.values()))
        perturbed = {key: expected[key] + RHO * g[key] / norm for key in g}
        g = model.gradient(perturbed, *descent)
        expected = {key: expected[key] - LEARNING_RATE * g[key] for key in g}
        params, state = step(params, state, perturbation, descent)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), params, expected)


def spiking_loss(network):
    frames = (np.random.default_rng(0).random((5, 4, 8, 8, 2)) < 0.4).astype(np.float64)

    def loss(params, x, y):
        del x
        logits = network.apply({"params": params}, frames).logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, y[:4]).mean()

    def init(rng):
        params = random_params(network, frames.shape[2:], seed=int(rng.integers(1000)))
        return jax.tree.map(lambda leaf: leaf.astype(np.float64), params)

    return init, loss


MODELS = {
    "logistic regression": lambda: (LogisticRegression.init, LogisticRegression.loss),
    "two layers": lambda: (TwoLayers.init, TwoLayers.loss),
    "spiking dense": lambda: spiking_loss(SpikingMLP(3, features=(6,))),
    "spiking conv": lambda: spiking_loss(SpikingConvNet(3, features=(2, 3), kernel_size=3)),
}


@functools.cache
def both_steps(name):
    """The initialisation of a model, and the optimizers and one step of optax's SAM in opaque mode and of ours."""
    init, loss = MODELS[name]()
    reference = optax.contrib.sam(
        optax.adam(0.05), optax.chain(optax.contrib.normalize(), optax.sgd(RHO)), sync_period=2, opaque_mode=True
    )
    ours = optax.chain(sam(RHO), optax.adam(0.05))

    @jax.jit
    def step(a, b, state_a, state_b, batch):
        gradient = jax.grad(loss)
        updates, state_a = reference.update(gradient(a, *batch), state_a, a, grad_fn=lambda p, _: gradient(p, *batch))
        a = optax.apply_updates(a, updates)
        updates, state_b = ours.update(gradient(b, *batch), state_b, b, grad_fn=lambda p: gradient(p, *batch))
        return a, optax.apply_updates(b, updates), state_a, state_b

    return init, reference, ours, step


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", [pytest.param(m, marks=pytest.mark.slow) if m == "spiking conv" else m for m in MODELS])
def test_agrees_with_optax_contrib_in_opaque_mode(name, seed, float64):
    init, reference, ours, step = both_steps(name)
    rng = np.random.default_rng(seed)
    a = b = jax.tree.map(jnp.asarray, init(rng))
    state_a, state_b = reference.init(a), ours.init(b)
    for _ in range(NUM_STEPS):
        a, b, state_a, state_b = step(a, b, state_a, state_b, draw(rng))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-7, atol=1e-10), a, b)


SHARDED = """
import jax, numpy as np, optax
from jax.sharding import NamedSharding, PartitionSpec
from sast_jax import SpikingMLP, sam
from sast_jax.data import Batch
from sast_jax.training import init_state, make_train_step

assert len(jax.devices()) == 4
rng = np.random.default_rng(0)
frames = rng.integers(0, 2, (2, 4, 8, 5, 5, 2)).astype(np.uint8)
labels = rng.integers(0, 3, (2, 8)).astype(np.int32)
batches = [Batch(frames[i], labels[i], np.ones(8, bool)) for i in (0, 1)]
network, tx = SpikingMLP(3, features=(6,)), optax.chain(sam(0.3), optax.adam(0.01))
mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
place = lambda leaf, *axes: jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*axes)))
results = []
for sharded in (False, True):
    state = init_state(network, tx, batches[0].frames[:, :1], seed=0)
    own = batches
    if sharded:
        state = jax.tree.map(lambda leaf: place(leaf), state)
        own = [Batch(place(b.frames, None, "data"), place(b.labels, "data"), place(b.mask, "data")) for b in batches]
    step = make_train_step(network, tx, "surrogate")
    for _ in range(3):
        state, _ = step(state, *own)
    assert step._cache_size() == 1
    results.append(state.params)
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), *results)
assert len(results[1]["readout"]["kernel"].sharding.device_set) == 4
"""


@pytest.mark.usefixtures("four_devices")
def test_four_devices_agree_with_one():
    done = subprocess.run([sys.executable, "-W", "error", "-c", SHARDED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
