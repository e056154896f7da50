"""Experiment configs: the fields there are, loading with overrides, and all problems at once."""

import difflib
import functools
import json
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from sast_jax import data, networks
from sast_jax.data import recorded
from sast_jax.errors import UserError, refuse, warn
from sast_jax.files import local_path, read_json
from sast_jax.neurons import RESETS
from sast_jax.sharpness import ADAPTIVE, ASCENTS
from sast_jax.spikes import FAMILIES
from sast_jax.theory.neuron import max_current

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


MAX_INTEGER = 2**31 - 1
"""The largest step that an int32 counts."""

MAX_NUMBER = 3e38
"""What float32 can hold."""


def _integer(low: int, high: int = MAX_INTEGER) -> Field:
    return Field(int, lambda v: low <= v <= high, f"an integer from {low} to {high}")


def _number(low: float, high: float = MAX_NUMBER, *, above: bool = False) -> Field:
    if high == MAX_NUMBER:
        allowed = f"a finite number {'above' if above else '>='} {low}"
    else:
        allowed = f"a finite number {'above' if above else 'from'} {low}{', at most' if above else ' to'} {high}"
    return Field(float, lambda v: (low < v if above else low <= v) and v <= high, allowed)


def _part(least: int, allowed: str) -> Field:
    """Two integers, or none: the first of a part and what stands behind its last, or a part's index and their number.

    Args:
        least: Of the second one.
        allowed: In words.
    """

    def is_allowed(v):
        return not v or (len(v) == 2 and all(type(n) is int for n in v) and 0 <= v[0] < v[1] and v[1] >= least)

    return Field(tuple, is_allowed, allowed)


def _choice(*names: str) -> Field:
    return Field(str, lambda v: v in names, f"one of {', '.join(names)}")


MAX_SIZE = 65_536


def is_size(value: Any) -> bool:
    """Whether a value is a number of neurons, channels or classes that a network may have."""
    return type(value) is int and 1 <= value <= MAX_SIZE


def is_name(value: Any) -> bool:
    """Whether a value may name the folder of a run within another."""
    return type(value) is str and value[:1] not in ("", ".") and not set(value) & set("/\\") and value.isprintable()


