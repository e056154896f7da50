"""From a study to its results: all runs, selection on the validation part, one look at the test part."""

import contextlib
import functools
import importlib.util
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sast_jax import config as config_lib
from sast_jax.errors import Diverged, UserError, refuse, warn
from sast_jax.evaluation.calibration import evaluate_calibration
from sast_jax.experiments.board import Board
from sast_jax.experiments.comparison import compare
from sast_jax.experiments.plan import load_plan
from sast_jax.experiments.study import BASELINE
from sast_jax.files import local_path, only_process, write_json
from sast_jax.training import train_many
from sast_jax.training.build import load_data, num_gradients
from sast_jax.training.processes import Workers, share_cores
from sast_jax.training.records import CALIBRATION, DIVERGED, RESULTS, RUN, RUNS, STUDY, read_record
from sast_jax.training.run import MAY_MOVE, load_run_and_data
from sast_jax.training.together import default_together

_STEPS_OF_AN_EPOCH = 100  # Costs are compared before the data, and with them the number of steps, are known.

Train = Callable[..., list[Any]]


def run_study(
    path: Path,
    overrides: Sequence[str],
    workdir: Path,
    *,
    together: int | None = None,
    processes: int = 1,
    train: Train = train_many,
) -> dict[str, Any]:
    """Trains what is not trained yet, selects, tests and compares.

    For each method all points of its grid are trained with the selection seeds, without the test part; the point of the highest
    mean hard-spike accuracy on the validation part, the first of equals, is trained with the other seeds and tested. A run that
    diverged while selecting counts as trained; without its `diverged.json` it is trained again.

    Args:
        path: File of the study; see `load_plan`.
        overrides: `section.key=value`.
        workdir: Folder of the study; each run has a folder of its own in `selection/` or `tested/`.
        together: Number of runs that are trained as one program, at most; `None`: on a CPU one, else as many as fit in memory.
        processes: Number of runs that are trained side by side, each in a process and on cores of its own, so that times are
            those of fewer cores; see `Workers`. 1: in this process.
        train: What trains runs in this process, as `train_many`.

    Returns:
        What `results.json` of the folder holds.

    Raises:
        UserError: If the study is wrong, the folder belongs to another one, or a tested run fails.
        Interrupted: On SIGINT or SIGTERM; the same call goes on.
    """
    if importlib.util.find_spec("matplotlib") is None:
        warn('figures need matplotlib, so the results page will fail: pip install "sast_jax[plots]" now or before the end')
    path, workdir = local_path(path, "--config"), local_path(workdir, "--workdir")
    plan = load_plan(path, overrides)
    _refuse_other(workdir)
    if processes > 1:
        _refuse_processes(processes, together)
    if not (workdir / RESULTS).exists():  # Afterwards the recordings may be gone.
        refuse(config_lib.find_problems(plan.configs[BASELINE]))
    with only_process(workdir), contextlib.ExitStack() as ending:
        _register(workdir, plan)

        @functools.cache
        def start_workers():
            load_data(plan.configs[BASELINE])  # Once, into the cache, before all processes ask for it.
            return ending.enter_context(Workers(processes))

        sweep = _Sweep(plan, workdir, together, train, start_workers if processes > 1 else None)
        selection = sweep.select()
        tested = sweep.test({name: rows[0]["values"] if rows else {} for name, rows in selection.items()})
        results = compare(path.stem, overrides, plan.study, selection, tested)
        write_json(workdir / RESULTS, results)
    return results


def _refuse_processes(processes, together):
    if together:
        raise UserError(f"--processes: not with --together, which is one process; got {processes} and {together}")
    if jax.default_backend() != "cpu":
        raise UserError(f"--processes: a {jax.default_backend()} belongs to one process; use --together, or JAX_PLATFORMS=cpu")
    share_cores(processes)


def _refuse_other(workdir):
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir: {str(workdir)!r} is a file; give a folder, new or of a study to go on with")
    others = [name for name in (RUN, RUNS, RESULTS) if (workdir / name).exists()]
    if others and not (workdir / STUDY).exists():
        raise UserError(f"--workdir: {str(workdir)!r} has {others[0]} but no {STUDY}, so it is of something else; choose another")


