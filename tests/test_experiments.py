import contextlib
import copy
import functools
import itertools
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from sast_jax import config as config_lib
from sast_jax.cli import main
from sast_jax.config import flatten, load_configs
from sast_jax.errors import Diverged, Interrupted, UserError
from sast_jax.experiments import METHODS
from sast_jax.experiments.board import CLEAR, Board
from sast_jax.experiments.comparison import recommend
from sast_jax.experiments.page import find, render, write_page
from sast_jax.experiments.plan import load_plan
from sast_jax.experiments.statistics import paired_test
from sast_jax.experiments.sweep import run_study
from sast_jax.files import write_json
from sast_jax.training import train_and_evaluate
from sast_jax.training.processes import Workers, share_cores
from sast_jax.training.records import STUDY, read_record
from sast_jax.training.run import check_workdir, register
from tests.conftest import write_small_nmnist

STUDY_FILE = """
import runpy
from sast_jax.experiments import METHODS, Method, Study, change

def get_config(variant=""):
    return change(runpy.run_path("configs/digits.py")["get_config"]("baseline"), variant)

def get_study():
    grids = {"sast": {"sam.rho": (0.1, 0.4), "optimizer.learning_rate": (1e-3, 1e-2)}, "baseline_twice": {"num_epochs": (2, 3)}}
    methods = {name: METHODS[name]._replace(grid=grids.get(name, {})) for name in ("baseline", "baseline_twice", "sast", "noise")}
    return Study(methods, seeds=(0, 1, 2), selection_seeds=(100, 101))
"""

TINY_STUDY_FILE = """
import runpy
from sast_jax.experiments import METHODS, Study, change

def get_config(variant=""):
    config = runpy.run_path("configs/nmnist.py")["get_config"]("baseline")
    config.network.update(kind="mlp", features=(8,))
    config.dataset.update(num_time_steps=3, num_validation=10)
    config.update(batch_size=10, num_epochs=2, evaluate_every_epochs=2, checkpoint_every_epochs=2)
    return change(config, variant)

def get_study():
    methods = {name: METHODS[name]._replace(controls=()) for name in ("baseline", "sast")}
    methods["sast"] = methods["sast"]._replace(grid={"sam.rho": (0.1, 0.2)})
    return Study(methods, seeds=(0, 1), selection_seeds=(100,), folds=2)
"""

NUM_RUNS = 4 * 2 + 2 * 2 + 4 * 3


@pytest.fixture
def study(tmp_path):
    """A study's file; and a function that writes it with replacements."""

    def write(*replacements):
        text = STUDY_FILE
        for old, new in replacements:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / "study.py"
        path.write_text(text)
        return path

    return write


class Trainer:
    """Stands in for `train_many`: accuracies are a function of the config, and runs are counted."""

    def __init__(self, stop_at=None, diverges=lambda config: False, test_shift=0.0):
        self.trained, self.stop_at, self.diverges, self.test_shift = [], stop_at, diverges, test_shift

    def __call__(self, configs, workdirs, *, titles, report, together=None):
        for index, (config, workdir, title) in enumerate(zip(configs, workdirs, titles, strict=True)):
            try:
                result = self.train(config, workdir, title)
            except Diverged as error:
                result = error
            report(index, result)

    def train(self, config, workdir, title):
        check_workdir(workdir, config)
        if (found := read_record(workdir / "results.json")) is not None:
            return found
        if len(self.trained) == self.stop_at:
            raise Interrupted("stopped")
        self.trained.append(title)
        register(workdir, config, {"checksum": "0", "num_classes": 10})
        if self.diverges(config):
            raise Diverged("loss is nan")
        noise = np.random.default_rng(config.seed).normal(0, 0.01)
        hard = 0.8 + 0.2 * config.sam.rho - 3 * config.optimizer.learning_rate + noise
        part = {"surrogate_accuracy": 0.9 + noise, "hard_accuracy": hard, "transfer_gap": 0.9 + noise - hard}
        tested = {key: value + self.test_shift for key, value in part.items()} if config.test else {}
        results = {
            **tested,
            "validation": part,
            **{"num_train": 100, "num_validation": 20, "num_test": 30 if config.test else 0},
            "num_gradient_evaluations": config.num_epochs * (1 + (config.sam.rho > 0 and config.sam.perturbation != "noise")),
            "wall_time_seconds": 10.0 + config.num_epochs,
            "environment": {"device": "cpu", "num_cores": 2},
        }
        write_json(workdir / "results.json", results)
        return results


class Straight(NamedTuple):
    """A study that went through without a stop.

    Attributes:
        folder: Where it is.
        trained: Names of the runs that were trained.
        results: What it returned.
    """

    folder: Path
    trained: list[str]
    results: dict[str, Any]


