"""A study's file, the fields set by hand, and what both make: a config for every run."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections

from sast_jax import config as config_lib
from sast_jax.errors import UserError, refuse
from sast_jax.experiments.study import BASELINE, Method, Study

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
            config_lib.set_field(config, key, self.study.methods[name].lengthen(value) if key == "num_epochs" else value)
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
    pairs = {name: config_lib.load_configs(f"{path}:{name}", with_data=False) for name in trained}
    refuse(
        [f"{path}: get_config({name!r}) must return one run, not several variants" for name in trained if "" not in pairs[name]]
    )
    configs = {name: pairs[name][""] for name in trained}
    flat = {name: config_lib.flatten(config) for name, config in configs.items()}
    keys = [text.partition("=")[0] for text in overrides]
    problems = [f"{key}: is set by the study" for key in keys if key in _OF_THE_STUDY]
    methods, loaded = dict(study.methods), {}
    for name in trained:
        method, config = methods[name], configs[name].copy_and_resolve_references().unlock()
        keep = frozenset(key for key in keys if name not in _targets(flat, key))
        found = config_lib.apply_overrides(config, overrides, keep=keep)
        if "num_epochs" in keys and not found:
            config.num_epochs = method.lengthen(config.num_epochs)
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
    get_study = config_lib.load_function(config_lib.find_config_file(path), "get_study")
    try:
        study = get_study()
    except (Exception, SystemExit) as error:  # A config file is code of the user's and may raise anything.
        raise UserError(f"--config: get_study() of {str(path)!r}: {type(error).__name__}: {error}") from error
    is_study = isinstance(study, Study) and isinstance(study.methods, Mapping)
    if not is_study or not all(isinstance(method, Method) for method in study.methods.values()):
        raise UserError(f"--config: get_study() of {str(path)!r} must return a sast_jax.experiments.Study of Methods by name")
    seeds = {"seeds": study.seeds, "selection_seeds": study.selection_seeds}
    problems = [f"{key}: must be a tuple; got {value!r}" for key, value in seeds.items() if not isinstance(value, Sequence)]
    problems += [
        f"{name}: {key} must have a tuple of values; got {values!r}"
        for name, method in study.methods.items()
        for key, values in method.grid.items()
        if isinstance(values, str) or not isinstance(values, Sequence)
    ]
    refuse(problems, f"{path}: {len(problems)} problem{'s' * (len(problems) > 1)} in the study")
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
