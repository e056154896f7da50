"""From a study to its results: all runs, selection on the validation part, one look at the test part."""

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from sast_jax import config as config_lib
from sast_jax.errors import Diverged, UserError, refuse
from sast_jax.evaluation.calibration import evaluate_calibration
from sast_jax.experiments.board import Board
from sast_jax.experiments.statistics import paired_test, summarize
from sast_jax.experiments.study import BASELINE, Method, Study
from sast_jax.files import only_process, write_json
from sast_jax.training import load_run, train_many
from sast_jax.training.build import costs_a_gradient, load_data
from sast_jax.training.processes import Workers, share_cores
from sast_jax.training.run import MAY_MOVE, RESULTS, RUN, RUNS, read_json
from sast_jax.training.together import default_together

STUDY, CALIBRATION = "study.json", "calibration.json"

Train = Callable[..., list[Any]]

_OF_THE_STUDY = ("seed", "test", "dataset.fold")


class Plan(NamedTuple):
    """A study with its configs.

    Attributes:
        study: The study; grids without the fields that were set by hand.
        configs: Config by name of each method that is trained.
    """

    study: Study
    configs: dict[str, ml_collections.ConfigDict]

    def points(self, name: str) -> list[dict[str, Any]]:
        """Returns the combinations of a method's grid; one, empty, if nothing is selected."""
        grid = self.study.methods[name].grid
        return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]

    def config(self, name: str, point: dict[str, Any], fields: dict[str, Any]) -> ml_collections.ConfigDict:
        """Returns the locked config of a method at a point of its grid, with further fields."""
        config = ml_collections.ConfigDict(self.configs[name].to_dict())
        for key, value in (point | fields).items():
            config_lib.set_field(config, key, value * self.study.methods[name].epochs if key == "num_epochs" else value)
        return config.lock()


def load_plan(path: Path, overrides: Sequence[str] = ()) -> Plan:
    """Loads a study's file, which defines `get_study()` and, for each method, `get_config(name)`.

    An override sets a field of all methods but those that differ from the baseline in it; if it is 0 in the baseline, so off,
    of those that have it on (`sam.rho` of all that use SAM). Where it is set it is not selected any more. Epochs are those of
    the baseline; a method keeps its factor.

    Raises:
        UserError: Listing every problem.
    """
    study = _load_study(path)
    trained = [name for name, method in study.methods.items() if not method.calibrates]
    configs = {name: config_lib.load_configs(f"{path}:{name}", with_data=False)[""] for name in trained}
    flat = {name: config_lib.flatten(config) for name, config in configs.items()}
    keys = [text.partition("=")[0] for text in overrides]
    problems = [f"{key}: is set by the study" for key in keys if key in _OF_THE_STUDY]
    methods, loaded = dict(study.methods), {}
    for name in trained:
        method, config = methods[name], configs[name].copy_and_resolve_references().unlock()
        keep = frozenset(key for key in keys if name not in _targets(flat, key))
        found = config_lib.apply_overrides(config, overrides, keep=keep)
        if "num_epochs" in keys and not found:
            config.num_epochs *= method.epochs
        grid = {key: values for key, values in method.grid.items() if key in keep or key not in keys}
        methods[name], loaded[name] = method._replace(grid=grid), config
        found = found or config_lib.find_problems(config, with_data=False)
        problems += [problem for problem in found if problem not in problems]
    plan = Plan(study._replace(methods=methods), loaded)
    if not problems:
        for name in trained:
            for point in plan.points(name):
                found = config_lib.find_problems(plan.config(name, point, {"test": False}), with_data=False)
                problems += [problem for each in found if (problem := f"{name}: {each}") not in problems]
    refuse(problems, f"{path}: {len(problems)} problem{'s' * (len(problems) > 1)} in the study")
    return plan


def _targets(configs, key):
    """Names of the methods that an override of a field is meant for, given their fields."""
    common = configs[BASELINE].get(key)
    differing = {name for name, config in configs.items() if config.get(key) != common and key != "num_epochs"}
    return differing if differing and common == 0 else configs.keys() - differing


