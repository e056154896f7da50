"""Methods compared over their tested runs: means, costs, and each against its controls."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sast_jax.experiments.statistics import paired_test, summarize
from sast_jax.experiments.study import BASELINE, Study
from sast_jax.training.run import MAY_MOVE

CHEAP = 1.3
"""Gradients, as a ratio to the baseline's, up to which a method is recommended."""


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
            "gradient_evaluations": summarize([_with_warm_start(run, "num_gradient_evaluations") for run in runs]),
            "seconds": summarize([_with_warm_start(run, "wall_time_seconds") for run in runs]),
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


def _with_warm_start(run, cost):
    return run[cost] + run.get("warm_start_cost", {}).get(cost, 0)


def recommend(methods: Mapping[str, Any]) -> str:
    """Returns the name of the method to take, chosen without the test part.

    Of the trained methods that take at most `CHEAP` times the baseline's gradients it is the one with the best hard-spike
    accuracy on the validation part, mean over the tested seeds.

    Args:
        methods: Rows by name, as `compare` makes them; those of methods without a validation accuracy are left out.

    Returns:
        The name; empty if no method has a validation accuracy.
    """
    cheap = {
        name: row["validation_hard"]["mean"]
        for name, row in methods.items()
        if "validation_hard" in row and row["gradients_ratio"] <= CHEAP
    }
    return max(cheap, key=cheap.__getitem__, default="")
