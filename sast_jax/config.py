"""Experiment configs: the fields there are, loading with overrides, and all problems at once."""

import ast
import difflib
import importlib.util
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections

from sast_jax import data, networks
from sast_jax.data import recorded
from sast_jax.errors import UserError, refuse
from sast_jax.neurons import RESETS
from sast_jax.sam import ADAPTIVE
from sast_jax.spikes import FAMILIES

SCHEDULES = ("constant", "cosine")
OPTIMIZERS = ("adam", "adamw", "sgd")


class Field(NamedTuple):
    """What a config field may hold: a type, a test of the value, both in words, and what it is where a config leaves it out."""

    type: type
    is_allowed: Callable[[Any], bool]
    allowed: str
    default: Any = None  # None: it must be there.

    def or_else(self, default: Any) -> "Field":
        """Returns the field that may be left out, as a config of an earlier version does."""
        return self._replace(default=default)


def _integer(low: int, high: float = math.inf) -> Field:
    return Field(int, lambda v: low <= v <= high, f"an integer {_range(low, high)}")


def _number(low: float, high: float = math.inf, *, above: bool = False) -> Field:
    return Field(
        float,
        lambda v: math.isfinite(v) and (low < v if above else low <= v) and v <= high,
        f"a finite number above {low}" if above else f"a finite number {_range(low, high)}",
    )


def _range(low: float, high: float) -> str:
    return f">= {low}" if high == math.inf else f"from {low} to {high}"


def _choice(*names: str) -> Field:
    return Field(str, lambda v: v in names, f"one of {', '.join(names)}")


MAX_SIZE = 65_536

_FLAG = Field(bool, lambda v: True, "true or false")
_TEXT = Field(str, lambda v: True, "text")
_SIZES = Field(tuple, lambda v: all(type(n) is int and 1 <= n <= MAX_SIZE for n in v), "integers from 1 to 65536, as 12,32")

MAX_SEED = 2**32 - 1

SCHEMA: dict[str, Field] = {
    "dataset.name": _choice(*data.DATASETS),
    "dataset.root": _TEXT,
    "dataset.download": _FLAG,
    "dataset.num_time_steps": _integer(1, 10_000),
    "dataset.binary": _FLAG,
    "dataset.num_validation": _integer(0),
    "dataset.num_test": _integer(0),
    "dataset.seed": _integer(0, MAX_SEED),
    "network.kind": _choice(*networks.NETWORKS),
    "network.features": _SIZES,
    "network.kernel_size": _integer(1, 99),
    "network.pool_size": _integer(1, 99),
    "network.decay": _number(0, 1),
    "network.threshold": _number(0, above=True),
    "network.reset": _choice(*RESETS),
    "network.family": _choice(*FAMILIES),
    "network.slope": _number(0, above=True),
    "network.readout": _choice(*networks.READOUTS),
    "network.readout_decay": _number(0, 1),
    "network.init_gain": _number(0, above=True),
    "mode": _choice("surrogate", "straight_through"),
    "warm_start": _TEXT.or_else(""),
    "sam.rho": _number(0),
    "sam.perturbation": _choice("independent", "same"),
    "sam.perturbation_batch_size": _integer(0),
    "sam.adaptive": _choice("none", *ADAPTIVE),
    "sam.every_steps": _integer(1),
    "sam.start": _number(0, 1),
    "optimizer.name": _choice(*OPTIMIZERS),
    "optimizer.learning_rate": _number(0, above=True),
    "optimizer.schedule": _choice(*SCHEDULES),
    "optimizer.weight_decay": _number(0),
    "batch_size": _integer(1),
    "num_microbatches": _integer(1),
    "num_epochs": _integer(1),
    "evaluate_every_epochs": _integer(1),
    "checkpoint_every_epochs": _integer(1),
    "seed": _integer(0, MAX_SEED),
}
"""Every field of a config, by its path."""

_VARIANTS = "variants"