def _load_study(path):
    get_study = config_lib.load_function(path, "get_study")
    try:
        study = get_study()
    except Exception as error:  # A config file is code of the user's and may raise anything.
        raise UserError(f"--config: get_study() of {str(path)!r}: {type(error).__name__}: {error}") from error
    is_study = isinstance(study, Study) and all(isinstance(method, Method) for method in study.methods.values())
    if not is_study:
        raise UserError(f"--config: get_study() of {str(path)!r} must return a sast_jax.experiments.Study of Methods")
    seeds = {"seeds": study.seeds, "selection_seeds": study.selection_seeds}
    problems = [
        f"{key}: must be different integers from 0 to {config_lib.MAX_SEED}; got {value!r}"
        for key, value in seeds.items()
        if len(set(value)) != len(value) or not all(type(seed) is int and 0 <= seed <= config_lib.MAX_SEED for seed in value)
    ]
    common = sorted(set(study.seeds) & set(study.selection_seeds))
    problems += [f"selection_seeds: {common} are also tested; a seed may do one of both"] * bool(common)
    problems += [f"folds: must be 0 (none) or an integer from 2; got {study.folds!r}"] * (
        type(study.folds) is not int or study.folds < 0 or study.folds == 1
    )
    problems += [f"seeds: {len(study.seeds)} cannot be tested equally often on {study.folds} folds; take a multiple"] * (
        not problems and bool(study.folds) and len(study.seeds) % study.folds > 0
    )
    problems += ["seeds: at least 2 are needed for a standard error"] * (len(study.seeds) < 2)
    problems += [f"methods: there must be one called {BASELINE!r}"] * (BASELINE not in study.methods)
    for name, method in study.methods.items():
        problems += [f"methods: {name!r} is no name of a folder"] * (not config_lib.is_name(name))
        problems += [f"{name}: there is no field {key!r}" for key in method.grid if key not in config_lib.SCHEMA]
        problems += [f"{name}: {key} has no values" for key, values in method.grid.items() if not values]
        problems += [f"{name}: {key} is set by the study" for key in method.grid if key in _OF_THE_STUDY]
        problems += [f"{name}: selects, so there must be selection_seeds"] * bool(method.grid and not study.selection_seeds)
        parent = study.methods.get(method.calibrates)
        problems += [f"{name}: calibrates {method.calibrates!r}, which is no trained method of the study"] * bool(
            method.calibrates and (parent is None or parent.calibrates)
        )
        problems += [f"{name}: calibrates, so it selects nothing itself"] * bool(method.calibrates and method.grid)
    refuse(problems, f"{path}: {len(problems)} problem{'s' * (len(problems) > 1)} in the study")
    return study


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
    mean hard-spike accuracy on the validation part, the first of equals, is trained with the other seeds and tested.

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
    plan = load_plan(path, overrides)
    _refuse_other(workdir)
    if processes > 1:
        _refuse_processes(processes, together)
    if not (workdir / RESULTS).exists():  # Afterwards the recordings may be gone.
        refuse(config_lib.find_problems(plan.configs[BASELINE]))
    with only_process(workdir), contextlib.ExitStack() as ending:
        _register(workdir, plan)
        workers = None
        if processes > 1 and not (workdir / RESULTS).exists():
            load_data(plan.configs[BASELINE])  # Once, into the cache, before all processes ask for it.
            workers = ending.enter_context(Workers(processes))
        sweep = _Sweep(plan, workdir, together or default_together(), train, workers)
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
    old = read_json(workdir / STUDY)
    if old is not None:
        # Fields that a later version brought.
        defaults = {
            f"config.{key}": list(field.default) if isinstance(field.default, tuple) else field.default
            for key, field in config_lib.SCHEMA.items()
            if field.default is not None and key not in MAY_MOVE
        }
        try:
            before = {name: defaults | config_lib.flatten(method) for name, method in old["methods"].items()}
            old_common = {"selection_seeds": old["selection_seeds"], "folds": old.get("folds", 0)}
        except (TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{workdir / STUDY}: is damaged or not of sast-jax; choose another --workdir") from error
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

    def __init__(self, plan, workdir, together, train, workers):
        self._plan, self._workdir = plan, workdir
        self._together, self._workers = together, workers
        self._train = workers.train if workers else functools.partial(train, together=together)
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
        return config.num_epochs * (1 + costs_a_gradient(config))

    def _run(self, batches, finish=lambda name, runs: None):
        """Results by folder of runs given by method and folder, `None` for one that diverged.

        A batch is what one program may train. Batches are trained in their order, or, by several processes, all at once. After
        each `finish` is called with its method and its results.
        """
        results, start = {}, time.monotonic()
        runs = [[(name, folder, config) for folder, config in configs.items()] for name, configs in batches]
        batch_of = {folder: batch for batch in batches for folder in batch[1]}
        for group in [list(itertools.chain(*runs))] if self._workers and runs else runs:
            was_finished = [(self._workdir / folder / RESULTS).exists() for _, folder, _ in group]

            def report(index, result, group=group, was_finished=was_finished):
                nonlocal start
                name, folder, config = group[index]
                if isinstance(result, Diverged) and config.test:
                    raise result
                results[folder] = result = None if isinstance(result, Diverged) else result
                accuracy = (result if config.test else result["validation"])["hard_accuracy"] if result else None
                seconds = 0.0 if was_finished[index] else time.monotonic() - start
                self.board.done(name, folder, accuracy, tested=config.test, cost=self._cost(config), seconds=seconds)
                start = time.monotonic()
                folders = batch_of[folder][1]
                if results.keys() >= folders.keys():
                    finish(name, [results[each] for each in folders])

            _, folders, configs = zip(*group, strict=True)
            self._train(
                configs,
                [self._workdir / folder for folder in folders],
                titles=[folder.partition("/")[2] for folder in folders],
                report=report,
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
        size = self._together or len(study.seeds)
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

    @staticmethod
    def _calibrate(folder, parent):
        """Results of a run whose hard network is calibrated on its validation part, in the way of the lowest loss there."""
        found = read_json(folder / CALIBRATION)
        if found is None:
            run, start = load_run(folder), time.monotonic()
            splits = load_data(run.config)
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


def compare(
    name: str,
    overrides: Sequence[str],
    study: Study,
    selection: dict[str, list[dict[str, Any]]],
    tested: dict[str, list[dict[str, Any]]],
) -> dict[str, Any]:
    """Returns means, standard errors, costs and paired tests of the runs of a study.

    Args:
        name: Name of the study.
        overrides: What was set by hand.
        study: The study.
        selection: Rows of each trained method's grid, the selected one first.
        tested: Results of the runs of each method, in the order of the seeds.

    Returns:
        Accuracies in percent, gaps in points; costs also as ratios to the baseline, that of time the median over seeds.
    """
    methods: dict[str, Any] = {}
    for key, runs in tested.items():
        method = study.methods[key]
        methods[key] = {
            "title": method.title,
            "reference": method.reference,
            "reported": method.reported,
            "selected": selection[method.calibrates or key][0]["values"] if selection[method.calibrates or key] else {},
            "surrogate": summarize([100 * run["surrogate_accuracy"] for run in runs]),
            "hard": summarize([100 * run["hard_accuracy"] for run in runs]),
            "gap": summarize([100 * run["transfer_gap"] for run in runs]),
            "gap_size": summarize([100 * abs(run["transfer_gap"]) for run in runs]),
            "gradient_evaluations": summarize([run["num_gradient_evaluations"] for run in runs]),
            "seconds": summarize([run["wall_time_seconds"] for run in runs]),
        }
        if method.calibrates:
            methods[key]["calibration"] = [run["calibration"] for run in runs]
        elif all(run.get("validation") for run in runs):  # Thresholds are fitted to it.
            methods[key]["validation_hard"] = summarize([100 * run["validation"]["hard_accuracy"] for run in runs])
    baseline = methods[BASELINE]

    def costs(row, control):
        return {
            "gradients_ratio": row["gradient_evaluations"]["mean"] / control["gradient_evaluations"]["mean"],
            "time_ratio": float(np.median(np.divide(row["seconds"]["values"], control["seconds"]["values"]))),
        }

    for key, row in methods.items():
        row |= costs(row, baseline)
        row["comparisons"] = [
            {
                "control": control,
                **costs(row, methods[control]),
                **{
                    what: paired_test(row[what]["values"], methods[control][what]["values"])
                    for what in ("hard", "gap_size", "surrogate")
                },
            }
            for control in study.methods[key].controls
            if control in methods
        ]
    one = tested[BASELINE][0]
    return {
        "name": name,
        "question": study.question,
        "overrides": [text for text in overrides if text.partition("=")[0] not in MAY_MOVE],
        "seeds": list(study.seeds),
        "selection_seeds": list(study.selection_seeds),
        "folds": study.folds,
        "data": {key: one[key] for key in ("num_train", "num_validation", "num_test")},
        "environment": one["environment"],
        "num_cores": sorted({run["environment"]["num_cores"] for runs in tested.values() for run in runs}),
        "methods": methods,
        "selection": {key: rows for key, rows in selection.items() if rows},
    }