def _fixed_fields(config):
    return {key: value for key, value in config_lib.flatten(config_lib.to_json(config)).items() if key not in MAY_MOVE}


def _describe(plan):
    return {
        name: {
            "grid": {key: list(values) for key, values in plan.study.methods[name].grid.items()},
            "config": _fixed_fields(config),
        }
        for name, config in plan.configs.items()
    }


def _register(workdir, plan):
    """Writes what the study is, or checks it against what is written; methods and seeds may be added."""
    common = {"selection_seeds": list(plan.study.selection_seeds), "folds": plan.study.folds}
    new = {**common, "methods": _describe(plan)}
    old = read_record(workdir / STUDY)
    if old is not None:
        # Fields that a later version brought.
        defaults = {
            f"config.{key}": list(field.default) if isinstance(field.default, tuple) else field.default
            for key, field in config_lib.SCHEMA.items()
            if field.default is not None and key not in MAY_MOVE
        }
        before = {name: defaults | config_lib.flatten(method) for name, method in old["methods"].items()}
        old_common = {"selection_seeds": old["selection_seeds"], "folds": old.get("folds", 0)}
        differing = [
            f"{key}: the study there has {old_common[key]}, this one {common[key]}"
            for key in common
            if old_common[key] != common[key]
        ]
        for name in sorted(before.keys() & plan.configs.keys()):
            a, b = before[name], config_lib.flatten(new["methods"][name])
            differing += [
                f"{name}: {key.removeprefix('config.')}: the study there has {a.get(key)!r}, this one {b.get(key)!r}"
                for key in sorted(a.keys() | b.keys())
                if a.get(key) != b.get(key)
            ]
        refuse(differing, f"--workdir: {str(workdir)!r} is another study; choose another folder, or the study that it is of:")
        new["methods"] = {**old["methods"], **new["methods"]}
    write_json(workdir / STUDY, new)


def _label(point):
    return ", ".join(f"{key} {value}" for key, value in point.items())