def load_configs(spec: str, overrides: Sequence[str] = (), *, with_data: bool = True) -> dict[str, ml_collections.ConfigDict]:
    """Loads a config file, applies overrides and checks the result.

    A file defines `get_config(variant="")`. If the config has a field `variants`, it stands for these variants together
    (as baseline and SAST), and an override does not touch a field in which a variant differs from the rest:
    `sam.rho` of a baseline stays 0.

    Args:
        spec: `FILE` or `FILE:variant`.
        overrides: `section.key=value`, later ones win.
        with_data: Whether to look if the data folder is there.

    Returns:
        Locked configs by the name of the variant; the name is empty for a single config.

    Raises:
        UserError: Listing every problem.
    """
    path, _, variant = spec.rpartition(":") if not Path(spec).exists() and ":" in spec else (spec, "", "")
    get_config = _load_get_config(Path(path))
    base, variants = _call(get_config, variant, path)
    configs, problems = {}, []
    for name in variants:
        config = _call(get_config, name, path)[0] if name else base
        own = frozenset(key for key, value in flatten(config).items() if name and flatten(base).get(key) != value)
        found = apply_overrides(config, overrides, keep=own) + find_problems(config, with_data=with_data)
        problems += [problem for problem in found if problem not in problems]
        configs[name] = config.lock()
    refuse(problems, f"{spec}: {len(problems)} problem{'s' * (len(problems) > 1)} in the config")
    return configs


