"""Evaluation of runs on disk: `evaluation.json`, suite by suite."""

import functools
import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from sast_jax.data import Recordings, Splits
from sast_jax.errors import UserError, refuse
from sast_jax.evaluation.calibration import evaluate_calibration
from sast_jax.evaluation.outputs import BATCH_SIZE, sharing_devices
from sast_jax.evaluation.quantization import evaluate_quantization
from sast_jax.evaluation.robustness import evaluate_robustness
from sast_jax.evaluation.synops import evaluate_synops
from sast_jax.evaluation.transfer import analyze_transfer, make_eval_step
from sast_jax.files import local_path, refuse_irregular, update_json
from sast_jax.networks import Calibration
from sast_jax.training.build import load_data
from sast_jax.training.records import EVALUATION, read_record
from sast_jax.training.run import Run, load_run_and_data

_MAX_COUNT = 255  # Frames are uint8.


class Subject(NamedTuple):
    """What a suite evaluates.

    Attributes:
        run: Trained network.
        splits: Its data.
        load_corrupted: From kind and severity of a corruption to the corrupted test part.
        report: Called with what comes next, in a few words.
    """

    run: Run
    splits: Splits
    load_corrupted: Callable[[str, int], Recordings]
    report: Callable[[str], None]

    @property
    def calibration(self) -> tuple[str, Recordings]:
        """The part on which choices are made: validation, or training where there is none."""
        has_validation = len(self.splits.validation.labels) > 0
        return ("validation", self.splits.validation) if has_validation else ("train", self.splits.train)


def _transfer(subject):
    return analyze_transfer(subject.run.network, subject.run.params, subject.splits.test)


def _calibration(subject):
    split, recordings = subject.calibration
    run = subject.run
    return evaluate_calibration(run.network, run.params, recordings, subject.splits.test, split=split, report=subject.report)


def _quantization(subject):
    run, (_, recordings) = subject.run, subject.calibration
    max_input = 1 if run.config.dataset.binary else _MAX_COUNT
    return evaluate_quantization(
        run.network, run.params, recordings, subject.splits.test, max_input=max_input, report=subject.report
    )


def _synops(subject):
    return evaluate_synops(subject.run.network, subject.run.params, subject.splits.test)


def _robustness(subject):
    run = subject.run
    return evaluate_robustness(
        make_eval_step(run.network, sharing_devices(run.network, jax.device_count())),
        run.params,
        subject.splits.test,
        subject.load_corrupted,
        BATCH_SIZE,
        report=subject.report,
    )


SUITES: dict[str, Callable[[Subject], dict[str, Any]]] = {
    "transfer": _transfer,
    "calibration": _calibration,
    "quantization": _quantization,
    "synops": _synops,
    "robustness": _robustness,
}


def parse_suites(text: str) -> list[str]:
    """Returns the suites that a text names, as `transfer,synops` or `all`, in the order of `SUITES`.

    Raises:
        UserError: If there is no such suite.
    """
    names = text.split(",")
    unknown = [name for name in names if name not in (*SUITES, "all")]
    refuse([f"--suite: must be of {', '.join(SUITES)}, all, separated by commas; got {name!r}" for name in unknown])
    return [name for name in SUITES if name in names or "all" in names]


def load_calibration(run: Run, method: str) -> Calibration:
    """Returns the thresholds and gains that a method of the suite `calibration` found for a run.

    Args:
        run: The run, with its suite evaluated at these weights.
        method: Name of the method, or `chosen` for the one that the suite chose.

    Raises:
        UserError: If the suite has not been evaluated, or has no such method.
    """
    written = _written(run, _own(run))
    if "calibration" not in written:
        command = f"sast-jax evaluate --suite=calibration --workdir={run.workdir}"
        raise UserError(f"--calibration: the run has none at its step {run.step}; first {command}")
    methods, chosen = written["calibration"]["methods"], written["calibration"]["chosen"]
    if method not in (*methods, "chosen"):
        raise UserError(f"--calibration: must be one of {', '.join(methods)}, chosen; got {method!r}")
    found = methods[chosen if method == "chosen" else method]
    names = run.network.layer_names[: run.network.num_spiking]
    if any(tuple(found.get(key, ())) != names for key in ("thresholds", "gains")):
        raise UserError(
            f"{run.workdir / EVALUATION}: thresholds and gains of {method!r} must be of the layers {', '.join(names)}; "
            "remove it and evaluate again"
        )
    values = {key: [np.array(found[key][name]) for name in names] for key in ("thresholds", "gains")}
    channels = [len(run.params[name]["bias"]) for name in names]
    refuse(
        [
            f"{key} of {name} must be a positive number, or {number}, one per channel; got {value.tolist()!r:.60}"
            for key, each in values.items()
            for name, value, number in zip(names, each, channels, strict=True)
            if value.shape not in ((), (1,), (number,)) or not (value > 0).all()
        ],
        f"{run.workdir / EVALUATION}: the calibration {method!r} is not of this network; remove the file and evaluate again:",
    )
    return Calibration(*map(tuple, values.values()))


