"""What a batch of `accumulate` may hold beside arrays of samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sast_jax import accumulate

X = jnp.arange(6.0)


def test_numbers_are_given_to_each_part():
    grad_fn = jax.grad(lambda w, batch: jnp.mean((w * batch["x"]) ** 2) * batch["scale"])
    for scale in (3.0, np.float64(3.0), jnp.float32(3.0)):
        # d/dw of 3 mean((w x)^2) is 6 w mean(x^2) = 6 * 2 * 55 / 6.
        assert float(accumulate(grad_fn, 3)(2.0, {"x": X, "scale": scale})) == pytest.approx(110.0)


@pytest.mark.parametrize("jit", [False, True])
def test_each_part_draws_numbers_of_its_own(jit):
    def draw(w, batch):
        return jax.nn.one_hot(batch["x"][0].astype(int) // 2, 3) * jax.random.normal(batch["key"]), w

    averaged = accumulate(draw, 3)
    ours, _ = (jax.jit(averaged) if jit else averaged)(0.0, {"x": X, "key": jax.random.key(5)})
    expected = [float(jax.random.normal(key)) / 3 for key in jax.random.split(jax.random.key(5), 3)]
    np.testing.assert_allclose(ours, expected, rtol=1e-6)
    assert len(set(expected)) == 3


def test_keys_of_samples_are_cut_like_the_samples():
    keys = jax.random.split(jax.random.key(0), 6)
    expected = np.mean([jax.random.normal(key) for key in keys])
    mean = accumulate(lambda w, keys: jnp.mean(jax.vmap(jax.random.normal)(keys)), 3)(0.0, keys)
    assert float(mean) == pytest.approx(float(expected), rel=1e-5)
