import functools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sast_jax import NetworkOutput, SpikingMLP, lif, load_run, sam, spike_fn
from sast_jax.config import load_configs
from sast_jax.data import Batch, take_batch
from sast_jax.errors import UserError
from sast_jax.evaluation.transfer import evaluate_transfer, make_eval_step
from sast_jax.training import Interrupted, init_state, make_train_step, read_metrics, session, train_and_evaluate, train_variants
from sast_jax.training.build import build_train_step, load_data, make_network, make_optimizer
from sast_jax.training.checkpoints import Checkpoints, restore
from sast_jax.training.progress import Progress
from sast_jax.training.together import build_train_step_together, stack
from tests.conftest import TINY, assert_trees_equal, write_small_nmnist


@pytest.fixture(scope="module")
def small_nmnist(tmp_path_factory):
    """One folder of recordings for all runs of this file."""
    return write_small_nmnist(tmp_path_factory.mktemp("nmnist"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, small_nmnist):
    """Returns a function from variant and overrides, as of `tiny`, to the folder of that run: trained once, only to be read."""

    @functools.cache
    def train(variant, *overrides):
        config = load_configs(f"configs/nmnist.py:{variant}", [*TINY, f"dataset.root={small_nmnist}", *overrides])[""]
        workdir = tmp_path_factory.mktemp("trained") / "run"
        train_and_evaluate(config, workdir)
        return workdir

    return train


def read_results(workdir):
    return json.loads((workdir / "results.json").read_text())


def last_state(workdir, config):
    splits = load_data(config)
    network = make_network(config, splits.num_classes)
    state = init_state(network, make_optimizer(config, 30), splits.train.frames[:1].swapaxes(0, 1), seed=9)
    state, _ = restore(workdir, state)
    return state


def draw(seed, batch_size=6):
    rng = np.random.default_rng(seed)
    frames = (rng.random((4, batch_size, 5, 5, 2)) < 0.4).astype(np.uint8)
    return Batch(frames, rng.integers(0, 3, batch_size).astype(np.int32), np.ones(batch_size, bool))


def cross_entropy_by_hand(params, batch, decay=0.9, threshold=1.0):
    """Mean cross-entropy of a network of one hidden layer, its equations written out."""
    frames = batch.frames.astype(np.float32).reshape(*batch.frames.shape[:2], -1)
    u = s = jnp.zeros((frames.shape[1], 7))
    logits = 0.0
    for frame in frames:
        u = decay * u * (1 - s) + frame @ params["dense_0"]["kernel"] + params["dense_0"]["bias"]
        s = 0.5 + jnp.arctan(jnp.pi * (u - threshold)) / jnp.pi
        logits += (s @ params["readout"]["kernel"] + params["readout"]["bias"]) / len(frames)
    chosen = jnp.take_along_axis(logits, batch.labels[:, None], axis=1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=1) - chosen)


value_and_grad_by_hand = jax.jit(jax.value_and_grad(cross_entropy_by_hand))


@pytest.mark.parametrize("same", [False, True])
def test_step_is_that_of_sam_written_out_by_hand(same):
    network = SpikingMLP(3, features=(7,))
    descent, perturbation = draw(0), draw(1)
    tx = optax.chain(sam(0.3), optax.sgd(0.5))
    state = init_state(network, tx, descent.frames[:, :1], seed=0)
    params = jax.tree.map(np.asarray, state.params)

    loss, g = value_and_grad_by_hand(params, descent if same else perturbation)
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(g)))
    perturbed = jax.tree.map(lambda w, g: w + 0.3 * g / norm, params, g)
    expected = jax.tree.map(lambda w, g: w - 0.5 * g, params, value_and_grad_by_hand(perturbed, descent)[1])

    state, metrics = make_train_step(network, tx, "surrogate")(state, descent, None if same else perturbation)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), state.params, expected)
    assert metrics["gradient_norm"] == pytest.approx(norm, rel=1e-4)
    assert metrics["loss"] == pytest.approx(float(loss), rel=1e-4)


