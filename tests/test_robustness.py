import numpy as np
import pytest

from sast_jax.evaluation.robustness import evaluate_robustness


def test_area_is_that_of_the_trapezoids_and_every_severity_is_loaded_once(recordings):
    loaded = []

    def eval_step(params, batch):
        hard = 7 - int(batch.frames[0, 0, 0, 0, 0])  # Recordings tell how many are right.
        sums = {"num_samples": 7, "surrogate_correct": 7, "hard_correct": hard, "surrogate_loss": 0.0, "hard_loss": 0.0}
        return {key: np.asarray(value) for key, value in sums.items()}

    def load(kind, severity):
        loaded.append((kind, severity))
        return recordings._replace(frames=np.full_like(recordings.frames, severity if kind == "drop" else 2))

    clean = recordings._replace(frames=np.zeros_like(recordings.frames))
    reports = []
    result = evaluate_robustness(eval_step, None, clean, load, 100, kinds=("drop", "background"), report=reports.append)
    assert loaded == [(kind, severity) for kind in ("drop", "background") for severity in range(1, 6)]
    assert reports == ["drop", "background"]
    assert result["clean"] == {"surrogate_accuracy": 1.0, "hard_accuracy": 1.0}
    np.testing.assert_allclose(result["corruptions"]["drop"]["hard_accuracy"], [6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7])
    assert result["area"]["drop"] == {"surrogate": 1.0, "hard": pytest.approx((1 / 2 + (6 + 5 + 4 + 3) / 7 + 1 / 7) / 5)}
    assert result["area"]["background"]["hard"] == pytest.approx((0.5 * (1 + 5 / 7) + 4 * 5 / 7) / 5)
    mean = (result["area"]["drop"]["hard"] + result["area"]["background"]["hard"]) / 2
    assert result["area"]["mean"] == {"surrogate": 1.0, "hard": pytest.approx(mean)}
    assert result["severities"] == [1, 2, 3, 4, 5]