@pytest.fixture(scope="module")
def _straight(tmp_path_factory):
    folder, trainer = tmp_path_factory.mktemp("straight"), Trainer()
    (folder / "study.py").write_text(STUDY_FILE)
    return Straight(folder / "run", trainer.trained, run_study(folder / "study.py", [], folder / "run", train=trainer))


@pytest.fixture
def straight(_straight, tmp_path):
    """A copy of a study that went through without a stop."""
    folder = shutil.copytree(_straight.folder, tmp_path / "run")
    return Straight(folder, list(_straight.trained), copy.deepcopy(_straight.results))


def test_selection_takes_the_point_of_the_best_hard_spikes_on_validation(straight):
    results = straight.results
    assert len(straight.trained) == NUM_RUNS
    assert results["methods"]["sast"]["selected"] == {"sam.rho": 0.4, "optimizer.learning_rate": 1e-3}
    rows = results["selection"]["sast"]
    assert len(rows) == 4
    assert rows[0]["mean_hard"] == max(row["mean_hard"] for row in rows)
    assert results["methods"]["baseline_twice"]["selected"] == {"num_epochs": 2}  # The first of equals.
    for seed in (0, 1, 2):
        config = json.loads((straight.folder / f"tested/sast-seed{seed}/run.json").read_text())["config"]
        assert (config["sam"]["rho"], config["optimizer"]["learning_rate"], config["seed"]) == (0.4, 1e-3, seed)
        config = json.loads((straight.folder / f"tested/baseline_twice-seed{seed}/run.json").read_text())["config"]
        assert config["num_epochs"] == 4  # Twice the baseline's.


def test_selection_never_sees_the_test_part(straight, study, tmp_path):
    good = straight.results
    garbage = run_study(study(), [], tmp_path / "garbage", train=Trainer(test_shift=-0.5))
    assert good["selection"] == garbage["selection"]
    assert good["methods"]["sast"]["hard"] != garbage["methods"]["sast"]["hard"]
    for folder in (straight.folder / "selection").iterdir():
        config = json.loads((folder / "run.json").read_text())["config"]
        assert config["test"] is False
        assert config["seed"] in (100, 101)
    for folder in (straight.folder / "tested").iterdir():
        assert json.loads((folder / "run.json").read_text())["config"]["test"] is True


@pytest.mark.parametrize("stop_at", [0, 5, 15])
def test_interrupted_sweep_goes_on_as_if_it_had_not_been(straight, study, tmp_path, stop_at):
    first, second = Trainer(stop_at=stop_at), Trainer()
    with pytest.raises(Interrupted):
        run_study(study(), [], tmp_path / "stopped", train=first)
    assert not (tmp_path / "stopped" / "results.json").exists()
    assert run_study(study(), [], tmp_path / "stopped", train=second) == straight.results
    assert not set(first.trained) & set(second.trained)
    assert len(first.trained) + len(second.trained) == NUM_RUNS
    third = Trainer()
    assert run_study(study(), [], tmp_path / "stopped", train=third) == straight.results
    assert not third.trained


def test_diverged_selection_run_ends_its_point_and_a_tested_one_the_study(study, tmp_path):
    results = run_study(study(), [], tmp_path / "a", train=Trainer(diverges=lambda c: c.sam.rho == 0.4 and c.seed == 100))
    assert results["methods"]["sast"]["selected"]["sam.rho"] == 0.1
    assert sum(row["mean_hard"] is None for row in results["selection"]["sast"]) == 2
    assert "diverged" in render(results)
    again = Trainer(diverges=lambda c: True)
    assert run_study(study(), [], tmp_path / "a", train=again) == results
    assert not again.trained
    with pytest.raises(Diverged):
        run_study(study(), [], tmp_path / "b", train=Trainer(diverges=lambda c: c.test and c.sam.rho > 0))
    with pytest.raises(UserError, match="sast: training diverged at all points"):
        run_study(study(), [], tmp_path / "c", train=Trainer(diverges=lambda c: c.sam.rho > 0))


def test_cost_of_a_warm_start_is_counted(study, tmp_path):
    def train(configs, workdirs, *, report, **others):
        cost = {"warm_start_cost": {"num_gradient_evaluations": 12, "wall_time_seconds": 24.0}}
        warm = lambda index, result: report(index, result | (cost if configs[index].sam.perturbation == "noise" else {}))  # noqa: E731
        Trainer()(configs, workdirs, report=warm, **others)

    methods = run_study(study(), [], tmp_path / "run", train=train)["methods"]
    assert methods["noise"]["gradients_ratio"] == 2
    assert methods["noise"]["time_ratio"] == pytest.approx(46 / 22)


