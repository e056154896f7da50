import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from sast_jax.cli import main
from sast_jax.config import load_configs, set_field
from sast_jax.data import Recordings, Splits
from sast_jax.theory.training import convergence_bound, hessian_extremes, mechanism_factor, sam_sandwich
from sast_jax.training.run import Run
from sast_jax.training.theory import evaluate_run_theory
from tests.test_cli import TINY, refused, train  # noqa: F401


def random_quadratics(rng, number, size):
    """Symmetric matrices, not all of them positive."""
    a = rng.normal(size=(number, size, size))
    return (a + a.swapaxes(1, 2)) / 2


def test_hessian_extremes_are_those_of_a_quadratic_and_data_may_be_passed():
    (matrix,) = random_quadratics(np.random.default_rng(0), 1, 40)
    params = {"a": jnp.ones(15), "b": jnp.ones((5, 5))}

    def loss(params, matrix):
        w = jnp.concatenate([params["a"], params["b"].ravel()])
        return 0.5 * w @ matrix @ w

    low, high = hessian_extremes(loss, params, jnp.asarray(matrix, jnp.float32))
    np.testing.assert_allclose([low, high], np.linalg.eigvalsh(matrix)[[0, -1]], rtol=1e-3)


def test_loss_at_the_perturbed_weights_lies_in_the_sandwich():
    rng = np.random.default_rng(1)
    matrices = random_quadratics(rng, 1000, 5)
    w, rho = rng.normal(size=(1000, 5)), rng.exponential(1, 1000)

    def loss(w):
        return 0.5 * np.einsum("ni,nij,nj->n", w, matrices, w)

    gradient = np.einsum("nij,nj->ni", matrices, w)
    norm = np.linalg.norm(gradient, axis=1)
    smoothness = np.abs(np.linalg.eigvalsh(matrices)).max(1)
    lower, upper = sam_sandwich(loss(w), norm, rho, smoothness)
    climbed = loss(w + rho[:, None] * gradient / norm[:, None])
    assert (lower <= climbed + 1e-9).all()
    for _ in range(20):
        e = rng.normal(size=w.shape)
        assert (loss(w + rho[:, None] * e / np.linalg.norm(e, axis=1, keepdims=True)) <= upper + 1e-9).all()
    assert np.median((climbed - lower) / (upper - lower)) > 0.1
    with pytest.raises(ValueError, match="smoothness must be finite and at least 0"):
        sam_sandwich(1.0, 1.0, 0.1, -1.0)


def sgd(rng, matrix, offsets, start, *, num_steps, learning_rate, rho, batch_size):
    """Mean squared gradient norms along SGD with SAM and fresh independent batches, on mean_i |w - offset_i|_A^2 / 2."""
    w, norms = start.copy(), []
    for _ in range(num_steps):
        perturbation, descent = (offsets[rng.integers(0, len(offsets), (len(w), batch_size))].mean(1) for _ in range(2))
        norms.append(np.square((w - offsets.mean(0)) @ matrix).sum(1))
        g = (w - perturbation) @ matrix
        e = rho * g / np.maximum(np.linalg.norm(g, axis=1, keepdims=True), 1e-30)
        w = w - learning_rate * (w + e - descent) @ matrix
    return np.mean(norms)


@pytest.mark.parametrize("rho", [0.0, 0.5])
def test_sgd_stays_below_the_convergence_bound_on_random_problems(rho):
    rng = np.random.default_rng(2)
    ratios = []
    for _ in range(40):
        a = rng.normal(size=(4, 4))
        matrix = a @ a.T / 4
        offsets, start = rng.normal(size=(30, 4)), np.repeat(rng.normal(0, 3, (1, 4)), 60, axis=0)
        smoothness, centre = np.linalg.eigvalsh(matrix)[-1], offsets.mean(0)
        variance = np.square((offsets - centre) @ matrix).sum(1).mean()  # The same everywhere.
        gap = 0.5 * (start[0] - centre) @ matrix @ (start[0] - centre)
        settings = {"learning_rate": rng.uniform(0.1, 1) / smoothness, "rho": rho, "batch_size": int(rng.integers(1, 5))}
        num_steps = int(rng.integers(1, 60))
        measured = sgd(rng, matrix, offsets, start, num_steps=num_steps, **settings)
        bound = convergence_bound(num_steps, loss_gap=gap, smoothness=smoothness, variance=variance, **settings)
        ratios.append(measured / bound)
    assert max(ratios) <= 1
    assert max(ratios) > 0.3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0.6}, "learning_rate <= 1 / smoothness, 0.5; got 0.6"),
        ({"variance": -1.0}, "variance must be finite and at least 0"),
        ({"batch_size": 0}, "must be at least 1"),
        ({"learning_rate": 0.0}, "0 < learning_rate"),
    ],
)
def test_convergence_bound_refuses_what_the_theorem_does_not_cover(change, message):
    values = {"loss_gap": 1.0, "smoothness": 2.0, "variance": 1.0, "batch_size": 8, "learning_rate": 0.5, "rho": 0.1}
    assert convergence_bound(10, **values) == pytest.approx(2 / 5 + 0.04 + 1 / 8)
    with pytest.raises(ValueError, match=message):
        convergence_bound(10, **values | change)