def evaluate_run(
    workdir: Path, suites: Sequence[str], overrides: Sequence[str] = (), report: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Evaluates a run and writes each suite's result to its `evaluation.json`, beside those that are there.

    Several processes may evaluate a run at once; none takes away what another has written meanwhile.

    Args:
        workdir: Folder of the run.
        suites: Names from `SUITES`.
        overrides: Where the recordings lie now: `dataset.root=...`, `dataset.download=...`.
        report: Called with a line of progress.

    Returns:
        The results of these suites by name.

    Raises:
        UserError: If the folder is no run, the recordings are missing or others, or a result is not finite.
    """
    workdir = local_path(workdir, "--workdir")
    run, config, splits = load_run_and_data(workdir, overrides)
    refuse_irregular(workdir / EVALUATION)
    own = _own(run)
    start = time.monotonic()
    results = {}
    for number, name in enumerate(suites, 1):

        def announce(text="", name=name, number=number):
            line = f"{name} ({number} of {len(suites)})" + (f": {text}" if text else "")
            report(f"{line}, after {time.monotonic() - start:.0f} s")

        announce()
        subject = Subject(run, splits, lambda *corruption: load_data(config, corruption).test, announce)
        results[name] = SUITES[name](subject)
        try:
            update_json(workdir / EVALUATION, functools.partial(_merge, run, own, {name: results[name]}))
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"{name}: a result of {str(workdir)!r} at step {run.step} is not finite; train it again") from error
    return results


def _own(run):
    """What says which weights an evaluation is of: their step, and SHA-256 over all of them."""
    digest = hashlib.sha256()
    for leaf in jax.device_get(jax.tree.leaves(run.params)):
        digest.update(leaf.tobytes())
    return {"step": run.step, "weights": digest.hexdigest()}


def _written(run, own):
    """What `evaluation.json` of a run holds of these weights; nothing if it is of others. The first ones had no digest."""
    written = read_record(run.workdir / EVALUATION)
    return written if isinstance(written, dict) and own.items() <= ({"weights": own["weights"]} | written).items() else {}


def _merge(run, own, results):
    return _written(run, own) | own | results


def summarize(suite: str, result: dict[str, Any]) -> list[list[str]]:
    """Returns the rows of a short table of a suite's result, headings first."""
    return _SUMMARIES[suite](result)


def _percent(value):
    return "-" if value is None else f"{100 * value:.1f} %"


def _summarize_transfer(result):
    swaps = result["layer_swap"]["prefix"] + result["layer_swap"]["single"]
    cells = {" ".join(row["hard"]) or "none": [_percent(row["accuracy"]), f"{row['loss']:.3f}"] for row in swaps}
    return [["layers in hard mode", "accuracy", "loss"], *([names, *each] for names, each in cells.items())]


def _summarize_calibration(result):
    header = ["calibration of hard spikes", "accuracy", "gap removed", "temperature", "loss", "ECE", "ECE before"]
    rows = [
        [name, _percent(row["accuracy"]), _percent(row.get("gap_removed")), *(f"{row[key]:.3f}" for key in _CONFIDENCE)]
        for name, row in {"surrogate": result["surrogate"], **result["methods"]}.items()
    ]
    return [header, *rows]


_CONFIDENCE = ("temperature", "scaled_loss", "scaled_ece", "ece")


def _summarize_quantization(result):
    def cells(name, row):
        num_operations = row["synops"]["effective_acs"] + row["synops"]["effective_macs"]
        equals = {True: "yes", False: "NO", None: "-"}[row.get("reference", {}).get("equal")]
        memory = f"{row['memory']['total'] / 1024:.1f} KiB"
        return [name, _percent(row["accuracy"]), _percent(row.get("agreement")), _thousands(num_operations), memory, equals]

    header = ["integers", "accuracy", "as float", "ACs + MACs", "memory", "equals reference"]
    rows = [
        cells(f"INT{row['weight_bits']} per {row['granularity']}, decay {row['decay_form']}", row)
        for row in result["configurations"]
    ]
    return [header, cells("float", result["float"]), *rows]


def _summarize_synops(result):
    rows = {**result["layers"], "all": result}
    keys = ("effective_acs", "effective_macs", "event_acs", "dense")
    header = ["operations a recording", "effective ACs", "effective MACs", "ACs by events", "dense"]
    return [header, *([name, *(_thousands(row[key]) for key in keys)] for name, row in rows.items())]


def _thousands(number):
    return f"{number / 1000:,.1f}k"


def _summarize_robustness(result):
    rows = [[kind, *(_percent(area[mode]) for mode in ("surrogate", "hard"))] for kind, area in result["area"].items()]
    return [["accuracy over severities 0 to 5", "surrogate", "hard"], *rows]


_SUMMARIES = {
    "transfer": _summarize_transfer,
    "calibration": _summarize_calibration,
    "quantization": _summarize_quantization,
    "synops": _summarize_synops,
    "robustness": _summarize_robustness,
}