@pytest.mark.usefixtures("straight")
def test_folder_of_another_study_is_refused_but_it_may_grow(study, tmp_path):
    before = (tmp_path / "run" / "results.json").read_bytes()
    with pytest.raises(UserError) as error:
        run_study(study(("(0.1, 0.4)", "(0.1, 0.5)")), ["network.slope=4"], tmp_path / "run", train=Trainer())
    assert "sast: grid.sam.rho: the study there has [0.1, 0.4], this one [0.1, 0.5]" in str(error.value)
    assert "baseline: network.slope: the study there has 2.0, this one 4.0" in str(error.value)
    with pytest.raises(UserError, match="selection_seeds: the study there has"):
        run_study(study(("(100, 101)", "(100, 102)")), [], tmp_path / "run", train=Trainer())
    assert (tmp_path / "run" / "results.json").read_bytes() == before
    more = Trainer()
    path = study(("seeds=(0, 1, 2)", "seeds=(0, 1, 2, 3)"), ('"noise")', '"noise", "straight_through")'))
    assert len(run_study(path, [], tmp_path / "run", train=more)["seeds"]) == 4
    assert len(more.trained) == 4 + 4
    run_study(study(('"sast", "noise")', '"sast")')), [], tmp_path / "run", train=Trainer())  # A part of it.
    assert set(json.loads((tmp_path / "run" / STUDY).read_text())["methods"]) >= {"noise", "straight_through"}


def test_study_that_an_earlier_version_began_goes_on(straight, study, tmp_path):
    old = json.loads((tmp_path / "run" / STUDY).read_text())
    del old["folds"]
    for method in old["methods"].values():
        del method["config"]["dataset.fold"]
    write_json(tmp_path / "run" / STUDY, old)
    more = Trainer()
    assert run_study(study(), [], tmp_path / "run", train=more) == straight.results
    assert not more.trained


@pytest.mark.parametrize(
    ("name", "text"), [("run.json", "{}"), ("results.json", "{}"), ("runs.json", "[]"), ("study.json", "[1]")]
)
def test_folder_of_something_else_is_refused_and_left_alone(study, tmp_path, name, text):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text(text)
    with pytest.raises(UserError, match=name):
        run_study(study(), [], tmp_path / "run", train=Trainer())
    assert (tmp_path / "run" / name).read_text() == text


def test_override_sets_all_methods_but_those_that_differ(study):
    plan = load_plan(study(), ["network.slope=4", "sam.rho=0.3", "num_epochs=5", "dataset.seed=3"])
    assert {config.network.slope for config in plan.configs.values()} == {4.0}
    assert {config.dataset.seed for config in plan.configs.values()} == {3}
    radii = {"baseline": 0.0, "baseline_twice": 0.0, "sast": 0.3, "noise": 0.3}
    assert {name: config.sam.rho for name, config in plan.configs.items()} == radii
    assert plan.points("sast") == [{"optimizer.learning_rate": 1e-3}, {"optimizer.learning_rate": 1e-2}]
    assert {name: config.num_epochs for name, config in plan.configs.items()} == {
        "baseline": 5, "baseline_twice": 10, "sast": 5, "noise": 5,
    }  # fmt: skip
    assert plan.points("baseline_twice") == [{}]
    assert plan.config("sast", plan.points("sast")[1], {"seed": 7}).seed == 7
    plan = load_plan(Path("configs/study_digits.py"), ["network.slope=4"])
    assert {plan.configs[name].network.slope for name in ("baseline", "sast", "straight_through")} == {4.0}
    assert plan.study.methods["steep_slope"].grid["network.slope"] == (5.0, 10.0, 20.0)  # Its slope is its own.


