import os
import shutil
import signal

import jax
import numpy as np
import pytest

from sast_jax import SpikingConvNet, load_run
from sast_jax.config import MAX_SEED
from sast_jax.data import SAMPLE_AXES, take_batch
from sast_jax.errors import Diverged, Interrupted
from sast_jax.training import init_state, read_metrics, train_and_evaluate, train_many
from sast_jax.training import together as together_lib
from sast_jax.training.build import build_train_step, make_network, make_optimizer
from sast_jax.training.progress import Progress
from sast_jax.training.session import Task
from sast_jax.training.together import build_train_step_together, num_fitting, program, stack, unstack
from tests.conftest import assert_trees_equal, write_small_nmnist
from tests.test_training import draw

SHORT = ("num_epochs=2", "evaluate_every_epochs=1", "optimizer.name=adamw")
RUNS = (
    ("seed=3", "sam.rho=0.1", "optimizer.learning_rate=1e-3", "optimizer.weight_decay=0.1"),
    (f"seed={MAX_SEED}", "sam.rho=0.4", "optimizer.learning_rate=4e-3", "optimizer.weight_decay=0.0"),
)


@pytest.fixture(scope="module")
def small_nmnist(tmp_path_factory):
    """One folder of recordings for all runs of this file."""
    return write_small_nmnist(tmp_path_factory.mktemp("nmnist"))


def folders(tmp_path, configs):
    return [tmp_path / str(index) for index in range(len(configs))]


def train(configs, workdirs, together=None):
    return train_many(configs, workdirs, titles=[path.name for path in workdirs], together=together or len(configs))


def assert_runs_agree(workdir, other):
    run, other_run = load_run(workdir), load_run(other)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), run.params, other_run.params)
    for a, b in zip(read_metrics(workdir), read_metrics(other), strict=True):
        assert a.keys() == b.keys()
        if a["num_steps"] != b["num_steps"]:  # The steps of this epoch before an interruption are not in its line.
            continue
        for key in a.keys() - {"seconds", "data_seconds"}:
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-5), key
    a, b = run.results, other_run.results
    assert a["config"] == b["config"]
    assert a["num_gradient_evaluations"] == b["num_gradient_evaluations"]
    assert a.keys() == b.keys()


@pytest.mark.parametrize(
    "common",
    [
        ("augmentation.drop=0.2", "sam.every_steps=2"),
        pytest.param(("sam.perturbation=noise", "spikes.hard_share=0.5", "num_microbatches=2"), marks=pytest.mark.slow),
    ],
)
def test_runs_trained_together_are_those_trained_alone(tiny, tmp_path, common):
    configs = [tiny("sast", *SHORT, *common, *own) for own in RUNS]
    together, in_turn = (folders(tmp_path / way, configs) for way in ("together", "in_turn"))
    assert [result["num_runs_together"] for result in train(configs, together)] == [2, 2]
    assert [result["num_runs_together"] for result in train(configs, in_turn, together=1)] == [1, 1]
    for a, b in zip(together, in_turn, strict=True):
        assert_runs_agree(a, b)
    train_and_evaluate(configs[1], tmp_path / "alone")  # The second one in turn had the data and the network of the first.
    assert_trees_equal(load_run(in_turn[1]).params, load_run(tmp_path / "alone").params)


@pytest.mark.slow
@pytest.mark.parametrize("is_one_operation", [False, True], ids=["in turns", "as one operation"])
def test_step_of_many_conv_networks_is_that_of_each(is_one_operation, tiny, monkeypatch):
    if is_one_operation:  # As on a GPU.
        monkeypatch.setattr(SpikingConvNet, "order_on_cpu", "layer_major")
    configs = [tiny("sast", "network.kind=conv", "network.features=2,3", "network.kernel_size=3", *own[:3]) for own in RUNS]
    network = make_network(configs[0], 3)
    batches = [[draw(10 * run + stream) for stream in (0, 1)] for run in (0, 1)]

    def start():
        txs = [make_optimizer(config, 30) for config in configs]
        return [init_state(network, tx, batches[0][0].frames, seed=seed) for seed, tx in enumerate(txs)]

    joined = [
        jax.tree.map(lambda axis, *parts: np.concatenate(parts, axis), SAMPLE_AXES, *each) for each in zip(*batches, strict=True)
    ]
    state, metrics = build_train_step_together(configs, network, 30)(stack(start()), *joined)
    for index, (own, alone) in enumerate(zip(unstack(state, 2), start(), strict=True)):
        expected, own_metrics = build_train_step(configs[index], network, 30)(alone, *batches[index])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), own, expected)
        assert metrics["loss"][index] == pytest.approx(float(own_metrics["loss"]), rel=1e-5)


