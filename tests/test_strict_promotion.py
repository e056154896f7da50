"""jax told not to add axes or change dtypes by itself: the equations do neither."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sast_jax import Calibration, SpikingConvNet, SpikingMLP, accumulate, leaky_readout, lif, sam, spike_fn
from sast_jax.data import Batch
from sast_jax.training import init_state, make_train_step


@pytest.fixture(params=["rank", "dtype"])
def strict(request):
    with jax.numpy_rank_promotion("raise") if request.param == "rank" else jax.numpy_dtype_promotion("strict"):
        yield


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("reset", ["zero", "subtract", "none"])
def test_neurons_take_parameters_of_each_channel(reset):
    decay, threshold = np.array([0.5, 0.9], np.float32), np.array([1.0, 0.7], np.float32)
    current = np.random.default_rng(0).random((4, 3, 2)).astype(np.float32)
    spikes, _ = lif(jnp.asarray(current), decay=decay, threshold=threshold, reset=reset, spike_fn=spike_fn("hard"))
    for channel in range(2):
        alone = {"decay": float(decay[channel]), "threshold": float(threshold[channel]), "reset": reset}
        expected, _ = lif(jnp.asarray(current[..., channel]), **alone, spike_fn=spike_fn("hard"))
        np.testing.assert_array_equal(spikes[..., channel], expected)
    readout = leaky_readout(jnp.asarray(current), decay)
    np.testing.assert_allclose(readout[:, 1], leaky_readout(jnp.asarray(current[..., 1:]), 0.9)[:, 0], rtol=1e-6)


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(
    "network",
    [
        SpikingMLP(3, features=(2,), order="step_major", readout="rate"),
        SpikingConvNet(3, features=(2,), kernel_size=3, order="layer_major"),
        SpikingConvNet(3, features=(2,), kernel_size=3, order="step_major"),
    ],
    ids=["mlp", "conv", "conv_in_steps"],
)
def test_networks_are_trained_and_calibrated(network):
    rng = np.random.default_rng(0)
    batch = Batch(rng.integers(0, 2, (3, 2, 4, 4, 2)).astype(np.uint8), np.array([0, 2], np.int32), np.ones(2, bool))
    tx = optax.chain(sam(0.1, adaptive="filter"), optax.sgd(0.1))
    state = jax.eval_shape(lambda: init_state(network, tx, batch.frames, seed=0))
    step = make_train_step(network, tx, "straight_through", num_microbatches=2)
    assert step.eval_shape(state, batch, batch)[1]["loss"].shape == ()
    settings = Calibration(
        (jnp.ones(2),) + (1.0,) * (network.num_spiking - 1), (jnp.ones(2),) + (1.0,) * (network.num_spiking - 1)
    )
    logits = jax.eval_shape(lambda p: network.apply({"params": p}, batch.frames, "hard", settings).logits, state.params)
    assert logits.shape == (2, 3)


@pytest.mark.usefixtures("strict")
def test_integers_and_booleans_are_averaged():
    counts, share = accumulate(lambda w, x: (x.sum(), x[0] > 1), 2)(1.0, jnp.arange(4))
    assert (float(counts), float(share)) == (3.0, 0.5)


def test_commands_take_strictness_back(monkeypatch, capsys):
    from sast_jax import cli

    seen = {}

    def command(args, overrides):
        seen.update(dtype=jax.config.jax_numpy_dtype_promotion, rank=jax.config.jax_numpy_rank_promotion)

    monkeypatch.setitem(cli._COMMANDS, "report", command)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    try:
        assert cli.main(["report", "--workdir=none"]) == 0
    finally:
        jax.config.update("jax_numpy_dtype_promotion", "standard")
        jax.config.update("jax_numpy_rank_promotion", "allow")
    assert seen == {"dtype": "standard", "rank": "allow"}