class _Sweep:
    """Runs of a plan in a folder."""

    def __init__(self, plan, workdir, together, train, start_workers):
        self._plan, self._workdir = plan, workdir
        self._together, self._start_workers = together, start_workers
        self._train = functools.partial(train, together=together)
        study = plan.study
        planned = {
            name: (len(points) * len(study.selection_seeds) if len(points := plan.points(name)) > 1 else 0, len(study.seeds))
            for name in plan.configs
        }
        cost = sum(
            sum(self._cost(plan.config(name, point, {})) for point in plan.points(name)) * num / len(plan.points(name))
            for name, nums in planned.items()
            for num in nums
        )
        self.board = Board(planned, cost)

    @staticmethod
    def _cost(config):
        return num_gradients(config, config.num_epochs * _STEPS_OF_AN_EPOCH)

    def _run(self, batches, finish=lambda name, runs: None):
        """Results by folder of runs given by method and folder, `None` for one that diverged, which is not trained again.

        A batch is what one program may train. Batches are trained in their order, or, by several processes, all at once. After
        each `finish` is called with its method and its results.
        """
        results, start = {}, time.monotonic()
        runs = [[(name, folder, config) for folder, config in configs.items()] for name, configs in batches]
        batch_of = {folder: batch for batch in batches for folder in batch[1]}
        for group in [list(itertools.chain(*runs))] if self._start_workers and runs else runs:
            workdirs = [self._workdir / folder for _, folder, _ in group]
            left = [index for index, workdir in enumerate(workdirs) if not (workdir / DIVERGED).exists()]
            was_finished = [index not in left or (workdir / RESULTS).exists() for index, workdir in enumerate(workdirs)]

            def report(index, result, group=group, was_finished=was_finished):
                nonlocal start
                name, folder, config = group[index]
                if isinstance(result, Diverged):
                    if config.test:
                        raise result
                    write_json(self._workdir / folder / DIVERGED, {"message": str(result)})
                    result = None
                results[folder] = result
                accuracy = (result if config.test else result["validation"])["hard_accuracy"] if result else None
                seconds = 0.0 if was_finished[index] else time.monotonic() - start
                self.board.done(name, folder, accuracy, tested=config.test, cost=self._cost(config), seconds=seconds)
                start = time.monotonic()
                folders = batch_of[folder][1]
                if results.keys() >= folders.keys():
                    finish(name, [results[each] for each in folders])

            train = self._start_workers().train if self._start_workers and not all(was_finished) else self._train
            for index in sorted(set(range(len(group))) - set(left)):
                report(index, None)
            train(
                [group[index][2] for index in left],
                [workdirs[index] for index in left],
                titles=[group[index][1].partition("/")[2] for index in left],
                report=lambda number, result, left=left, report=report: report(left[number], result),
            )
        return results

    def select(self):
        """Rows of the points of each method's grid, the selected one first; none if there is nothing to select."""
        study, batches, rows = self._plan.study, [], {}
        for name in self._plan.configs:
            points = self._plan.points(name)
            if len(points) == 1:
                rows[name] = [{"values": points[0]}] if points[0] else []
                continue
            configs = {}
            for point in points:
                words = "-".join(f"{key.rpartition('.')[2]}{value}" for key, value in point.items())
                for number, seed in enumerate(study.selection_seeds):
                    config = self._plan.config(name, point, {"seed": seed, "test": False, **study.fold(number)})
                    configs[f"selection/{name}-{words}-seed{seed}"] = config
            batches.append((name, configs))
        self._run(batches, lambda name, runs: rows.update({name: self._rank(name, runs)}))
        return {name: rows[name] for name in self._plan.configs}

    def _rank(self, name, runs):
        num_seeds, rows = len(self._plan.study.selection_seeds), []
        for number, point in enumerate(self._plan.points(name)):
            row = {"values": point}
            for mode in ("hard", "surrogate"):
                own = runs[number * num_seeds : (number + 1) * num_seeds]
                values = [100 * run["validation"][f"{mode}_accuracy"] if run else None for run in own]
                row[mode] = values
                row[f"mean_{mode}"] = None if None in values else float(np.mean(values))
            rows.append(row)
        if all(row["mean_hard"] is None for row in rows):
            raise UserError(f"{name}: training diverged at all points of its grid; lower optimizer.learning_rate or sam.rho")
        best = max(rows, key=lambda row: (row["mean_hard"] is not None, round(row["mean_hard"] or 0.0, 6)))
        self.board.selected(name, _label(best["values"]))
        return [best, *(row for row in rows if row is not best)]

    def test(self, selected):
        """Results by method and seed; methods take turns, so that a ratio of times compares neighbours."""
        study = self._plan.study
        size = self._together or default_together() or len(study.seeds)
        batches = []
        for first in range(0, len(study.seeds), size):
            for name, point in selected.items():
                configs = {
                    f"tested/{name}-seed{seed}": self._plan.config(name, point, {"seed": seed, **study.fold(first + number)})
                    for number, seed in enumerate(study.seeds[first : first + size])
                }
                batches.append((name, configs))
        runs = self._run(batches)
        results = {name: [runs[f"tested/{name}-seed{seed}"] for seed in study.seeds] for name in selected}
        for name, method in study.methods.items():
            if method.calibrates:
                folders = [self._workdir / f"tested/{method.calibrates}-seed{seed}" for seed in study.seeds]
                results[name] = list(map(self._calibrate, folders, results[method.calibrates]))
        return {name: results[name] for name in study.methods}

    def _calibrate(self, folder, parent):
        """Results of a run whose hard network is calibrated on its validation part, in the way of the lowest loss there."""
        found = read_record(folder / CALIBRATION)
        if found is None:
            fields = config_lib.flatten(self._plan.configs[BASELINE])
            run, _, splits = load_run_and_data(folder, [f"{key}={fields[key]}" for key in MAY_MOVE])
            start = time.monotonic()
            found = evaluate_calibration(run.network, run.params, splits.validation, splits.test)
            found["seconds"] = time.monotonic() - start
            write_json(folder / CALIBRATION, found)
        hard = found["methods"][found["chosen"]]["accuracy"]
        return {
            **parent,
            "hard_accuracy": hard,
            "transfer_gap": parent["surrogate_accuracy"] - hard,
            "wall_time_seconds": parent["wall_time_seconds"] + found["seconds"],
            "calibration": found["chosen"],
        }
