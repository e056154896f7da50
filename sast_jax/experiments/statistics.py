"""Means, errors and paired tests over a handful of seeds."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def summarize(values: Sequence[float]) -> dict[str, Any]:
    """Returns `mean`, `standard_error` (null for a single value) and the `values`."""
    error = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "standard_error": error, "values": [float(value) for value in values]}


def paired_test(values: Sequence[float], control: Sequence[float]) -> dict[str, Any]:
    r"""Tests whether the differences of paired values are centred at zero, exactly and without a distribution.

    .. math:: p = 2^{-n} \, \Bigl|\Bigl\{ s \in \{-1, 1\}^n : \Bigl|\sum_i s_i d_i\Bigr| \ge \Bigl|\sum_i d_i\Bigr| \Bigr\}\Bigr|

    If the two did not differ, each difference :math:`d_i` would be as likely with either sign. With n pairs no p can be below
    :math:`2^{1-n}`, which for few seeds is not small: `smallest_p` says it.

    Args:
        values: One per seed.
        control: Those of the control, of the same seeds in the same order.

    Returns:
        `mean`, `standard_error` and `values` of the differences; `p`, two-sided; `smallest_p`; and `clear`: whether the mean
        lies beyond two standard errors.

    References:
        Fisher. The Design of Experiments. 1935, section 21.
    """
    from scipy.stats import permutation_test

    differences = np.subtract(values, control)
    summary = summarize(differences.tolist())
    n = len(differences)
    p = 1.0
    if n > 1 and np.any(differences):
        result = permutation_test(
            (differences,),
            lambda d, axis: np.sum(d, axis=axis),
            permutation_type="samples",
            n_resamples=np.inf,
            vectorized=True,
        )
        p = float(min(1.0, result.pvalue))
    error = summary["standard_error"]
    clear = error is not None and abs(summary["mean"]) > 2 * error
    return {**summary, "p": p, "smallest_p": 2.0 ** (1 - n), "clear": bool(clear)}