_FLAG = Field(bool, lambda v: True, "true or false")
_TEXT = Field(str, lambda v: True, "text")
_SIZES = Field(tuple, lambda v: all(map(is_size, v)), "integers from 1 to 65536, as 12,32")
_RANGE = _part(1, "a first number and one past the last, as 1000,60000, or ()")
_FOLD = _part(2, "the number of a fold, from 0, and how many there are, as 0,5, or ()")

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
    "dataset.duration": _number(0, 3600).or_else(0.0),
    "dataset.downsample": _integer(1, 128).or_else(1),
    "dataset.skip_bad": _FLAG.or_else(False),
    "dataset.images": _TEXT.or_else(""),
    "dataset.image_range": _RANGE.or_else(()),
    "dataset.fold": _FOLD.or_else(()),
    "augmentation.max_shift": _integer(0, 127).or_else(0),
    "augmentation.time_jitter": _number(0, 1).or_else(0.0),
    "augmentation.drop": _number(0, 1).or_else(0.0),
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
    "network.init_gain": _number(0, 1000, above=True),
    "network.precision": _choice(*networks.PRECISIONS).or_else("float32"),
    "network.time_chunk": _integer(0, 10_000).or_else(0),
    "network.time_loop": _choice(*networks.TIME_LOOPS).or_else("auto"),
    "certified.margin": _number(0, 0.999).or_else(0.0),
    "mode": _choice("surrogate", "straight_through"),
    "spikes.initial_slope": _number(0).or_else(0.0),
    "spikes.hard_share": _number(0, 1).or_else(0.0),
    "spikes.finish": _number(0, 1).or_else(0.0),
    "warm_start": _TEXT.or_else(""),
    "sam.rho": _number(0),
    "sam.perturbation": _choice("independent", "same", "noise", "stale"),
    "sam.perturbation_batch_size": _integer(0),
    "sam.adaptive": _choice("none", *ADAPTIVE),
    "sam.every_steps": _integer(1),
    "sam.start": _number(0, 1),
    "sam.ascent": _choice(*ASCENTS).or_else("global"),
    "optimizer.name": _choice(*OPTIMIZERS),
    "optimizer.learning_rate": _number(0, above=True),
    "optimizer.schedule": _choice(*SCHEDULES),
    "optimizer.warmup": _number(0, 1).or_else(0.0),
    "optimizer.weight_decay": _number(0),
    "batch_size": _integer(1),
    "num_microbatches": _integer(1),
    "num_epochs": _integer(1),
    "evaluate_every_epochs": _integer(1),
    "checkpoint_every_epochs": _integer(1),
    "test": _FLAG.or_else(True),
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
        spec: `FILE` or `FILE:variant`; a `.json` file holds one config, as `run.json` does, and runs no code.
        overrides: `section.key=value`, later ones win.
        with_data: Whether to look if the data folder is there.

    Returns:
        Locked configs by the name of the variant; the name is empty for a single config.

    Raises:
        UserError: Listing every problem.
    """
    spec = str(local_path(spec, "--config"))
    path, _, variant = spec.rpartition(":") if not Path(spec).exists() and ":" in spec else (spec, "", "")
    get_config = _load_get_config(find_config_file(path))
    base, variants = _call(get_config, variant, path)
    configs, problems, unused = {}, [], set(SCHEMA)
    for name in variants:
        config = _call(get_config, name, path)[0] if name else base
        own = frozenset(key for key, value in flatten(config).items() if name and not _equal(flatten(base).get(key), value))
        found = apply_overrides(config, overrides, keep=own) + find_problems(config, with_data=with_data)
        problems += [problem for problem in found if problem not in problems]
        configs[name] = config.lock()
        unused &= set() if found else find_unused(config)
    refuse(problems, f"{spec}: {len(problems)} problem{'s' * (len(problems) > 1)} in the config")
    set_in_vain = sorted(unused & {override.partition("=")[0] for override in overrides})
    if set_in_vain:
        warn(f"--config: {', '.join(set_in_vain)}: without effect beside the other fields of {spec}")
    return configs


def _equal(a: Any, b: Any) -> bool:
    return type(a) is type(b) and repr(a) == repr(b)  # A file may return anything: arrays, numbers that are not numbers.


def _load_get_config(path: Path) -> Callable[..., ml_collections.ConfigDict]:
    if path.suffix == ".json" and path.is_file():
        return functools.partial(_load_json, path)
    return load_function(path, "get_config", "variant=''")


def shipped_configs() -> dict[str, Path]:
    """Returns the config files that come with the package by name: from the wheel, or beside the package in a clone."""
    package = Path(__file__).parent
    folder = next((folder for folder in (package / "configs", package.parent / "configs") if folder.is_dir()), None)
    return {} if folder is None else {path.stem: path for path in sorted(folder.glob("*.py"))}


def find_config_file(name: str | Path) -> Path:
    """Returns the file that a `--config` names: a path, or the name of a config that comes with the package."""
    path = Path(name)
    return path if path.exists() else shipped_configs().get(str(name), path)


def load_function(path: Path, name: str, arguments: str = "") -> Callable[..., Any]:
    """Returns a function of a config file, which runs as code.

    Raises:
        UserError: If there is no such file or function, or the file cannot be run.
    """
    if not path.is_file():
        raise UserError(
            f"--config: there is no file {str(path)!r}; give --config=FILE.py, --config=FILE.py:variant, or a "
            f"shipped one by name: {', '.join(shipped_configs())}"
        )
    if path.suffix != ".py":
        raise UserError(f"--config: {str(path)!r} must end in .py and define {name}({arguments}), or in .json")
    try:  # Not imported: a file edited within a second, at the same length, would be taken from Python's cache.
        names = runpy.run_path(str(path), run_name=f"config_{path.stem}")
    except (Exception, SystemExit) as error:  # A config file is code of the user's and may raise anything.
        raise UserError(f"--config: {str(path)!r} could not be run: {type(error).__name__}: {error}") from error
    function = names.get(name)
    if not callable(function):
        raise UserError(f"--config: {str(path)!r} does not define {name}({arguments})")
    return function


def _load_json(path: Path, variant: str = "") -> ml_collections.ConfigDict:
    """The config in a JSON file, which downloads nothing; of what `sast-jax train` writes (`run.json`, ...) the run's."""
    if variant:
        raise ValueError("a JSON file has no variants")
    value = read_json(path)
    if isinstance(value, dict) and isinstance(value.get("config"), dict):
        value = value["config"]
    if not isinstance(value, dict):
        raise TypeError(f"it must hold an object of sections and fields; got {type(value).__name__}")
    return forbid_download(ml_collections.ConfigDict(value))