@pytest.mark.perf
def test_without_sam_a_step_costs_one_gradient_and_with_it_two(tiny):
    network = SpikingMLP(3, features=(64,))
    flops = {}
    for variant in ("baseline", "sast"):
        config = tiny(variant)
        tx = make_optimizer(config, 30)
        state = init_state(network, tx, draw(0).frames[:, :1], seed=0)
        batches = (draw(0, 64), draw(1, 64) if variant == "sast" else None)
        compiled = make_train_step(network, tx, "surrogate").lower(state, *batches).compile()
        flops[variant] = compiled.cost_analysis()["flops"]
    assert 1.7 < flops["sast"] / flops["baseline"] < 2.3


def test_step_gives_its_state_away_and_compiles_once():
    network = SpikingMLP(3, features=(7,))
    tx = optax.chain(sam(0.3), optax.adam(0.1))
    before = init_state(network, tx, draw(0).frames[:, :1], seed=0)
    step = make_train_step(network, tx, "straight_through")
    state, _ = step(before, draw(0), draw(1))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.params))
    step(state, draw(2), draw(3))
    assert step._cache_size() == 1


AUGMENTED = ("augmentation.max_shift=1", "augmentation.time_jitter=0.2", "augmentation.drop=0.1")


# At the end of epoch 4, and within epoch 6.
@pytest.mark.parametrize(
    ("variant", "stop_at", "overrides"),
    [("sast", 17, AUGMENTED), ("baseline", 12, ()), pytest.param("sast", 12, (), marks=pytest.mark.slow)],
)
def test_resumed_run_equals_the_straight_one_bit_for_bit(tiny, trained, tmp_path, monkeypatch, variant, stop_at, overrides):
    config, straight = tiny(variant, *overrides), trained(variant, *overrides)

    advance, steps = Progress.advance, []

    def stop(self):
        advance(self)
        steps.append(1)
        if len(steps) == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Progress, "advance", stop)
    with pytest.raises(Interrupted, match=f"stopped at step {stop_at} of 30"):
        train_and_evaluate(config, tmp_path / "stopped")
    assert not (tmp_path / "stopped" / "results.json").exists()
    resumed = train_and_evaluate(config, tmp_path / "stopped")

    assert_trees_equal(*(last_state(workdir, config).__dict__ for workdir in (straight, tmp_path / "stopped")))
    accuracies = ("surrogate_accuracy", "hard_accuracy", "surrogate_loss", "hard_loss", "num_gradient_evaluations")
    assert [read_results(straight)[key] for key in accuracies] == [resumed[key] for key in accuracies]
    assert [line["epoch"] for line in read_metrics(tmp_path / "stopped")] == list(range(1, 11))


def test_same_seed_gives_the_same_weights_another_seed_others(tiny, trained, tmp_path):
    train_and_evaluate(tiny("sast", "num_epochs=2"), tmp_path)
    a, b, c = (
        load_run(path).params for path in (trained("sast", "num_epochs=2"), tmp_path, trained("sast", "seed=1", "num_epochs=2"))
    )
    assert_trees_equal(a, b)
    assert np.abs(a["readout"]["kernel"] - c["readout"]["kernel"]).max() > 0.01


@pytest.mark.slow
def test_same_seed_gives_the_same_weights_in_another_process(trained, tmp_path):
    here, there = trained("sast", "num_epochs=2"), tmp_path / "there"
    command = [sys.executable, "-m", "sast_jax", "train", f"--config={here / 'run.json'}", f"--workdir={there}"]
    # What may differ between processes: the order of sets, and whether programs were compiled or loaded.
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert_trees_equal(load_run(here).params, load_run(there).params)
    a, b = ({key: value for key, value in read_results(path).items() if "seconds" not in key} for path in (here, there))
    assert a == b


def test_perturbation_batch_and_radius_change_what_is_learnt(trained):
    overrides = ("sam.perturbation=independent", "sam.perturbation=same", "sam.rho=0.01")
    kernels = [load_run(trained("sast", override, "num_epochs=2")).params["readout"]["kernel"] for override in overrides]
    assert min(np.abs(kernels[i] - kernels[j]).max() for i, j in ((0, 1), (0, 2), (1, 2))) > 1e-4