@pytest.mark.parametrize(
    ("replacement", "overrides", "messages"),
    [
        (("(0.1, 0.4)", "(0.1, -1.0)"), [], ["sast: sam.rho: must be a finite number >= 0; got -1.0"]),
        (("sam.rho", "sam.rhoo"), [], ["sast: there is no field 'sam.rhoo'"]),
        (("(100, 101)", "(2, 101)"), [], ["[2] are also tested"]),
        (("seeds=(0, 1, 2)", "seeds=(0, 0)"), [], ["seeds: must be different integers"]),
        (("seeds=(0, 1, 2)", "seeds=(0,)"), [], ["at least 2"]),
        (('("baseline", "b', '("b'), [], ["there must be one called 'baseline'"]),
        (("return Study(methods", "return dict(methods=methods"), [], ["must return a sast_jax.experiments.Study"]),
        (("def get_study", "def study"), [], ["does not define get_study()"]),
        (("grids = {", "grids = 1 / 0 or {"), [], ["get_study()", "ZeroDivisionError"]),
        (("grids = {", "grids = exit(3) or {"), [], ["get_study()", "SystemExit: 3"]),
        (("Study(methods", "Study(list(methods)"), [], ["must return a sast_jax.experiments.Study of Methods by name"]),
        (("seeds=(0, 1, 2)", "seeds=5"), [], ["seeds: must be a tuple; got 5"]),
        (("(0.1, 0.4)", "0.4"), [], ["sast: sam.rho must have a tuple of values; got 0.4"]),
        (('["get_config"]("baseline"), variant)', '["get_config"](""), variant)'), [], ["must return one run, not several"]),
        (("Study", "Study"), ["seed=3", "sam.rhoo=1"], ["seed: is set by the study", "did you mean sam.rho?"]),
        (("Study", "Study"), ["dataset.num_validation=0"], ["dataset.num_validation must be above 0"]),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(study, tmp_path, replacement, overrides, messages):
    trainer = Trainer()
    with pytest.raises(UserError) as error:
        run_study(study(replacement), overrides, tmp_path / "run", train=trainer)
    assert all(message in str(error.value) for message in messages), error.value
    assert not trainer.trained
    assert not (tmp_path / "run").exists()


def test_mistake_on_the_command_line_is_one_message(study, capsys, tmp_path):
    workdir, root = tmp_path / "run", tmp_path / "none"
    assert main(["sweep", "--config=configs/study_nmnist.py", f"--workdir={workdir}", f"--config.dataset.root={root}"]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert not workdir.exists()
    assert main(["sweep", f"--config={tmp_path / 'none.py'}", f"--workdir={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sast-jax: error: --config: there is no file")
    assert "Traceback" not in error


# Cross-validation.


def test_each_seed_is_tested_on_its_own_fold_and_selection_tests_none(study, tmp_path):
    text = ("selection_seeds=(100, 101)", "selection_seeds=(100, 101), folds=3")
    results = run_study(study(text), [], tmp_path / "run", train=Trainer())
    assert results["folds"] == 3
    assert "tested on another of 3 folds" in render(results)
    for name, fold in (("tested/sast-seed0", 0), ("tested/sast-seed1", 1), ("tested/noise-seed2", 2)):
        config = json.loads((tmp_path / "run" / name / "run.json").read_text())["config"]
        assert config["dataset"]["fold"] == [fold, 3]
    for folder in (tmp_path / "run" / "selection").iterdir():
        config = json.loads((folder / "run.json").read_text())["config"]
        assert (config["test"], config["dataset"]["fold"]) == (False, [config["seed"] - 100, 3])
    with pytest.raises(UserError, match="folds: the study there has 3, this one 0"):
        run_study(study(), [], tmp_path / "run", train=Trainer())


# Several processes.


def _tiny(tmp_path):
    path = tmp_path / "study.py"
    path.write_text(TINY_STUDY_FILE)
    return path, [f"dataset.root={write_small_nmnist(tmp_path / 'data')}"]


def _but_for_times(results):
    methods = {
        name: {key: row[key] for key in ("selected", "surrogate", "hard", "gap", "gradient_evaluations")}
        for name, row in results["methods"].items()
    }
    return methods, results["selection"], results["data"]


needs_two_cores = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs Linux and two cores"
)


@pytest.fixture
def compiled_here(monkeypatch):
    """Other processes read what this one has compiled."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


@needs_two_cores
@pytest.mark.usefixtures("compiled_here")
def test_processes_train_what_this_one_does_and_their_errors_reach_it(trained, pair, tmp_path, capfd):
    broken = shutil.copytree(trained.data, tmp_path / "data")
    (broken / "Train/3/00001.bin").write_bytes(b"1234567")
    damaged = trained.config().copy_and_resolve_references().unlock()
    damaged.dataset.root = str(broken)
    other = tmp_path / "of another config"
    write_json(other / "run.json", {"config": {}, "data": {}, "environment": {}})
    names, folders, reported = ("sast", "baseline"), (tmp_path / "new", pair / "baseline"), []  # One of them is finished.
    with Workers(2) as workers:
        results = workers.train(
            [trained.config(name) for name in names], folders, titles=names, report=lambda *each: reported.append(each)
        )
        with pytest.raises(UserError, match=r"of another config/run\.json: is damaged"):
            workers.train([trained.config()], [other], titles=["a"])
        with pytest.raises(UserError, match=r"Train/3/00001.bin: size must be a positive multiple of 5 bytes"):
            workers.train([damaged], [tmp_path / "damaged"], titles=["b"])
    for name, folder, result in zip(names, folders, results, strict=True):
        assert result == json.loads((folder / "results.json").read_text())
        straight = json.loads((trained.pair / name / "results.json").read_text())
        for key in ("config", "surrogate_loss", "hard_loss", "hard_accuracy", "transfer_gap", "validation"):
            assert result[key] == straight[key], key
    assert results[0]["environment"]["num_cores"] in map(len, share_cores(2))
    assert sorted(reported, key=lambda each: each[0]) == list(enumerate(results))
    assert "epoch" not in capfd.readouterr().err


@needs_two_cores
def test_sweep_gives_all_its_runs_to_its_processes(straight, study, tmp_path, monkeypatch, capsys):
    trainer, numbers = Trainer(), []

    class InThisProcess(contextlib.nullcontext):
        """Stands in for `Workers`."""

        def __init__(self, number):
            super().__init__(self)
            numbers.append(number)

        def train(self, configs, workdirs, *, titles, report):
            trainer(configs, workdirs, titles=titles, report=report)

    monkeypatch.setattr("sast_jax.experiments.sweep.Workers", InThisProcess)
    monkeypatch.setattr("sast_jax.experiments.sweep.load_data", lambda config: None)
    refuse = Trainer(stop_at=0)
    assert run_study(study(), [], tmp_path / "processes", processes=2, train=refuse) == straight.results
    assert sorted(trainer.trained) == sorted(straight.trained)
    assert numbers == [2]
    lines = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("sweep: ") for line in lines) == NUM_RUNS  # A line for each run.
    again = run_study(study(), [], tmp_path / "processes", processes=2, train=refuse)  # Finished: no process is started.
    assert (again, numbers) == (straight.results, [2])


@pytest.mark.slow
@needs_two_cores
@pytest.mark.usefixtures("compiled_here")
def test_sweep_of_two_processes_equals_that_of_one_and_may_grow(tmp_path, capfd):
    path, overrides = _tiny(tmp_path)
    one = run_study(path, overrides, tmp_path / "one")
    capfd.readouterr()
    two = run_study(path, overrides, tmp_path / "two", processes=2)
    assert _but_for_times(two) == _but_for_times(one)
    lines = capfd.readouterr().err.splitlines()
    assert sum(line.startswith("sweep: ") for line in lines) == 6  # A line for each run,
    assert not any("epoch" in line for line in lines)  # none for its epochs.
    assert set(two["num_cores"]) <= set(map(len, share_cores(2)))
    # A seed that is added is trained on as many cores as the others were.
    path.write_text(path.read_text().replace("seeds=(0, 1), ", "seeds=(0, 1, 2, 3), "))
    assert run_study(path, overrides, tmp_path / "two", processes=2)["num_cores"] == two["num_cores"]


_LONG = ["num_epochs=1000", "checkpoint_every_epochs=1000"]


@contextlib.contextmanager
def _long_sweep(tmp_path):
    """A sweep in a session of its own, as of a terminal, of which two runs are training; and the folders of these."""
    path, overrides = _tiny(tmp_path)
    command = [sys.executable, "-m", "sast_jax", "sweep", f"--config={path}", f"--workdir={tmp_path / 'run'}", "--processes=2"]
    command += [f"--config.{text}" for text in [*overrides, *_LONG]]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    folders = [tmp_path / f"run/selection/sast-rho{rho}-seed100" for rho in (0.1, 0.2)]
    try:
        _wait_for(lambda: all((folder / "metrics.jsonl").is_file() for folder in folders), process)
        yield process, folders
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.slow
@needs_two_cores
@pytest.mark.parametrize("to_all", [True, False], ids=["SIGINT to all", "SIGTERM to the sweep"])
def test_interrupted_processes_leave_checkpoints_and_begin_no_other_run(to_all, tmp_path):
    with _long_sweep(tmp_path) as (process, folders):
        os.killpg(process.pid, signal.SIGINT) if to_all else process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.splitlines()[-1].startswith("sast-jax: interrupted: ")
    for folder in folders:
        (checkpoint,) = (each.name for each in (folder / "checkpoints").iterdir())
        assert 0 < int(checkpoint) < 2000
        assert not (folder / "results.json").exists()
    assert {folder.name for folder in (tmp_path / "run/selection").iterdir()} == {folder.name for folder in folders}
    config = load_configs(str(folders[0] / "run.json"))[""]
    results = train_and_evaluate(config, folders[0])  # It goes on.
    lines = [json.loads(line) for line in (folders[0] / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(1, 1001))
    assert results["num_gradient_evaluations"] == 4000


@pytest.mark.slow
@needs_two_cores
@pytest.mark.parametrize("who", ["a worker", "the sweep"])
def test_killed_process_ends_the_sweep_and_a_killed_sweep_its_processes(who, tmp_path):
    with _long_sweep(tmp_path) as (process, folders):
        children = map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
        workers = [pid for pid in children if "resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_text()]
        assert len(workers) == 2
        os.kill(process.pid if who == "the sweep" else workers[-1], signal.SIGKILL)
        _, error = process.communicate(timeout=60)
        _wait_for(lambda: not any(map(_is_alive, workers)))
    if who == "a worker":
        assert process.returncode == 2
        assert "--processes: one was killed (signal 9)" in error
        assert "Traceback" not in error
        assert sum(any((folder / "checkpoints").glob("[0-9]*")) for folder in folders) == 1  # Of the other one.


def _wait_for(is_true, process=None):
    deadline = time.monotonic() + 120
    while not is_true():
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.1)


def _is_alive(pid):
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def test_more_processes_than_cores_and_processes_together_are_refused(tmp_path):
    path, overrides = _tiny(tmp_path)
    with pytest.raises(
        UserError, match=r"--processes: (must be from 1 to \d+, the number of processor cores here; got 5000|only L)"
    ):
        run_study(path, overrides, tmp_path / "run", processes=5000)
    with pytest.raises(UserError, match="--processes: not with --together, which is one process; got 2 and 3"):
        run_study(path, overrides, tmp_path / "run", processes=2, together=3)
    assert not (tmp_path / "run").exists()


# Statistics.


@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_paired_test_agrees_with_all_signs_written_out(n):
    rng = np.random.default_rng(n)
    for _ in range(5):
        a, b = rng.integers(170, 190, (2, n)) / 2
        d = a - b
        sums = [abs(np.dot(signs, d)) for signs in itertools.product((-1, 1), repeat=n)]
        test = paired_test(a, b)
        assert test["p"] == pytest.approx(np.mean(np.array(sums) >= abs(d.sum()) - 1e-9))
        assert test["p"] >= test["smallest_p"] == 2 / 2**n
        error = np.std(d, ddof=1) / np.sqrt(n)
        assert (test["mean"], test["standard_error"]) == pytest.approx((d.mean(), error))
        assert test["clear"] == (abs(d.mean()) > 2 * error)


def test_equal_values_do_not_differ():
    assert paired_test([1.0, 2.0], [1.0, 2.0]) | {"p": 1.0, "clear": False} == paired_test([1.0, 2.0], [1.0, 2.0])


# Methods and configs.

PATHS = sorted(Path("configs").glob("study_*.py"))
shipped_plan = functools.cache(load_plan)
SMALL = {
    Path("configs/study_digits_small.py"): {"dataset.downsample", "network.features"},
    Path("configs/study_nmnist_small.py"): {"dataset.downsample", "num_epochs"},
    Path("configs/study_nmnist_tuned.py"): {"dataset.downsample", "num_epochs", "optimizer.warmup"},
    Path("configs/study_gestures_tuned.py"): {"dataset.downsample", "optimizer.warmup"},
}
"""Cheaper studies, and in what their baseline differs from that of the data set, but for how often it is evaluated."""
TRAINED = [name for name, method in METHODS.items() if not method.calibrates]


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_each_method_differs_from_the_baseline_as_it_says_alone(path):
    configs = {name: flatten(load_configs(f"{path}:{name}", with_data=False)[""]) for name in TRAINED}
    baseline = configs["baseline"]
    for name, config in configs.items():
        method = METHODS[name]
        expected = dict(method.changes) | {"num_epochs": round(baseline["num_epochs"] * method.epochs)}
        differing = {key: value for key, value in config.items() if value != baseline[key]}
        assert differing == {key: value for key, value in expected.items() if value != baseline[key]}
        assert expected.keys() <= config.keys()
        assert method.reference
    variant = "small_baseline" if "dvs_gesture" in path.name else "baseline"
    name = path.name.removeprefix("study_").replace("_small", "").replace("_tuned", "")
    base = runpy.run_path(str(path.with_name(name)))["get_config"](variant)
    differing = {key for key, value in flatten(config_lib.with_defaults(base)).items() if value != baseline[key]}
    assert differing - {"evaluate_every_epochs", "checkpoint_every_epochs"} == SMALL.get(path, set())
    assert f"sast-jax sweep --config={path}" in path.read_text()


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_shipped_study_is_whole(path):
    plan = shipped_plan(path)
    left_out = METHODS.keys() - plan.study.methods.keys()
    assert list(plan.study.methods) == [name for name in METHODS if name not in left_out]
    assert not left_out or path in (Path("configs/study_nmnist_tuned.py"), Path("configs/study_gestures_tuned.py"))
    assert len(plan.study.seeds) >= 5
    for method in plan.study.methods.values():
        assert set(method.controls) <= METHODS.keys()
        if not method.calibrates and path not in SMALL:
            assert {"optimizer.learning_rate", "num_epochs"} <= method.grid.keys()
        assert "sam.rho" not in method.changes or {"sam.rho", "network.slope"} & method.grid.keys()


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_matched_controls_take_as_many_gradients(path):
    plan = shipped_plan(path)

    def cost(name):
        config = plan.configs[METHODS[name].calibrates or name]
        return config.num_epochs * (2 if config.sam.rho and config.sam.perturbation in ("independent", "same") else 1)

    for name, method in plan.study.methods.items():
        if method.controls and name not in ("baseline_twice", "straight_through_longer"):  # Which cost more, and say so.
            assert cost(name) == cost(method.controls[0]), name


@pytest.mark.parametrize("data", ["nmnist", "gestures"])
def test_best_config_is_what_the_study_recommends(data):
    path = f"configs/best_{data}.py"
    assert f"sast-jax train --config={path}" in Path(path).read_text()
    methods = json.loads(Path(f"docs/study_{data}_tuned/results.json").read_text())["methods"]
    name = recommend(methods)
    (best,), (base,) = (load_configs(each, with_data=False).values() for each in (path, f"configs/study_{data}.py:{name}"))
    assert flatten(best) == flatten(base) | methods[name]["selected"] | {"optimizer.warmup": 0.15}


def test_unknown_method_is_named():
    with pytest.raises(UserError, match="must be one of baseline, baseline_twice, sast"):
        load_configs("configs/study_digits.py:baseline_calibrated")


# Page.


def test_findings_claim_nothing_within_two_standard_errors(straight):
    results = straight.results
    row = results["methods"]["sast"]["comparisons"][0]
    assert row["control"] == "baseline_twice"
    assert row["hard"]["clear"]  # The noise of the seeds cancels.
    text = " ".join(find(results))
    assert f"higher than the first control's with: SAST, independent batch ({row['hard']['mean']:+.1f}" in text
    assert "No clear difference: surrogate-forward, twice the epochs" in text
    assert "smallest p that the exact paired test can give is 0.25" in text

    for comparison in results["methods"]["sast"]["comparisons"]:
        for what in ("hard", "gap_size"):
            comparison[what] |= {"mean": 0.5, "standard_error": 0.3, "clear": False}
    text = " ".join(find(results))
    assert "No clear difference: surrogate-forward, twice the epochs (+0.0 ± 0.0), SAST, independent batch (+0.5 ± 0.3)" in text
    assert "is not clearly different: +0.5 ± 0.3 points" in text

    for comparison in results["methods"]["sast"]["comparisons"]:
        comparison["hard"] |= {"mean": -2.0, "standard_error": 0.3, "clear": True}
    assert "It is lower with: SAST, independent batch (-2.0 ± 0.3)" in " ".join(find(results))


def test_what_is_recommended_is_cheap_and_chosen_by_validation(straight):
    results = straight.results
    methods = results["methods"]
    values = (("baseline", 1, 70, 80), ("baseline_twice", 2, 95, 96), ("sast", 2, 90, 97), ("noise", 1.2, 75, 72))
    for name, ratio, validation, hard in values:
        methods[name]["gradients_ratio"], methods[name]["validation_hard"]["mean"] = ratio, validation
        methods[name]["hard"] |= {"mean": hard, "standard_error": 0.5, "values": [hard - 1, hard, hard + 1]}
    (sentence,) = [text for text in find(results) if "on the validation part" in text]
    assert "is random weight noise (75.0 %). On the test part it reaches 72.0 ± 0.5 %" in sentence
    assert (
        "that of SAST, independent batch with hard spikes, 97.0 ± 0.5 %: a difference of -25.0 ± 0.0 points, clear." in sentence
    )
    methods["noise"]["hard"] |= {"mean": 98, "values": [97, 98, 99]}
    (sentence,) = [text for text in find(results) if "on the validation part" in text]
    assert "it reaches 98.0 ± 0.5 %, the highest mean of any method in any mode there." in sentence
    for row in methods.values():
        del row["validation_hard"]  # As of a study without a validation part.
    assert not [text for text in find(results) if "on the validation part" in text]


def test_page_shows_every_number_and_selection_and_has_its_figures(straight, tmp_path):
    results = straight.results
    write_page(results, tmp_path / "page")
    text = (tmp_path / "page" / "results.md").read_text()
    for row in results["methods"].values():
        assert row["title"] in text
        assert f"{row['hard']['mean']:.1f} ± {row['hard']['standard_error']:.1f}" in text
        assert row["reference"] in text
    assert text.count("selected |") == 2
    assert "reported by the papers" not in text
    for name in ("accuracy.png", "differences.png"):
        assert f"]({name})" in text
        assert (tmp_path / "page" / name).read_bytes().startswith(b"\x89PNG")
    results["methods"]["sast"]["reported"] = "94.7"
    assert "reported by the papers for their own network, not measured here" in render(results)


# Progress.


class Stream:
    def __init__(self, is_terminal):
        self.text, self._is_terminal = "", is_terminal

    def isatty(self):
        return self._is_terminal

    def write(self, text):
        self.text += text

    def flush(self):
        pass


@pytest.mark.parametrize("is_terminal", [True, False])
def test_board_shows_a_table_on_a_terminal_and_lines_elsewhere(is_terminal):
    stream = Stream(is_terminal)
    board = Board({"baseline": (0, 2), "sast": (4, 2)}, 8.0, stream=stream)
    board.done("sast", "sast-rho0.1-seed100", 0.5, tested=False, cost=1.0, seconds=900.0)
    board.done("sast", "sast-rho0.2-seed100", None, tested=False, cost=1.0, seconds=900.0)
    board.selected("sast", "sam.rho 0.1")
    board.done("baseline", "baseline-seed0", 0.75, tested=True, cost=1.0, seconds=0.0)  # Found finished.
    assert board.progress() == "3 of 8 runs, about 01:15 h left"
    dear = Board({"sast": (2, 1)}, 3.0, stream=Stream(False))
    dear.done("sast", "sast-seed0", 0.5, tested=True, cost=4.0, seconds=60.0)  # A costlier point than the mean was selected.
    assert dear.progress() == "1 of 3 runs, about 00:00 h left"
    last = board.table().splitlines()
    assert last[1].split() == ["baseline", "0/0", "1/2", "75.0%"]
    assert last[2].split() == ["sast", "2/4", "sam.rho", "0.1", "0/2"]
    if is_terminal:
        assert stream.text.endswith(CLEAR + board.table() + "\n")
    else:
        assert stream.text.splitlines() == [
            "sweep: 1 of 8 runs, about 01:45 h left; sast-rho0.1-seed100: 50.0% validation accuracy, hard spikes",
            "sweep: 2 of 8 runs, about 01:30 h left; sast-rho0.2-seed100: diverged",
        ]


# Real runs.


@pytest.mark.slow
def test_command_trains_selects_calibrates_and_writes_its_page(small_nmnist, tmp_path, capsys):
    path, root = tmp_path / "study.py", tmp_path / "recordings"
    shutil.copytree(small_nmnist, root)
    path.write_text(
        "import runpy\n"
        "from sast_jax.experiments import METHODS, Study, change\n"
        "def get_config(variant=''):\n"
        "    return change(runpy.run_path('configs/nmnist.py')['get_config']('baseline'), variant)\n"
        "def get_study():\n"
        "    methods = {name: METHODS[name] for name in ('baseline', 'baseline_calibrated')}\n"
        "    methods['baseline'] = methods['baseline']._replace(grid={'optimizer.learning_rate': (1e-2, 1e-3)})\n"
        "    return Study(methods, seeds=(0, 1), selection_seeds=(100,))\n"
    )
    fields = {
        "dataset.root": root, "dataset.num_time_steps": 3, "dataset.num_validation": 10, "network.kind": "mlp",
        "network.features": 8, "batch_size": 10, "num_epochs": 2,
    }  # fmt: skip
    command = ["sweep", f"--config={path}", f"--workdir={tmp_path / 'run'}", *(f"--config.{k}={v}" for k, v in fields.items())]
    assert main(command) == 0
    out = capsys.readouterr().out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    for folder in (tmp_path / "run" / "selection").iterdir():
        selection = json.loads((folder / "results.json").read_text())
        assert selection["num_test"] == 0
        assert not {"hard_accuracy", "surrogate_accuracy", "transfer_gap"} & selection.keys()
    calibrated = results["methods"]["baseline_calibrated"]
    assert calibrated["surrogate"] == results["methods"]["baseline"]["surrogate"]
    found = json.loads((tmp_path / "run/tested/baseline-seed0/calibration.json").read_text())
    assert found["split"] == "validation"
    assert found["num_calibration"] == 10
    assert calibrated["hard"]["values"][0] == pytest.approx(100 * found["methods"][found["chosen"]]["accuracy"])
    assert "Results:" in out
    root.rename(tmp_path / "moved")  # All is there: nothing is trained or read again.
    assert main(command) == 0
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == results
    assert capsys.readouterr().out == out
    # What is left to do is done on recordings that lie elsewhere by now.
    (tmp_path / "run/tested/baseline-seed0/calibration.json").unlink()
    assert main([*command, f"--config.dataset.root={tmp_path / 'moved'}"]) == 0
    again = json.loads((tmp_path / "run" / "results.json").read_text())["methods"]["baseline_calibrated"]
    assert again["hard"] == calibrated["hard"]
