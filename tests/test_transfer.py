import functools

import jax
import numpy as np
import pytest

from sast_jax import SpikingConvNet, SpikingMLP
from sast_jax.data import Recordings
from sast_jax.evaluation.outputs import apply, map_recordings, predict_logits, score, trace
from sast_jax.evaluation.transfer import analyze_transfer
from tests.weights import random_params

NETWORKS = {
    "conv": SpikingConvNet(num_classes=3, features=(4, 5), kernel_size=3),
    "mlp": SpikingMLP(num_classes=3, features=(8, 6)),
    "rate": SpikingMLP(num_classes=3, features=(8,), readout="rate"),
}


applied = jax.jit(apply, static_argnums=(0, 3))


@pytest.fixture(scope="module")
def samples():
    rng = np.random.default_rng(0)
    frames = (rng.random((7, 5, 6, 6, 2)) < 0.3).astype(np.uint8)
    return Recordings(frames, rng.integers(0, 3, 7).astype(np.int32), np.arange(7).astype(str))


def init(network, samples):
    return random_params(network, samples.frames.shape[2:])


@pytest.fixture(scope="module")
def analyzed(samples):
    """Returns a function from a name to its network, weights and analysis."""

    @functools.cache
    def analyze(name):
        network = NETWORKS[name]
        params = init(network, samples)
        return network, params, analyze_transfer(network, params, samples)

    return analyze


def test_batches_do_not_change_what_recordings_give(samples):
    sizes = (1, 2, 3, 7, 100)
    logits = [map_recordings(None, lambda frames: frames.sum((0, 2, 3, 4)), samples, batch_size=size) for size in sizes]
    for each in logits:
        np.testing.assert_array_equal(each, samples.frames.sum((1, 2, 3, 4)))


@pytest.mark.parametrize("name", ["conv", pytest.param("mlp", marks=pytest.mark.slow), "rate"])
def test_trace_has_the_networks_spikes_and_explains_its_logits(name, samples):
    network = NETWORKS[name]
    params = init(network, samples)
    frames = samples.frames.swapaxes(0, 1)
    for mode in ("surrogate", "hard"):
        states, output = jax.device_get((trace(network, params, frames, mode), applied(network, params, frames, mode)))
        assert len(states) == len(network.layer_names)
        for state, spikes in zip(states, output.spikes, strict=False):
            np.testing.assert_allclose(state.spikes, spikes, atol=1e-5)
        last = states[-1]
        logits = last.potential.mean(0) if network.readout == "leaky" else last.spikes.sum(0)
        np.testing.assert_allclose(logits, output.logits, atol=1e-4)
        assert network.readout == "rate" or not last.spikes.any()


def test_layers_are_swapped_one_after_the_other_and_one_by_one(samples, analyzed):
    network, params, result = analyzed("conv")
    swaps = result["layer_swap"]
    names = ["conv_0", "conv_1"]
    assert [row["hard"] for row in swaps["prefix"]] == [names[:i] for i in range(3)]
    assert [row["hard"] for row in swaps["single"]] == [[name] for name in names]
    for row in swaps["prefix"] + swaps["single"]:
        modes = tuple("hard" if name in row["hard"] else "surrogate" for name in names)
        if len(set(modes)) == 1:  # Compiled for other tests, too.
            logits = np.asarray(applied(network, params, samples.frames.swapaxes(0, 1), modes[0]).logits)
        else:
            logits = predict_logits(network, params, samples, modes)
        expected = score(logits, samples.labels)
        assert row["accuracy"] == expected["accuracy"]
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert len({round(row["loss"], 6) for row in swaps["prefix"] + swaps["single"]}) == 4  # One of five stands in both.
    for mode, row in (("surrogate", swaps["prefix"][0]), ("hard", swaps["prefix"][-1])):
        assert row["accuracy"] == result[f"{mode}_accuracy"]


@pytest.mark.parametrize("name", ["conv", "rate"])
def test_agreement_and_confusion_are_those_of_spikes_and_decisions(name, samples, analyzed):
    network, params, result = analyzed(name)
    frames = samples.frames.swapaxes(0, 1)
    outputs = {mode: applied(network, params, frames, mode) for mode in ("surrogate", "hard")}
    decisions = {mode: np.asarray(output.logits).argmax(-1) for mode, output in outputs.items()}
    assert result["agreement"]["decisions"] == np.mean(decisions["surrogate"] == decisions["hard"])
    for mode, decided in decisions.items():
        confusion = np.zeros((3, 3), int)
        for label, decision in zip(samples.labels, decided, strict=True):
            confusion[label, decision] += 1
        assert result["confusion"][mode] == confusion.tolist()
        assert np.trace(confusion) / 7 == pytest.approx(result[f"{mode}_accuracy"])
    assert list(result["agreement"]["layers"]) == list(network.layer_names[: network.num_spiking])
    for layer, x, y in zip(
        result["agreement"]["layers"].values(), outputs["surrogate"].spikes, outputs["hard"].spikes, strict=True
    ):
        x, y = (np.asarray(spikes, np.float64).sum(0).ravel() for spikes in (x, y))
        assert layer["surrogate_activation"] == pytest.approx(x.mean() / 5, rel=1e-5)
        assert layer["hard_rate"] == pytest.approx(y.mean() / 5, rel=1e-5)
        assert layer["count_difference"] == pytest.approx(np.abs(x - y).mean(), rel=1e-5)
        assert layer["count_correlation"] == pytest.approx(np.corrcoef(x, y)[0, 1], rel=1e-4)


def test_layer_without_hard_spikes_has_no_correlation(samples):
    network = SpikingMLP(num_classes=3, features=(8,), threshold=1e4)
    layer = analyze_transfer(network, init(network, samples), samples)["agreement"]["layers"]["dense_0"]
    assert layer["hard_rate"] == 0
    assert layer["count_correlation"] is None