@pytest.mark.slow
def test_cheaper_schedules_cost_what_they_say(tiny, tmp_path):
    costs = {
        (): 60,
        ("sam.every_steps=3",): 30 + 10,
        ("sam.start=0.5",): 30 + 15,
        ("sam.perturbation_batch_size=5",): 30 + 15,
        ("sam.every_steps=2", "sam.start=0.75", "sam.perturbation_batch_size=2"): 30 + 3 * 0.2,
    }
    for i, (overrides, cost) in enumerate(costs.items()):
        results = train_and_evaluate(tiny("sast", *overrides), tmp_path / str(i))
        assert results["num_gradient_evaluations"] == pytest.approx(cost), overrides


def test_warm_start_continues_from_a_finished_run_and_adds_its_cost(tiny, trained, tmp_path):
    first = trained("baseline")
    overrides = [f"warm_start={first}", "num_epochs=1", "optimizer.learning_rate=1e-30", "seed=5"]
    second = train_and_evaluate(tiny("sast", *overrides), tmp_path / "second")
    assert_trees_equal(load_run(first).params, load_run(tmp_path / "second").params)
    assert second["num_gradient_evaluations"] == 2 * 3
    assert second["warm_start_cost"]["num_gradient_evaluations"] == read_results(first)["num_gradient_evaluations"] == 30
    third = train_and_evaluate(tiny("sast", *overrides[1:], f"warm_start={tmp_path / 'second'}"), tmp_path / "third")
    assert third["warm_start_cost"]["num_gradient_evaluations"] == 36


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("network.features=9", r"\['dense_0'\]\['bias'\] is \(8,\) there and \(9,\) here"),
        ("dataset.seed=1", "may have seen samples"),
        ("", "has not finished"),
    ],
)
def test_warm_start_from_what_does_not_fit_or_has_not_ended_is_refused(tiny, trained, tmp_path, change, message):
    shutil.copytree(trained("baseline"), tmp_path / "first")
    if not change:
        (tmp_path / "first" / "results.json").unlink()
    overrides = [f"warm_start={tmp_path / 'first'}", *filter(None, [change])]
    with pytest.raises(UserError, match=message):
        train_and_evaluate(tiny("sast", *overrides), tmp_path / "second")
    assert not (tmp_path / "second" / "run.json").exists()


@pytest.mark.parametrize("perturbation", ["same", "independent"])
def test_until_its_start_a_run_is_the_baseline_bit_for_bit(tiny, trained, tmp_path, perturbation):
    train_and_evaluate(tiny("sast", "sam.start=0.9", f"sam.perturbation={perturbation}"), tmp_path / "late")
    shutil.copytree(trained("baseline"), tmp_path / "baseline")
    ends = [load_run(tmp_path / name).params["readout"]["kernel"] for name in ("baseline", "late")]
    assert np.abs(ends[0] - ends[1]).max() > 0
    for name in ("baseline", "late"):
        shutil.rmtree(tmp_path / name / "checkpoints" / "30")  # The one before is of step 27, the last before the start.
    baseline, late = (load_run(tmp_path / name) for name in ("baseline", "late"))
    assert baseline.step == late.step == 27
    assert_trees_equal(baseline.params, late.params)


def test_run_that_starts_after_its_end_is_the_baseline_bit_for_bit(tiny, trained, tmp_path):
    train_and_evaluate(tiny("sast", "sam.start=1"), tmp_path)
    assert_trees_equal(load_run(trained("baseline")).params, load_run(tmp_path).params)


def test_checkpoint_holds_its_step_though_later_steps_take_the_buffers(tmp_path):
    network = SpikingMLP(3, features=(4000,))
    tx = optax.sgd(0.5)
    state = init_state(network, tx, draw(0).frames[:, :1], seed=0)
    step = make_train_step(network, tx, "surrogate")
    checkpoints = Checkpoints(tmp_path)
    state, _ = step(state, draw(0))
    expected = jax.tree.map(lambda leaf: np.array(leaf, copy=True), state.params)
    checkpoints.save(state, seconds=1.0)
    for _ in range(5):
        state, _ = step(state, draw(0))
    checkpoints.close()
    restored, seconds = restore(tmp_path, state)
    assert_trees_equal(restored.params, expected)
    assert seconds == 1.0
    assert np.abs(expected["readout"]["kernel"] - state.params["readout"]["kernel"]).max() > 0