@pytest.mark.perf
def test_counters_are_scalars_so_that_plain_steps_cost_one_gradient(tiny):
    costs = []
    for overrides in ((), ("sam.every_steps=1000",)):
        configs = [tiny("sast", "network.features=64", *overrides, f"seed={seed}") for seed in (0, 1)]
        network, tx = make_network(configs[0], 3), make_optimizer(configs[0], 30)
        states = [init_state(network, tx, draw(0).frames, seed=seed) for seed in (0, 1)]
        step = build_train_step_together(configs, network, 30)
        text = jax.jit(step).lower(stack(states), draw(0, 12), draw(1, 12)).as_text()
        costs.append("stablehlo.case" in text or "stablehlo.if" in text)
    assert costs == [False, True]  # A branch of the program; had the counters an axis of runs, both sides would be computed.


def test_interrupted_runs_go_on_together_where_at_the_same_step(tiny, tmp_path, monkeypatch):
    configs = [tiny("sast", "num_epochs=3", "checkpoint_every_epochs=1", f"seed={seed}") for seed in (0, 1, 2)]
    straight, stopped = folders(tmp_path / "straight", configs), folders(tmp_path / "stopped", configs)
    train(configs, straight)
    advance, steps = Progress.advance, []

    def stop(self):
        advance(self)
        steps.append(1)
        if len(steps) == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Progress, "advance", stop)
    with pytest.raises(Interrupted, match="stopped at step 7 of 9"):
        train(configs, stopped)
    assert [load_run(path).step for path in stopped] == [7, 7, 7]
    shutil.rmtree(stopped[1] / "checkpoints" / "7")  # As if the process had died before it saved the second one.
    results = train(configs, stopped)
    assert [result["num_runs_together"] for result in results] == [2, 1, 2]
    for a, b in zip(stopped, straight, strict=True):
        assert_runs_agree(a, b)
    assert train(configs, stopped) == results  # Nothing is trained again.


def test_run_that_diverges_leaves_the_others_as_they_are(tiny, tmp_path):
    common = ("num_epochs=2", "optimizer.name=sgd", "optimizer.schedule=constant")
    configs = [tiny("baseline", *common, f"optimizer.learning_rate={rate}") for rate in (0.1, 1e38)]
    good, bad = train(configs, folders(tmp_path, configs))
    assert isinstance(bad, Diverged)
    assert str(tmp_path / "1") in str(bad)
    assert not (tmp_path / "1" / "results.json").exists()
    alone = train_and_evaluate(configs[0], tmp_path / "alone")
    assert good["surrogate_loss"] == pytest.approx(alone["surrogate_loss"], rel=1e-4)


def test_only_runs_that_differ_in_numbers_share_a_program(tiny):
    same = [program(tiny("sast", *own[:3])) for own in RUNS]
    assert same[0] == same[1]
    others = [("sam.rho=0",), ("num_epochs=3",), ("network.slope=3",), ("sam.adaptive=element",), ("test=false",)]
    assert len({same[0], *(program(tiny("sast", *own)) for own in others)}) == 6


@pytest.mark.slow
def test_as_many_runs_are_trained_together_as_fit_in_memory(tiny, monkeypatch):
    configs = [tiny("sast", f"seed={seed}") for seed in range(4)]
    task = Task(configs[0])
    batch = jax.eval_shape(lambda: take_batch(task.splits.train, np.zeros(10, int)))

    def fitting(limit):
        monkeypatch.setattr(together_lib, "memory_bytes", lambda: limit)
        return num_fitting(configs, task.network, task.num_steps, task.target, batch)

    assert fitting(None) == fitting(2**40) == 4
    assert fitting(1) == 1
    numbers = [fitting(limit) for limit in 2 ** np.arange(14, 30)]
    assert numbers == sorted(numbers)
    assert set(numbers) == {1, 2, 4}
