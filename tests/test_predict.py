"""Frames that `Run.predict` takes, and what it says of others."""

import jax
import numpy as np
import pytest

from sast_jax import Calibration, Run, SpikingMLP
from sast_jax.config import load_configs
from sast_jax.errors import SuspicionWarning

T, SIZE = 3, 17  # 34 pixels, two by two.


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    options = ["network.kind=mlp", "network.features=4", f"dataset.num_time_steps={T}", "dataset.downsample=2"]
    config = load_configs("configs/digits.py:sast", options)[""]
    network = SpikingMLP(10, features=(4,))
    params = jax.jit(network.init)(jax.random.key(0), np.zeros((T, 1, SIZE, SIZE, 2), np.float32))["params"]
    return Run(network, params, config, None, 0, tmp_path_factory.mktemp("run"))


def frames(*shape, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, 2, shape).astype(dtype)


def test_frames_of_the_run_are_taken_in_any_dtype(run):
    counts = frames(T, 2, SIZE, SIZE, 2)
    expected = run.network.apply({"params": run.params}, counts.astype(np.float32), "hard").logits
    for dtype in (np.uint8, np.float64, bool):
        np.testing.assert_allclose(run.predict(counts.astype(dtype)), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, T, SIZE, SIZE, 2), r"\[3, B, 17, 17, 2\]; got \[2, 3, 17, 17, 2\]. Time comes first: frames.swapaxes\(0, 1\)"),
        ((T, SIZE, SIZE, 2), r"got \[3, 17, 17, 2\]. A single recording needs an axis of samples: frames\[:, None\]"),
        ((T, 2, 34, 34, 2), r"\[3, B, 17, 17, 2\]; got \[3, 2, 34, 34, 2\]"),
        ((T, 2, SIZE, SIZE, 1), r"got \[3, 2, 17, 17, 1\]"),
        ((T, 2, 2, SIZE, SIZE), r"got \[3, 2, 2, 17, 17\]"),
        ((T, 0, SIZE, SIZE, 2), "which holds no recording"),
        ((0, 2, SIZE, SIZE, 2), "which holds no recording"),
    ],
)
def test_frames_of_another_shape_are_refused_and_the_right_one_named(run, shape, message):
    with pytest.raises(ValueError, match=message):
        run.predict(np.zeros(shape, np.uint8))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_frames_that_are_not_finite_are_refused(run, value):
    damaged = frames(T, 2, SIZE, SIZE, 2, dtype=np.float32)
    damaged[1, 0, 3, 3, 0] = value
    with pytest.raises(ValueError, match="frames must be finite event counts"):
        run.predict(damaged)


def test_another_number_of_time_steps_is_taken_with_a_warning(run):
    with pytest.warns(SuspicionWarning, match=r"frames have 5 time steps; the run was trained with 3"):
        assert run.predict(frames(5, 2, SIZE, SIZE, 2)).shape == (2, 10)


def test_predict_may_be_compiled(run):
    counts = frames(T, 2, SIZE, SIZE, 2)
    np.testing.assert_allclose(jax.jit(run.predict)(counts), run.predict(counts), atol=1e-6)


def test_calibration_of_another_number_of_layers_is_refused(run):
    with pytest.raises(ValueError, match="calibration must have 1 thresholds, one per layer of spiking neurons; got 2"):
        run.predict(frames(T, 1, SIZE, SIZE, 2), "hard", Calibration((1.0, 1.0), (1.0, 1.0)))
    with pytest.raises(ValueError, match="calibration must have 1 gains"):
        run.predict(frames(T, 1, SIZE, SIZE, 2), "hard", Calibration((1.0,), ()))
