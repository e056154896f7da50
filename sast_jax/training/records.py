"""What each JSON file of a run or study folder holds: types, ranges and names, and the one reader that checks them."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sast_jax import files
from sast_jax.config import is_name, is_size
from sast_jax.errors import UserError

RUN, RESULTS, METRICS = "run.json", "results.json", "metrics.jsonl"
RUNS = "runs.json"  # In a folder of several runs: their names, in the order in which they are trained.
EVALUATION, THEORY = "evaluation.json", "theory.json"
STUDY, CALIBRATION, DIVERGED = "study.json", "calibration.json", "diverged.json"

Check = Callable[[Any], str]
"""Takes a value and returns what is wrong with it, or nothing."""


def _is_number(value):
    return type(value) is int or (type(value) is float and math.isfinite(value))


def number(low: float = -1e300, high: float = 1e300) -> Check:
    """A finite number in a range."""
    allowed = "a finite number" if low <= -1e300 else f"a number from {low:g}" + (f" to {high:g}" if high < 1e300 else "")
    return lambda value: "" if _is_number(value) and low <= value <= high else f"must be {allowed}; got {value!r:.60}"


def text(value: Any) -> str:
    """A text."""
    return "" if isinstance(value, str) else f"must be a text; got {value!r:.60}"


def flag(value: Any) -> str:
    """True or false."""
    return "" if isinstance(value, bool) else f"must be true or false; got {value!r:.60}"


def count(value: Any) -> str:
    """An integer from 0."""
    return "" if type(value) is int and 0 <= value < 2**63 else f"must be an integer from 0; got {value!r:.60}"


def anything(value: Any) -> str:
    """Whatever JSON can hold."""
    return ""


def maybe(check: Check) -> Check:
    """What `check` allows, or null."""
    return lambda value: "" if value is None else check(value)


def either(*checks: Check) -> Check:
    """What any of the checks allows."""
    return lambda value: "" if any(not check(value) for check in checks) else checks[0](value)


def each(check: Check, at_least: int = 0) -> Check:
    """A list of what `check` allows."""

    def find(value):
        if not isinstance(value, list) or len(value) < at_least:
            return f"must be a list{f' of at least {at_least}' * bool(at_least)}; got {value!r:.60}"
        return next((f"[{index}] {wrong}" for index, item in enumerate(value) if (wrong := check(item))), "")

    return find


def named(check: Check) -> Check:
    """An object whose values are what `check` allows, under any names."""

    def find(value):
        if not isinstance(value, dict):
            return f"must be an object; got {value!r:.60}"
        return next((f"{key!r:.60}: {wrong}" for key, item in value.items() if (wrong := check(item))), "")

    return find


def record(checks: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> Check:
    """An object with these fields; others are left alone, as a later version may have written them."""
    optional = optional or {}

    def find(value):
        if not isinstance(value, dict):
            return f"must be an object; got {value!r:.60}"
        for key, check in {**checks, **optional}.items():
            if key not in value:
                if key in checks:
                    return f"{key} is missing"
            elif wrong := check(value[key]):
                return f"{key}: {wrong}"
        return ""

    return find


_SHARE, _AMOUNT = number(0, 1), number(0)
_ACCURACIES = {"surrogate_accuracy": _SHARE, "hard_accuracy": _SHARE}
_TRANSFER = {**_ACCURACIES, "transfer_gap": number(-1, 1)}
_COST = {"num_gradient_evaluations": _AMOUNT, "wall_time_seconds": _AMOUNT}

_DATA = record(
    {"checksum": text, "num_classes": lambda value: "" if is_size(value) else f"must be a size; got {value!r:.60}"},
    dict.fromkeys(("num_train", "num_validation", "num_test"), count),
)

_RUN = record({"config": record({}), "data": _DATA, "environment": named(either(text, _AMOUNT))})

_RESULTS_OPTIONAL = {
    **dict.fromkeys(("surrogate_loss", "hard_loss"), number()),
    **_COST,
    "warm_start_cost": record(_COST),
    "validation": maybe(record(_TRANSFER)),
    "config": record({}),
}
_TESTED = record({**_TRANSFER, "num_test": count}, _RESULTS_OPTIONAL)
_UNTESTED = record({"num_test": count, "validation": record(_TRANSFER)}, _RESULTS_OPTIONAL)


def _one_result(value):
    is_untested = isinstance(value, dict) and value.get("num_test") == 0 and "hard_accuracy" not in value
    return (_UNTESTED if is_untested else _TESTED)(value)


def _results(value):
    return _one_result(value) or record({}, {"runs": named(_one_result)})(value)


def _names(value):
    fits = isinstance(value, list) and all(map(is_name, value))
    return "" if fits else f"must be a list of names of folders; got {value!r:.60}"


_CALIBRATED = {"accuracy": _SHARE, **dict.fromkeys(("loss", "ece", "temperature", "scaled_loss", "scaled_ece"), number())}
_SETTING = named(either(number(), each(number())))
_METHOD = record(_CALIBRATED, {"gap_removed": maybe(number()), "thresholds": _SETTING, "gains": _SETTING})
_CALIBRATION_FIELDS = record(
    {"methods": named(_METHOD), "chosen": text, "surrogate": record(_CALIBRATED)},
    {"num_calibration": count, "num_test": count, "num_bins": count, "split": text, "seconds": _AMOUNT},
)


def _calibration(value):
    wrong = _CALIBRATION_FIELDS(value)
    if not wrong and value["chosen"] not in value["methods"]:
        wrong = f"chosen: must be one of the methods; got {value['chosen']!r:.60}"
    return wrong


_SWAP = each(record({"hard": each(text), "accuracy": _SHARE, "loss": number()}), at_least=1)
_OPERATIONS = dict.fromkeys(("effective_acs", "effective_macs", "event_acs", "dense"), _AMOUNT)
_LAYER_AGREEMENT = {"surrogate_activation": number(), "hard_rate": number()} | dict.fromkeys(
    ("count_correlation", "count_difference"), maybe(number())
)
_INTEGERS = {"accuracy": _SHARE, "synops": record(_OPERATIONS), "memory": record({"total": _AMOUNT})}
_REFERENCE = maybe(record({"equal": flag, "num_compared": count}))
_CONFIGURATION = {
    **_INTEGERS,
    **dict.fromkeys(("weight_bits", "potential_bits"), count),
    **dict.fromkeys(("granularity", "decay_form"), text),
    "agreement": maybe(_SHARE),
    "reference": _REFERENCE,
}
_MATRIX = each(each(count, at_least=1), at_least=1)
_CURVES = record(dict.fromkeys(_ACCURACIES, each(_SHARE)))

_SUITES: dict[str, Check] = {
    "transfer": record(
        _TRANSFER,
        {
            "num_test": count,
            "layer_swap": record({"prefix": _SWAP, "single": _SWAP}),
            "agreement": record({"decisions": _SHARE, "layers": named(record(_LAYER_AGREEMENT))}),
            "confusion": record({"surrogate": _MATRIX, "hard": _MATRIX}),
        },
    ),
    "calibration": _calibration,
    "quantization": record(
        {"num_test": count, "float": record(_INTEGERS), "configurations": each(record(_CONFIGURATION))},
    ),
    "synops": record(
        {
            **_OPERATIONS,
            "num_test": count,
            "activation_sparsity": maybe(number()),
            "layers": named(record({**_OPERATIONS, "spike_rate": maybe(number())})),
        },
    ),
    "robustness": record(
        {
            "num_test": count,
            "severities": each(count, at_least=1),
            "clean": record(_ACCURACIES),
            "corruptions": named(_CURVES),
            "area": named(record({"surrogate": _SHARE, "hard": _SHARE})),
        },
    ),
}

_STATEMENT = record(
    {"layer": text, "statement": text, "assumption": text, "holds": flag, "vacuous": flag}
    | dict.fromkeys(("measured", "bound", "tightness"), maybe(number()))
)

_STUDY_METHOD = record({"grid": named(each(anything)), "config": record({})})

FILES: dict[str, Check] = {
    RUN: _RUN,
    RESULTS: _results,
    RUNS: _names,
    EVALUATION: record({"step": count}, _SUITES),
    THEORY: record({"step": count, "recordings": text, "num_recordings": count, "statements": each(_STATEMENT)}),
    STUDY: record({"selection_seeds": each(count), "methods": named(_STUDY_METHOD)}),
    CALIBRATION: _calibration,
    DIVERGED: record({"message": text}),
}
"""The check of each file by its name."""

METRICS_LINE = record({"step": count, "epoch": count}, {"seconds": _AMOUNT, "num_steps": count})
"""The check of a line of `metrics.jsonl`, whose other fields are finite numbers."""

_WRITE_AGAIN = {
    EVALUATION: "remove it and run `sast-jax evaluate` again",
    THEORY: "remove it and run `sast-jax theory` again",
    CALIBRATION: "remove it, and the same `sast-jax sweep` calibrates again",
    DIVERGED: "remove it, and the same `sast-jax sweep` trains the run again",
}


def read_record(path: Path) -> Any:
    """Returns the content of a JSON file of a run or study, or `None` if it is not there.

    Args:
        path: A file of a name in `FILES`.

    Raises:
        UserError: If it cannot be read, is no JSON, or holds something else than sast-jax writes under that name.
    """
    cure = _WRITE_AGAIN.get(path.name, "restore it, or choose another --workdir")
    try:
        value = files.read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); {cure}") from error
    if wrong := FILES[path.name](value):
        raise UserError(f"{path}: is damaged or not of sast-jax: {wrong}; {cure}")
    return value