def test_finished_run_reports_its_results_and_trains_no_more(tiny, trained, tmp_path, monkeypatch):
    shutil.copytree(trained("sast", "num_epochs=2"), tmp_path / "run")
    monkeypatch.setattr("sast_jax.training.build.make_train_step", lambda *a: pytest.fail("trained again"))
    assert train_and_evaluate(tiny("sast", "num_epochs=2"), tmp_path / "run") == read_results(tmp_path / "run")


def test_results_hold_what_is_promised(tiny, tmp_path):
    config = tiny("sast", "num_epochs=2")
    results = train_and_evaluate(config, tmp_path)
    assert read_results(tmp_path) == json.loads(json.dumps(results))
    assert results["num_test"] == 20
    assert results["num_gradient_evaluations"] == 2 * 2 * 3
    assert results["transfer_gap"] == pytest.approx(results["surrogate_accuracy"] - results["hard_accuracy"])
    assert results["wall_time_seconds"] > 0
    assert results["first_step_seconds"] > 0
    assert (results["num_devices"], results["num_runs_together"]) == (1, 1)
    assert results["config"]["sam"] == config.sam.to_dict()
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [3, 6]
    assert {"loss", "accuracy", "gradient_norm", "spike_rate_0"} <= lines[0].keys()
    assert "validation_hard_accuracy" in lines[1]


def test_loaded_run_predicts_with_the_reported_accuracy(tiny, trained):
    config, results, run = tiny("sast"), read_results(trained("sast")), load_run(trained("sast"))
    test = load_data(config).test
    for mode in ("surrogate", "hard"):
        logits = run.predict(test.frames.swapaxes(0, 1), mode)
        assert np.mean(np.argmax(logits, -1) == test.labels) == pytest.approx(results[f"{mode}_accuracy"])
    assert results["surrogate_accuracy"] > 0.5  # Chance is 0.1.
    assert run.config == config


def test_counts_are_cut_as_in_training(trained):
    run = load_run(trained("sast", "num_epochs=2"))
    frames = np.random.default_rng(0).integers(0, 4, (3, 2, 34, 34, 2))
    np.testing.assert_array_equal(run.predict(frames), run.predict(np.minimum(frames, 1)))


def test_run_of_an_earlier_version_has_the_default_of_a_newer_field(tiny, trained, tmp_path):
    shutil.copytree(trained("sast", "num_epochs=2"), tmp_path / "run")
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    del run["config"]["warm_start"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(run))
    assert load_run(tmp_path / "run").config.warm_start == ""
    assert train_and_evaluate(tiny("sast", "num_epochs=2"), tmp_path / "run")["num_test"] == 20
    with pytest.raises(UserError, match="warm_start: the run has '', the config 'elsewhere'"):
        train_and_evaluate(tiny("sast", "num_epochs=2", "warm_start=elsewhere"), tmp_path / "run")


def test_pair_is_trained_and_a_radius_override_spares_the_baseline(tiny, small_nmnist, tmp_path):
    configs = load_configs("configs/nmnist.py", [*TINY, f"dataset.root={small_nmnist}", "num_epochs=1", "sam.rho=0.2"])
    results = train_variants(configs, tmp_path)
    assert {name: run["config"]["sam"]["rho"] for name, run in results["runs"].items()} == {"baseline": 0.0, "sast": 0.2}
    assert results["surrogate_accuracy"] == results["runs"]["sast"]["surrogate_accuracy"]
    assert json.loads((tmp_path / "results.json").read_text()).keys() == results.keys()
    assert load_run(tmp_path).config.sam.rho == 0.2
    assert load_run(tmp_path / "baseline").config.sam.rho == 0.0


def test_folder_of_another_config_is_refused_with_the_fields_that_differ(tiny, trained, tmp_path):
    shutil.copytree(trained("sast", "num_epochs=2"), tmp_path / "run")
    with pytest.raises(UserError) as error:
        train_and_evaluate(tiny("sast", "num_epochs=1", "network.slope=4"), tmp_path / "run")
    assert "network.slope: the run has 2.0, the config 4.0" in str(error.value)
    assert "num_epochs: the run has 2, the config 1" in str(error.value)
    assert "seed" not in str(error.value)


