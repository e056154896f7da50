import itertools

import numpy as np
import pytest

from sast_jax import SpikingConvNet, SpikingMLP
from sast_jax.data import Batch, Recordings
from sast_jax.evaluation.synops import count, evaluate_synops
from tests.weights import random_params


def as_batch(frames, padding=0):
    mask = np.arange(frames.shape[1]) < frames.shape[1] - padding
    return Batch(frames, np.zeros(frames.shape[1], np.int32), mask)


def test_example_of_neurobench_has_four_effective_operations_of_nine():
    weights = np.array([[1.3, 0, -3.2], [0, 1.2, -5.1], [-1.1, 2.7, 0]], np.float32)
    params = {"readout": {"kernel": weights.T, "bias": np.ones(3, np.float32)}}
    frames = np.array([0, 1, 1], np.uint8).reshape(1, 1, 1, 3, 1)
    counted = count(SpikingMLP(num_classes=3, features=()), params, [(as_batch(frames), ())])
    assert (counted["effective_acs"], counted["effective_macs"], counted["dense"]) == (4, 0, 9)


def count_by_hand(weights, inputs):
    """Walks every event to every weight behind it: `(effective, dense)` of one layer and one step, pooled inputs `[H, W, C]`."""
    effective = dense = 0
    if weights.ndim == 2:
        for i, value in enumerate(inputs.ravel()):
            for weight in weights[i]:
                dense += 1
                effective += value != 0 and weight != 0
        return effective, dense
    (height, width), (rows, columns) = inputs.shape[:2], weights.shape[:2]
    for y, x, channel in np.ndindex(*inputs.shape):
        for dy, dx in itertools.product(range(rows), range(columns)):
            target = y - dy + (rows - 1) // 2, x - dx + (columns - 1) // 2
            if 0 <= target[0] < height and 0 <= target[1] < width:
                for weight in weights[dy, dx, channel]:
                    dense += 1
                    effective += inputs[y, x, channel] != 0 and weight != 0
    return effective, dense


def sums_of_windows(spikes, size):
    height, width = spikes.shape[0] // size, spikes.shape[1] // size
    sums = np.zeros((height, width, spikes.shape[2]), int)
    for y, x, channel in np.ndindex(height * size, width * size, spikes.shape[2]):
        sums[y // size, x // size, channel] += spikes[y, x, channel]
    return sums


@pytest.mark.parametrize("kernel_size", [2, 3])
def test_counts_equal_a_walk_over_every_event_and_weight(kernel_size):
    net = SpikingConvNet(num_classes=2, features=(2, 3), kernel_size=kernel_size)
    rng = np.random.default_rng(kernel_size)
    frames = (rng.random((2, 3, 7, 6, 2)) < 0.3).astype(np.uint8)
    shapes = {"conv_0": (kernel_size, kernel_size, 2, 2), "conv_1": (kernel_size, kernel_size, 2, 3), "readout": (3, 2)}
    params = {name: {"kernel": rng.integers(-1, 2, shape), "bias": np.ones(shape[-1])} for name, shape in shapes.items()}
    spikes = tuple((rng.random((2, 3, *shape)) < 0.4).astype(np.float32) for shape in ((7, 6, 2), (3, 3, 3)))
    counted = count(net, params, [(as_batch(frames, padding=1), spikes)])

    used = [x[:, :2].astype(int) for x in (frames, *spikes)]
    expected = {}
    for name, outputs, size in zip(shapes, used, (1, 2, 2), strict=True):
        effective = dense = events = 0
        for recording in outputs.reshape(-1, *outputs.shape[2:]):
            pooled = sums_of_windows(recording, size)
            effective += count_by_hand(params[name]["kernel"], pooled)[0]
            dense += count_by_hand(params[name]["kernel"], pooled)[1]
            for level in range(1, size**2 + 1):  # A window of n spikes counts n times.
                events += count_by_hand(params[name]["kernel"], pooled >= level)[0]
        expected[name] = {"effective": effective / 2, "dense": dense / 2, "event_acs": events / 2}
    for name, layer in counted["layers"].items():
        kind, other = ("effective_acs", "effective_macs") if name == "conv_0" else ("effective_macs", "effective_acs")
        assert layer[kind] == expected[name]["effective"] > 0
        assert layer[other] == 0
        assert layer["dense"] == expected[name]["dense"]
        assert layer["event_acs"] == expected[name]["event_acs"]
    assert counted["event_acs"] == sum(each["event_acs"] for each in expected.values())
    assert counted["layers"]["conv_1"]["spike_rate"] == pytest.approx(used[2].mean())
    assert counted["activation_sparsity"] == pytest.approx(1 - np.concatenate([used[1].ravel(), used[2].ravel()]).mean())
    assert counted["layers"]["readout"]["spike_rate"] is None


def test_event_counts_in_frames_need_multiplications(recordings):
    net = SpikingMLP(num_classes=3, features=(4,))
    params = random_params(net, recordings.frames.shape[2:])
    layers = [
        evaluate_synops(net, params, recordings._replace(frames=frames))["layers"]["dense_0"]
        for frames in (recordings.frames, np.minimum(recordings.frames, 1))
    ]
    assert layers[0]["effective_macs"] == layers[1]["effective_acs"] > 0
    assert layers[0]["effective_acs"] == layers[1]["effective_macs"] == 0
    ratio = recordings.frames.sum() / (recordings.frames > 0).sum()
    assert layers[0]["event_acs"] / layers[1]["event_acs"] == pytest.approx(ratio)


def test_counts_do_not_depend_on_the_batches(recordings, monkeypatch):
    net = SpikingConvNet(num_classes=3, features=(2,), kernel_size=3)
    params = random_params(net, recordings.frames.shape[2:])
    whole = evaluate_synops(net, params, recordings)
    monkeypatch.setattr("sast_jax.evaluation.synops.BATCH_SIZE", 3)
    assert evaluate_synops(net, params, Recordings(*recordings)) == whole
