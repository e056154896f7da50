"""The Python on the pages of docs runs; what stands there with >>> is a doctest."""

import json
import re
import types
from pathlib import Path

import numpy as np
import pytest

from sast_jax import Calibration, load_run, train_and_evaluate
from sast_jax.files import write_json
from sast_jax.training.build import load_data

PAGES = {str(page): page.read_text() for page in sorted(Path("docs").rglob("*.md"))}
BLOCK = re.compile(r"(<!-- nir -->\n)?```python\n(.*?)```", re.S)
SCRIPTS = {
    page: "".join(code for is_nir, code in BLOCK.findall(text) if not is_nir and ">>>" not in code)
    for page, text in PAGES.items()
}


@pytest.fixture
def trained(tiny, tmp_path, monkeypatch):
    """A folder with the run that the pages speak of, trained for an epoch, its calibration as if evaluated."""
    folder = tmp_path / "runs" / "digits"
    train_and_evaluate(tiny("sast", "num_epochs=1"), folder)
    run = load_run(folder)
    measured = {"accuracy": 0.5, "loss": 1.0, "ece": 0.1, "temperature": 1.0, "scaled_loss": 1.0, "scaled_ece": 0.1}
    found = {**measured, "thresholds": {"dense_0": [0.25]}, "gains": {"dense_0": [2.0]}}
    calibration = {"methods": {"gain_layer": found}, "chosen": "gain_layer", "surrogate": measured}
    write_json(folder / "evaluation.json", {"step": run.step, "calibration": calibration})
    monkeypatch.chdir(tmp_path)
    return run


def test_only_deployment_has_python_that_needs_a_run():
    assert [page for page, script in SCRIPTS.items() if script] == ["docs/deployment.md"]


def test_calibration_is_used_as_the_page_says(trained):
    names = types.SimpleNamespace()
    exec(SCRIPTS["docs/deployment.md"], vars(names))
    test = load_data(trained.config).test
    frames = np.minimum(test.frames, 1).astype(np.float32).swapaxes(0, 1)
    settings = Calibration((np.array([0.25]),), (np.array([2.0]),))
    expected = trained.network.apply({"params": trained.params}, frames, "hard", settings).logits
    np.testing.assert_allclose(names.logits, expected, atol=1e-5)
    assert float(names.accuracy) == pytest.approx(np.mean(expected.argmax(-1) == test.labels))
    assert json.loads(Path("runs/digits/evaluation.json").read_text())["step"] == trained.step