def forbid_download(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Sets `dataset.download` of a config from a JSON file to false, and returns it.

    Such a file may be another person's: only `--config.dataset.download=true` of the command itself lets it write recordings
    to the folder that the file names.
    """
    if "download" in config.get("dataset", {}):
        set_field(config, "dataset.download", False)
    return config


def _call(get_config, variant: str, path: str) -> tuple[ml_collections.ConfigDict, tuple[str, ...]]:
    """Returns a config without its field `variants`, and that field."""
    try:
        config = get_config(variant)
        if isinstance(config, ml_collections.ConfigDict):
            flatten(config)  # Reads every field: a placeholder that must be filled and is not raises here.
            config = ml_collections.ConfigDict(config.copy_and_resolve_references()).unlock()
    except (Exception, SystemExit) as error:
        raise UserError(f"--config: {path!r} with variant {variant!r}: {type(error).__name__}: {error}") from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(f"--config: get_config of {path!r} must return an ml_collections.ConfigDict; got {type(config).__name__}")
    variants = config.get(_VARIANTS, ())
    if not (isinstance(variants, tuple | list) and all(map(is_name, variants))):
        raise UserError(f"--config: variants of {path!r} must be names, as ('baseline', 'sast'); got {variants!r}")
    if _VARIANTS in config:
        del config[_VARIANTS]
    return with_defaults(with_plain_values(config)), tuple(variants) or ("",)


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
    try:
        config = with_defaults(with_plain_values(ml_collections.ConfigDict(value)))
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:  # As a dot within a name.
        raise UserError(f"{heading} {error}") from error
    refuse(find_problems(config, with_data=False), heading)
    return config.lock()


def with_plain_values(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Returns a config, a copy if need be, with Python's numbers in place of NumPy's and tuples in place of lists."""
    changed = {key: value for key, value in flatten(config).items() if repr(_plain(value)) != repr(value)}
    if not changed:
        return config
    plain = ml_collections.ConfigDict(config.copy_and_resolve_references()).unlock()
    for key, value in changed.items():
        set_field(plain, key, value)
    return plain.lock() if config.is_locked else plain


def _plain(value):
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value


def with_defaults(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Sets the fields that a config leaves out and may leave out, and returns it."""
    for key, field in SCHEMA.items():
        if field.default is not None and _is_left_out(config, key):
            set_field(config, key, field.default)
    return config


def _is_left_out(config, key):
    """Whether a field, or its whole section, is not there; not if something else stands in its place."""
    for part in key.split("."):
        if not isinstance(config, ml_collections.ConfigDict):
            return False
        if part not in config:
            return True
        config = config[part]
    return False


def is_default(key: str, value: Any) -> bool:
    """Whether a field may be left out and has its default, which a JSON value stands for."""
    default = SCHEMA[key].default if key in SCHEMA else None
    return default is not None and value == (list(default) if isinstance(default, tuple) else default)


def _find_objects(config, section=""):
    """What is no value but holds fields, by its path, and how many."""
    found = {}
    for key, value in config.items():
        if isinstance(value, ml_collections.ConfigDict | dict):
            found |= {f"{section}{key}": len(value)} | _find_objects(value, f"{section}{key}.")
    return found


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
                set_field(config, key, _parse(SCHEMA[key], text))
            except ValueError:
                problems.append(f"{key}: must be {SCHEMA[key].allowed}; got {text!r}")
    return problems


def set_field(config: ml_collections.ConfigDict, key: str, value: Any) -> None:
    """Sets a field by its dotted path, and its section if that is missing, whatever type it had before."""
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
    target[name] = _plain(value)


def _parse(field: Field, text: str) -> Any:
    if field.type is str:
        return text
    if field.type is bool:
        return {"true": True, "false": False, "1": True, "0": False}.get(text.lower(), text)
    if field.type is tuple:
        return _parse_sizes(text.strip())
    return field.type(text)


def _parse_sizes(text: str) -> tuple[int, ...]:
    """Parses `12,32`, with or without brackets; `()` is none."""
    is_enclosed = text[:1] + text[-1:] in ("()", "[]")
    inner = text[1:-1].strip() if is_enclosed else text
    if is_enclosed and not inner:
        return ()
    return tuple(int(part) for part in inner.removesuffix(",").split(","))


def _unknown(key: str) -> str:
    close = difflib.get_close_matches(key, SCHEMA, n=1) or [k for k in SCHEMA if k.rpartition(".")[2] == key.rpartition(".")[2]]
    return f"{key}: there is no such field" + (f"; did you mean {close[0]}?" if close else f"; fields are {', '.join(SCHEMA)}")


def find_unused(config: ml_collections.ConfigDict) -> set[str]:
    """Returns the fields that change nothing beside the others, as those of `sam` at radius 0."""
    unused = {key for key in SCHEMA if key.startswith("sam.") and key != "sam.rho"} if not config.sam.rho else set()
    unused |= {"network.kernel_size", "network.pool_size"} if config.network.kind == "mlp" else set()
    return unused | ({"network.readout_decay"} if config.network.readout == "rate" else set())


def find_problems(config: ml_collections.ConfigDict, *, with_data: bool = True) -> list[str]:
    """Returns all that is wrong with a config, a line each; `with_data` also looks whether its data folder is there."""
    flat, objects = flatten(config), _find_objects(config)
    misplaced = tuple(f"{key}." for key in objects if key in SCHEMA)
    sections = {key.rpartition(".")[0] for key in SCHEMA}
    names = [*flat, *(key for key, size in objects.items() if not size and key not in sections)]
    problems = [_unknown(key) for key in names if key not in SCHEMA and not key.startswith(misplaced)]
    for key, field in SCHEMA.items():
        if key in objects:
            problems.append(f"{key}: must be {field.allowed}; got an object of fields")
        elif key not in flat:
            problems.append(f"{key}: is missing; it must be {field.allowed}")
        elif not _fits(field, flat[key]):
            problems.append(f"{key}: must be {field.allowed}; got {flat[key]!r}")
    problems = problems or _find_conflicts(config, flat)
    name, root, download = (flat.get(f"dataset.{key}") for key in ("name", "root", "download"))
    if with_data and type(name) is type(root) is str and name in recorded.COLLECTIONS and download is False:
        try:
            recorded.find_recordings(name, root, download=False)
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
    name, downsample = config.dataset.name, config.dataset.downsample
    if any(size % downsample for size in data.sensor_size(name)):
        problems.append(f"dataset.downsample: must divide the {data.sensor_size(name)[0]} pixels of {name}; got {downsample}")
    if config.dataset.duration and data.CATALOGUE[name].duration:
        problems.append(
            f"dataset.duration: recordings of {name} have one length, so it must be 0, all of it; got {config.dataset.duration}"
        )
    num_pixels = max(1, min(data.sensor_size(name)) // downsample)
    if config.augmentation.max_shift >= num_pixels:
        problems.append(
            f"augmentation.max_shift: must be less than the {num_pixels} pixels of a frame, or a shift leaves nothing of it; got "
            f"{config.augmentation.max_shift}"
        )
    if config.network.kind == "conv" and num_pixels < config.network.pool_size ** len(config.network.features):
        problems.append(
            f"network.pool_size: {config.network.pool_size}, {len(config.network.features)} times over, leaves nothing of "
            f"{num_pixels} pixels; take a smaller one, or fewer network.features"
        )
    images = config.dataset.images
    if (images or config.dataset.image_range) and name != "digits":
        problems.append(f"dataset.images: only digits are simulated from images, so it must be empty for {name}; got {images!r}")
    if config.dataset.image_range and not images:
        problems.append(f"dataset.image_range: needs dataset.images, or must be (); got {config.dataset.image_range}")
    if name == "digits" and not images and config.dataset.num_test < 1:
        problems.append("dataset.num_test: digits needs at least 1 test sample; got 0")
    if (images or name == "gestures") and config.dataset.num_test:
        whose = "with dataset.images MNIST brings its" if images else "gestures bring their"
        problems.append(f"dataset.num_test: {whose} own test part, so it must be 0; got {config.dataset.num_test}")
    problems += _find_uncertifiable(config) if config.certified.margin else []
    if config.optimizer.weight_decay and config.optimizer.name != "adamw":
        problems.append(
            f"optimizer.weight_decay: only adamw has one; got {config.optimizer.weight_decay} with {config.optimizer.name!r}"
        )
    for key in ("batch_size", *["sam.perturbation_batch_size"] * bool(config.sam.rho)):
        if flat[key] % config.num_microbatches:
            problems.append(f"{key}: must be a multiple of num_microbatches, {config.num_microbatches}; got {flat[key]}")
    if config.sam.rho and config.sam.perturbation != "independent" and config.sam.perturbation_batch_size:
        problems.append(
            f"sam.perturbation_batch_size: {config.sam.perturbation!r} perturbs by no batch of its own, so it must be 0; got "
            f"{config.sam.perturbation_batch_size}"
        )
    is_every_step = config.sam.every_steps == 1 and not config.sam.start and config.sam.perturbation in ("independent", "same")
    if config.sam.rho and config.sam.ascent == "per_device" and not is_every_step:
        problems.append(
            "sam.ascent: per_device needs a gradient for the perturbation at every step, so sam.every_steps must be 1, sam.start "
            "0, and sam.perturbation independent or same"
        )
    if config.mode == "straight_through" and (config.spikes.hard_share or config.spikes.finish):
        problems.append("spikes: in mode straight_through all spikes are hard, so hard_share and finish must be 0")
    if not config.test and not config.dataset.num_validation:
        problems.append("test: without the test part a run needs a validation part, so dataset.num_validation must be above 0")
    return problems


def _find_uncertifiable(config):
    problems = []
    if any(config.spikes.values()):
        problems.append("certified.margin: contraction is of the network's own spikes, so all of spikes must be 0")
    if config.mode != "surrogate":
        problems.append(f"certified.margin: contraction is of smooth spikes, so mode must be surrogate; got {config.mode!r}")
    if not config.dataset.binary:
        problems.append("certified.margin: needs bounded frames, so dataset.binary must be true; got false")
    neuron = {key: config.network[key] for key in ("decay", "threshold", "reset", "family", "slope")}
    try:
        max_current(config.certified.margin, **neuron)
    except ValueError as error:
        problems.append(f"certified.margin: cannot be held, as {error}; lower network.decay or the margin")
    return problems