def test_other_recordings_than_the_run_began_with_are_refused(tiny, tmp_path, small_nmnist, monkeypatch):
    monkeypatch.setattr(Progress, "advance", lambda self: os.kill(os.getpid(), signal.SIGINT))
    shutil.copytree(small_nmnist, tmp_path / "data")
    config = tiny("sast", f"dataset.root={tmp_path / 'data'}")
    with pytest.raises(Interrupted):
        train_and_evaluate(config, tmp_path / "run")
    for part in ("Train", "Test"):
        file = tmp_path / "data" / part / "0" / "00000.bin"
        file.rename(tmp_path / "elsewhere")
        with pytest.raises(UserError, match="was begun with other recordings"):
            train_and_evaluate(config, tmp_path / "run")
        (tmp_path / "elsewhere").rename(file)


def test_loss_that_is_not_finite_stops_the_run_and_names_the_step(tiny, tmp_path):
    config = tiny("baseline", "optimizer.name=sgd", "optimizer.learning_rate=1e38", "optimizer.schedule=constant")
    with pytest.raises(UserError, match=r"(loss|gradient_norm|update_norm) is (nan|inf) at step \d+.*optimizer.learning_rate"):
        train_and_evaluate(config, tmp_path)
    assert not (tmp_path / "results.json").exists()


def test_perturbed_gradient_that_is_not_finite_stops_before_a_checkpoint(tiny, tmp_path):
    config = tiny("sast", "sam.rho=1e38", "batch_size=30", "checkpoint_every_epochs=1", "evaluate_every_epochs=1")
    with pytest.raises(UserError, match=r"update_norm is (nan|inf) at step 1;"):
        train_and_evaluate(config, tmp_path)
    assert not any((tmp_path / "checkpoints").iterdir())


def test_evaluation_does_not_depend_on_the_batch_size(recordings):
    network = SpikingMLP(7, features=(9,))
    params = jax.jit(network.init)(jax.random.key(0), jnp.zeros((3, 1, 4, 4, 2)))["params"]
    results = [evaluate_transfer(make_eval_step(network), params, recordings, size) for size in (1, 2, 7, 100)]
    for result in results[1:]:
        assert result == pytest.approx(results[0])
    frames = recordings.frames.swapaxes(0, 1).astype(np.float32)
    logits = jax.jit(lambda params: network.apply({"params": params}, frames, "hard").logits)(params)
    assert results[0]["hard_accuracy"] == np.mean(np.argmax(logits, -1) == recordings.labels)


def test_equal_networks_share_an_evaluation_step_and_need_no_hash():
    class Scaled(nn.Module):
        scale: jax.Array

        def __call__(self, frames, mode):
            return NetworkOutput(self.scale * frames.sum((0, 2, 3)), ())

    small, equal, large = (make_eval_step(SpikingMLP(2, features=(size,))) for size in (4, 4, 5))
    assert small is equal
    assert small is not large
    for scale in (1.0, -1.0):  # An array has no hash.
        step = make_eval_step(Scaled(jnp.full(2, scale)))
        frames = np.ones((3, 1, 2, 2, 2)) * [1, 2]
        assert step({}, Batch(frames, np.array([1]), np.ones(1, bool)))["hard_correct"] == (scale > 0)