def _load_get_config(path: Path) -> Callable[..., ml_collections.ConfigDict]:
    if not path.is_file():
        raise UserError(f"--config: there is no file {str(path)!r}; give --config=FILE.py or --config=FILE.py:variant")
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if path.suffix != ".py" or spec is None or spec.loader is None:
        raise UserError(f"--config: {str(path)!r} is no Python file; it must end in .py and define get_config(variant='')")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # A config file is code of the user's and may raise anything.
        raise UserError(f"--config: {str(path)!r} could not be run: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, "get_config", None)):
        raise UserError(f"--config: {str(path)!r} does not define get_config(variant='')")
    return module.get_config


def _call(get_config, variant: str, path: str) -> tuple[ml_collections.ConfigDict, tuple[str, ...]]:
    """Returns a config without its field `variants`, and that field."""
    try:
        config = get_config(variant)
        if isinstance(config, ml_collections.ConfigDict):
            flatten(config)  # Reads every field: a placeholder that must be filled and is not raises here.
    except Exception as error:
        raise UserError(f"--config: {path!r} with variant {variant!r}: {type(error).__name__}: {error}") from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(f"--config: get_config of {path!r} must return an ml_collections.ConfigDict; got {type(config).__name__}")
    config = with_defaults(_with_tuples(config.copy_and_resolve_references().unlock()))
    variants = tuple(config.get(_VARIANTS, ())) or ("",)
    if _VARIANTS in config:
        del config[_VARIANTS]
    return config, variants


def flatten(config: ml_collections.ConfigDict | dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of a config by their dotted paths."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, ml_collections.ConfigDict | dict):
            flat |= {f"{key}.{inner}": v for inner, v in flatten(value).items()}
        else:
            flat[str(key)] = value
    return flat


def to_json(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Returns a config as a dict of JSON values (tuples become lists); `from_json` is its inverse."""
    return json.loads(json.dumps(config.to_dict()))


def from_json(value: dict[str, Any], *, heading: str = "") -> ml_collections.ConfigDict:
    """Returns the locked config of `to_json`'s dict; `heading` says where it comes from if it has problems.

    Raises:
        UserError: Listing every problem.
    """
    config = with_defaults(_with_tuples(ml_collections.ConfigDict(value)))
    refuse(find_problems(config, with_data=False), heading)
    return config.lock()


def _with_tuples(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    for key, value in flatten(config).items():
        if isinstance(value, list):
            _set(config, key, tuple(value))
    return config


def with_defaults(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Sets the fields that a config leaves out and may leave out, and returns it."""
    present = flatten(config)
    for key, field in SCHEMA.items():
        if field.default is not None and key not in present and key.partition(".")[0] not in present:
            _set(config, key, field.default)
    return config


def apply_overrides(
    config: ml_collections.ConfigDict, overrides: Sequence[str], *, keep: frozenset[str] = frozenset()
) -> list[str]:
    """Sets fields of `config` from texts `section.key=value`, except those in `keep`; returns the problems."""
    problems = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if key not in SCHEMA:
            problems.append(_unknown(key))
        elif not equals:
            problems.append(f"{key}: has no value; write --config.{key}=VALUE")
        elif key not in keep:
            try:
                _set(config, key, _parse(SCHEMA[key], text))
            except (ValueError, SyntaxError, TypeError):
                problems.append(f"{key}: must be {SCHEMA[key].allowed}; got {text!r}")
    return problems


def _set(config, key, value):
    section, _, name = key.rpartition(".")
    target = config
    for part in section.split(".") if section else ():
        if not isinstance(target.get(part), ml_collections.ConfigDict):
            if part in target:
                del target[part]
            target[part] = ml_collections.ConfigDict()
        target = target[part]
    if name in target:
        del target[name]  # Or ConfigDict would cast the value to the type of the old one.
    target[name] = value


def _parse(field: Field, text: str) -> Any:
    if field.type is str:
        return text
    if field.type is bool:
        return {"true": True, "false": False, "1": True, "0": False}.get(text.lower(), text)
    if field.type is tuple:
        value = ast.literal_eval(text)
        return tuple(value) if isinstance(value, tuple | list) else (value,)
    return field.type(text)


def _unknown(key: str) -> str:
    close = difflib.get_close_matches(key, SCHEMA, n=1) or [k for k in SCHEMA if k.rpartition(".")[2] == key.rpartition(".")[2]]
    return f"{key}: there is no such field" + (f"; did you mean {close[0]}?" if close else f"; fields are {', '.join(SCHEMA)}")


def find_problems(config: ml_collections.ConfigDict, *, with_data: bool = True) -> list[str]:
    """Returns all that is wrong with a config, a line each; `with_data` also looks whether its data folder is there."""
    flat = flatten(config)
    problems = [_unknown(key) for key in flat if key not in SCHEMA]
    for key, field in SCHEMA.items():
        if key not in flat:
            problems.append(f"{key}: is missing; it must be {field.allowed}")
        elif not _fits(field, flat[key]):
            problems.append(f"{key}: must be {field.allowed}; got {flat[key]!r}")
    problems = problems or _find_conflicts(config, flat)
    name, root, download = (flat.get(f"dataset.{key}") for key in ("name", "root", "download"))
    if with_data and name == "nmnist" and type(root) is str and download is False:
        try:
            recorded.find_nmnist(root, download=False)
        except UserError as error:
            problems.append(str(error))
    return problems


def _fits(field: Field, value: Any) -> bool:
    types = (int, float) if field.type is float else (field.type,)
    return type(value) in types and bool(field.is_allowed(value))


def _find_conflicts(config, flat):
    problems = []
    if config.network.kind == "conv" and not config.network.features:
        problems.append("network.features: a conv network needs at least one convolution; got none")
    if config.network.kind == "conv" and min(data.SENSOR_SIZE) < config.network.pool_size ** len(config.network.features):
        problems.append(
            f"network.pool_size: {config.network.pool_size}, {len(config.network.features)} times over, leaves nothing of "
            f"{min(data.SENSOR_SIZE)} pixels; take a smaller one, or fewer network.features"
        )
    if config.dataset.name == "nmnist" and config.dataset.num_test:
        problems.append(f"dataset.num_test: nmnist brings its own test part, so it must be 0; got {config.dataset.num_test}")
    if config.dataset.name == "digits" and config.dataset.num_test < 1:
        problems.append("dataset.num_test: digits needs at least 1 test sample; got 0")
    if config.optimizer.weight_decay and config.optimizer.name != "adamw":
        problems.append(
            f"optimizer.weight_decay: only adamw has one; got {config.optimizer.weight_decay} with {config.optimizer.name!r}"
        )
    for key in ("batch_size", "sam.perturbation_batch_size"):
        if flat[key] % config.num_microbatches:
            problems.append(f"{key}: must be a multiple of num_microbatches, {config.num_microbatches}; got {flat[key]}")
    if config.sam.perturbation == "same" and config.sam.perturbation_batch_size:
        problems.append(
            "sam.perturbation_batch_size: the same batch has the size of the descent batch, so it must be 0; got "
            f"{config.sam.perturbation_batch_size}"
        )
    return problems
