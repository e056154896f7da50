import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sast_jax import SpikingConvNet
from sast_jax.data import Recordings
from sast_jax.evaluation import calibration
from sast_jax.evaluation.calibration import (
    channel_means,
    descend,
    evaluate_calibration,
    expected_calibration_error,
    fit_temperature,
    match,
    search,
)
from sast_jax.evaluation.outputs import predict_logits, score
from sast_jax.networks import Calibration
from tests.weights import random_params

NETWORK = SpikingConvNet(num_classes=3, features=(4, 5), kernel_size=3, order="layer_major", init_gain=3.0)
START = Calibration((np.ones(4, np.float32), np.ones(5, np.float32)), (np.ones(4, np.float32), np.ones(5, np.float32)))


@pytest.fixture(scope="module")
def samples():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 24).astype(np.int32)
    frames = rng.random((24, 5, 8, 8, 2)) < 0.1 + 0.2 * labels.reshape(-1, 1, 1, 1, 1)
    return Recordings(frames.astype(np.uint8), labels, np.arange(24).astype(str))


@pytest.fixture(scope="module")
def params(samples):
    return random_params(NETWORK, samples.frames.shape[2:], seed=1)


@given(arrays(np.float64, (20, 3), elements=st.floats(0.01, 1.0)), st.integers(1, 20))
def test_calibration_error_equals_a_loop_over_bins(weights, num_bins):
    probabilities = weights / weights.sum(1, keepdims=True)
    labels = np.arange(20) % 3
    total = 0.0
    for m in range(1, num_bins + 1):
        inside = [i for i in range(20) if (m - 1) / num_bins < probabilities[i].max() <= m / num_bins]
        if inside:
            accuracy = sum(probabilities[i].argmax() == labels[i] for i in inside) / len(inside)
            confidence = sum(probabilities[i].max() for i in inside) / len(inside)
            total += len(inside) / 20 * abs(accuracy - confidence)
    assert expected_calibration_error(probabilities, labels, num_bins) == pytest.approx(total, abs=1e-9)


def test_calibration_error_of_sure_and_right_is_0_of_sure_and_wrong_1():
    sure = np.eye(3)[[0, 1, 2]]
    assert expected_calibration_error(sure, np.array([0, 1, 2])) == 0
    assert expected_calibration_error(sure, np.array([1, 2, 0])) == 1


def test_temperature_undoes_a_scale_and_no_other_is_better():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (2000, 4))
    labels = np.array([rng.choice(4, p=p) for p in np.exp(logits) / np.exp(logits).sum(1, keepdims=True)])
    assert fit_temperature(logits, labels) == pytest.approx(1, rel=0.1)
    temperature = fit_temperature(5 * logits, labels)
    assert temperature == pytest.approx(5 * fit_temperature(logits, labels), rel=1e-3)
    losses = [score(5 * logits / t, labels)["loss"] for t in temperature * np.array([0.8, 0.95, 1, 1.05, 1.25])]
    assert np.argmin(losses) == 2


@pytest.mark.parametrize("per_channel", [False, True])
def test_matched_thresholds_give_the_surrogates_mean_outputs(per_channel, samples, params):
    settings = match(NETWORK, params, samples, START, what="threshold", per_channel=per_channel)
    targets = channel_means(NETWORK, params, samples, "surrogate")
    for index, rates in enumerate(channel_means(NETWORK, params, samples, "hard", settings)):
        target, threshold = targets[index], settings.thresholds[index]
        if not per_channel:
            assert len(set(threshold.tolist())) == 1
            rates, target = rates.mean(keepdims=True), target.mean(keepdims=True)
        at_limit = threshold.min() < 1 / 15 if not per_channel else threshold < 1 / 15
        assert np.abs(rates - target)[~np.atleast_1d(at_limit)].max(initial=0) < 0.03
        assert not np.all(at_limit)


@pytest.mark.parametrize("per_channel", [False, True])
def test_matched_gains_restore_the_next_layers_mean_input(per_channel, samples, params):
    settings = match(NETWORK, params, samples, START, what="gain", per_channel=per_channel)
    targets = channel_means(NETWORK, params, samples, "surrogate")
    for index, rates in enumerate(channel_means(NETWORK, params, samples, "hard", settings)):
        means, target = settings.gains[index] * rates, targets[index]
        if not per_channel:
            means, target = means.mean(keepdims=True), target.mean(keepdims=True)
        is_free = settings.gains[index] < 15 if per_channel else np.ones(1, bool)
        np.testing.assert_allclose(means[is_free], target[is_free], rtol=1e-4)
        np.testing.assert_array_equal(settings.thresholds[index], START.thresholds[index])


def scaled_loss(params, samples, settings):
    logits = predict_logits(NETWORK, params, samples, "hard", settings)
    return score(logits / fit_temperature(logits, samples.labels), samples.labels)["loss"]


def test_search_and_descent_lower_the_calibration_loss(samples, params, monkeypatch):
    monkeypatch.setattr(calibration, "FACTORS", np.array([0.25, 0.5, 1.0]))
    searched = search(NETWORK, params, samples, START)
    assert scaled_loss(params, samples, searched) < scaled_loss(params, samples, START)
    raw = [
        score(predict_logits(NETWORK, params, samples, "hard", each), samples.labels)["loss"]
        for each in (searched, descend(NETWORK, params, samples, searched))
    ]
    assert raw[1] < raw[0]


def test_only_the_calibration_part_decides(samples, params, monkeypatch):
    monkeypatch.setattr(calibration, "FACTORS", np.array([0.5, 1.0]))
    before = jax.tree.map(np.array, params)
    reports = []
    parts = samples.take(np.arange(12)), samples.take(np.arange(12, 24))
    shuffled = parts[1]._replace(labels=np.roll(parts[1].labels, 1), frames=parts[1].frames[::-1].copy())
    results = [evaluate_calibration(NETWORK, params, parts[0], test, report=reports.append) for test in (parts[1], shuffled)]
    decided = ("thresholds", "gains", "temperature", "calibration_loss", "calibration_accuracy")
    for name, method in results[0]["methods"].items():
        assert {key: method[key] for key in decided} == {key: results[1]["methods"][name][key] for key in decided}
    assert results[0]["methods"]["none"]["loss"] != results[1]["methods"]["none"]["loss"]
    assert results[0]["chosen"] == results[1]["chosen"]
    jax.tree.map(np.testing.assert_array_equal, before, params)
    assert reports[:2] == ["threshold_layer", "threshold_channel"]

    none, surrogate = results[0]["methods"]["none"], results[0]["surrogate"]
    logits = predict_logits(NETWORK, params, parts[1], "hard")
    assert none["accuracy"] == score(logits, parts[1].labels)["accuracy"]
    assert none["ece"] == pytest.approx(expected_calibration_error(np.asarray(jax.nn.softmax(logits)), parts[1].labels))
    assert none["scaled_loss"] == pytest.approx(score(logits / none["temperature"], parts[1].labels)["loss"], rel=1e-5)
    assert none["thresholds"] == {"conv_0": [1.0], "conv_1": [1.0]}
    assert [len(v) for v in results[0]["methods"]["gain_channel"]["gains"].values()] == [4, 5]
    gap = surrogate["accuracy"] - none["accuracy"]
    for method in results[0]["methods"].values():
        removed = None if gap <= 0 else pytest.approx((method["accuracy"] - none["accuracy"]) / gap)
        assert method["gap_removed"] == removed
