r"""Accuracy on corrupted recordings, in both modes."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sast_jax.data import CORRUPTIONS, Recordings
from sast_jax.data.corruption import SEVERITIES
from sast_jax.evaluation.transfer import EvalStep, evaluate_transfer

MODES = ("surrogate", "hard")


def evaluate_robustness(
    eval_step: EvalStep,
    params: Any,
    clean: Recordings,
    load: Callable[[str, int], Recordings],
    batch_size: int,
    *,
    kinds: Sequence[str] = tuple(CORRUPTIONS),
    report: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    r"""Evaluates both modes on every kind and severity of corruption.

    .. math:: \text{area} = \frac15 \int_0^5 \text{accuracy}(\text{severity}),

    by trapezoids, with the clean recordings at severity 0: the mean accuracy over severities.

    Args:
        eval_step: From `make_eval_step`.
        params: Weights.
        clean: Recordings as they are.
        load: From kind and severity to the same recordings, corrupted.
        batch_size: Samples per call.
        kinds: Kinds of corruption.
        report: Called with the name of what comes next.

    Returns:
        `robustness` of `sast_jax.evaluation`.
    """

    def accuracies(recordings):
        transfer = evaluate_transfer(eval_step, params, recordings, batch_size)
        return {f"{mode}_accuracy": transfer[f"{mode}_accuracy"] for mode in MODES}

    at_zero = accuracies(clean)
    corruptions = {}
    for kind in kinds:
        report(kind)
        rows = [accuracies(load(kind, severity)) for severity in SEVERITIES]
        corruptions[kind] = {key: [row[key] for row in rows] for key in at_zero}
    area = {
        kind: {mode: _area([at_zero[f"{mode}_accuracy"], *rows[f"{mode}_accuracy"]]) for mode in MODES}
        for kind, rows in corruptions.items()
    }
    area["mean"] = {mode: float(np.mean([each[mode] for each in area.values()])) for mode in MODES}
    return {
        "num_test": len(clean.labels),
        "severities": list(SEVERITIES),
        "clean": at_zero,
        "corruptions": corruptions,
        "area": area,
    }


def _area(accuracies):
    return float(np.trapezoid(accuracies) / (len(accuracies) - 1))