def test_metrics_survive_a_last_line_that_was_cut_off(tmp_path):
    lines = [{"step": 1, "epoch": 1}, {"step": 2, "epoch": 2}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"st')
    assert read_metrics(tmp_path) == lines


class Terminal:
    def __init__(self, is_terminal):
        self.text, self.isatty = "", lambda: is_terminal

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def test_progress_is_a_bar_on_a_terminal_and_plain_lines_elsewhere():
    metrics = {"loss": 0.5, "accuracy": 0.25, "validation_surrogate_accuracy": 0.5, "validation_hard_accuracy": 0.125}
    for is_terminal in (True, False):
        stream = Terminal(is_terminal)
        progress = Progress("sast", step=0, num_steps=4, stream=stream)
        for _ in range(2):
            progress.advance()
        progress.report(1, 2, metrics)
        progress.note("first step after 1.0 s")
        progress.close()
        assert ("\r" in stream.text) == is_terminal
        assert "loss" in stream.text
        assert "sast: first step after 1.0 s\n" in stream.text
    assert stream.text.startswith("sast: epoch 1, step 2/4, loss 0.500, accuracy 25.0%, validation 50.0% surrogate / 12.5% hard")
    assert "s left\n" in stream.text


def test_lif_stands_between_own_layers_under_the_same_step():
    class Own(nn.Module):
        @nn.compact
        def __call__(self, frames, mode="surrogate"):
            current = nn.Dense(16)(frames.reshape(*frames.shape[:2], -1))
            spikes, _ = lif(current, decay=0.8, spike_fn=spike_fn(mode))
            return NetworkOutput(nn.Dense(3)(spikes).mean(0), (spikes,))

    tx = optax.chain(sam(0.05), optax.adam(1e-2))
    state = init_state(Own(), tx, draw(0).frames[:, :1], seed=0)
    step = make_train_step(Own(), tx, "surrogate")
    losses = []
    for _ in range(60):
        state, metrics = step(state, draw(0), draw(0))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.perf
@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize(
    "fields",
    [[], ["batch_size=4"], ["network.time_chunk=4"], ["num_microbatches=2"], ["network.features=2,9"], ["network.kind=mlp"]]
    + [["network.readout=rate", f"network.kind={kind}"] for kind in ("conv", "mlp")],
)
def test_largest_array_of_a_step_is_told_before_it_is_compiled(tiny, monkeypatch, fields, together):
    told = []
    monkeypatch.setattr(session, "expect_array", told.append)
    conv = ["network.kind=conv", "network.features=4,3", "dataset.num_time_steps=12", "batch_size=8"]
    config = tiny("sast", *conv, "sam.perturbation_batch_size=8", *fields)
    task = session.Task(config, together)
    state = task.init(jax.random.key(0), None)
    batches = [take_batch(task.splits.train, np.arange(size * together)) for size in (config.batch_size, 8)]
    if together == 1:
        step = build_train_step(config, task.network, task.num_steps)
    else:
        state = stack([state] * together)
        step = jax.jit(build_train_step_together([config] * together, task.network, task.num_steps))
    text = step.lower(state, *batches).compile().as_text()
    shapes = re.findall(r"f32\[([\d,]+)\]", text)
    assert told == [4 * max(math.prod(map(int, shape.split(","))) for shape in shapes)]


@pytest.mark.perf
@pytest.mark.parametrize(
    ("fields", "together", "num_devices", "num_samples"),
    [
        ([], 1, 2, 4),
        ([], 1, 3, 4),  # Two of three devices, as three cannot have equal parts.
        (["batch_size=9", "sam.perturbation_batch_size=9"], 1, 2, 9),
        (["sam.perturbation_batch_size=7"], 1, 2, 8),
        (["sam.ascent=per_device"], 1, 2, 8),
        ([], 4, 2, 8),  # One run after the other.
        (["network.kind=mlp"], 1, 2, 8),
        (["network.kind=mlp"], 4, 2, 16),
        (["network.kind=mlp"], 3, 2, 24),
    ],
)
def test_largest_array_is_that_of_the_device_with_most_samples(tiny, monkeypatch, fields, together, num_devices, num_samples):
    told = []
    monkeypatch.setattr(session, "expect_array", told.append)
    monkeypatch.setattr(session, "num_cpu_devices", lambda: num_devices)
    overrides = ["network.kind=conv", "network.features=200", "batch_size=8", "sam.perturbation_batch_size=8", *fields]
    task = session.Task(tiny("sast", *overrides), together)
    num_steps, _, height, width, _ = take_batch(task.splits.train, np.arange(1)).frames.shape
    # Of a dense network the frames, as all steps go through its layer at once.
    num_neurons = 2 * height * width if "network.kind=mlp" in fields else 200 * height * width
    assert told == [4 * num_steps * num_samples * num_neurons]


@pytest.mark.perf
@pytest.mark.parametrize("command", ["train --config=configs/digits.py:sast", "sweep --config=configs/study_digits.py"])
def test_largest_array_is_told_before_jax_starts_its_threads(command, tmp_path):
    script = f"""
from jax._src.xla_bridge import backends_are_initialized
from sast_jax.cli import main
from sast_jax.training import session
def tell(num_bytes):
    print(num_bytes > 0, backends_are_initialized())
    raise SystemExit
session.expect_array = tell
main({[*command.split(), f"--workdir={tmp_path / 'run'}"]!r})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-2:] == ["True", "False"]