def test_input_gradients_are_bounded_by_weight_gradients():
    rng = np.random.default_rng(3)
    for _ in range(200):
        jacobian_x, jacobian_w = rng.normal(size=(4, 6)), rng.normal(size=(4, 9))
        best, ratio = mechanism_factor(jacobian_x, jacobian_w)
        v = rng.normal(size=(100, 4))
        measured = np.linalg.norm(v @ jacobian_x, axis=1) / np.linalg.norm(v @ jacobian_w, axis=1)
        assert measured.max() <= best * (1 + 1e-9)
        assert best <= ratio * (1 + 1e-9)
        s = [np.linalg.svd(j, compute_uv=False) for j in (jacobian_x, jacobian_w)]
        assert ratio == pytest.approx(s[0][0] / s[1][-1])
    with pytest.raises(ValueError, match="linearly independent"):
        mechanism_factor(jacobian_x, np.ones((4, 9)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is dead")  # Capped currents do not reach the threshold here.
def test_theory_of_a_certified_run_says_that_it_contracts(train, capsys, tmp_path):  # noqa: F811
    certified = ["--config.certified.margin=0.05", "--config.network.slope=10", "--config.sam.rho=0.05"]
    assert train(*certified, config="configs/nmnist.py:sast") == 0
    capsys.readouterr()
    assert main(["theory", f"--workdir={tmp_path / 'run'}"]) == 0
    table = capsys.readouterr().out
    report = json.loads((tmp_path / "run" / "theory.json").read_text())
    assert (report["recordings"], report["num_recordings"], report["certified_margin"]) == ("validation", 10, 0.05)
    rows = report["statements"]
    assert {row["layer"] for row in rows} == {"dense_0", "readout", "network", "training"}
    for row in rows:
        assert row["statement"] in table
        if row["bound"] is not None and row["holds"] and "certified share" not in row["statement"]:
            assert row["measured"] <= row["bound"] * (1 + 1e-4)
            assert row["tightness"] == pytest.approx(row["measured"] / row["bound"])
    assert "(vacuous)" in table
    anywhere, reachable = (row for row in rows if row["statement"].startswith("contraction"))
    assert (anywhere["holds"], anywhere["vacuous"], reachable["holds"], reachable["vacuous"]) == (False, True, True, False)
    assert anywhere["bound"] == pytest.approx(0.9 * 4.520237, rel=1e-5)
    assert reachable["bound"] <= 0.95
    assert not next(row for row in rows if row["layer"] == "training")["holds"]


@pytest.mark.parametrize(
    ("fields", "unmet"),
    [
        ({}, []),
        ({"sam.rho": 0.0, "sam.adaptive": "element", "sam.perturbation": "same"}, []),
        ({"sam.adaptive": "element"}, ["perturbation of length rho at most"]),
        ({"sam.perturbation": "same"}, ["independent perturbation batch"]),
        ({"mode": "straight_through"}, ["exact gradient (surrogate mode, all spikes smooth)"]),
        ({"spikes.hard_share": 0.5}, ["exact gradient (surrogate mode, all spikes smooth)"]),
        ({"spikes.finish": 0.25}, ["exact gradient (surrogate mode, all spikes smooth)"]),
    ],
)
def test_theory_covers_exact_gradients_and_perturbations_that_are_taken(monkeypatch, fields, unmet):
    config = load_configs("configs/digits.py:sast")[""].copy_and_resolve_references().unlock()
    for key, value in fields.items():
        set_field(config, key, value)
    seen = {}
    monkeypatch.setattr("sast_jax.training.theory.evaluate_theory", lambda *args, covered, **others: seen.update(covered) or [])
    part = Recordings(np.zeros((1, 2, 3, 3, 2), np.uint8), np.zeros(1, int), np.array(["0"]))
    evaluate_run_theory(Run(None, None, config, None, 1, Path()), Splits(part, part, part, 10))
    assert [name for name, holds in seen.items() if not holds] == [*unmet, "plain SGD", "batches drawn anew each step"]


def test_theory_is_refused_where_there_is_no_run(capsys, tmp_path):
    assert "is no run" in refused(capsys, main(["theory", f"--workdir={tmp_path}"]))


def test_margin_that_cannot_be_held_is_refused(train, capsys):  # noqa: F811
    message = refused(capsys, train("--config.certified.margin=0.2", "--config.dataset.binary=false"))
    assert "certified.margin: cannot be held, as an inhibited neuron has contraction factor 0.9 at decay 0.9" in message
    assert "certified.margin: needs bounded frames, so dataset.binary must be true; got false" in message
    message = refused(capsys, train("--config.certified.margin=0.05", config="configs/nmnist.py:straight_through"))
    assert "mode must be surrogate; got 'straight_through'" in message
