r"""One surrogate-forward neuron: how far its potential can go, and whether it forgets its past.

A neuron's state is its potential alone, as the spike before the reset is a function of it. Without its current it follows the map

.. math::
    g(u) &= \tau u \,(1 - \sigma(u - \vartheta))       && \text{reset zero} \\
    g(u) &= \tau u - \vartheta\, \sigma(u - \vartheta) && \text{reset subtract} \\
    g(u) &= \tau u                                     && \text{reset none}

and with it :math:`u_t = g(u_{t-1}) + I_t`. Proofs are in `docs/theory.md`, whose numbers the docstrings give. All functions take
numbers or arrays that broadcast, and compute in float64.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from sast_jax.neurons import Reset, check_neuron
from sast_jax.numeric import check_range
from sast_jax.spikes import FAMILIES

Array = npt.NDArray[np.floating]

_BISECTIONS = 90  # More than enough to end at neighbouring numbers.


def in_float64(function):
    """The surrogates are jax functions, and float32 by default."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        with jax.enable_x64(True):
            return function(*args, **kwargs)

    return wrapped


class _Covered(NamedTuple):
    """What the proofs need to know of a family of surrogates.

    Attributes:
        extrema: `(threshold, slope) -> potentials` at which g' of reset zero has its finite extrema; first a minimum at or above
            the threshold.
        max_bend: sup of |y sigma_1''(y)|.
    """

    extrema: Callable[[Any, Any], list[Any]]
    max_bend: float


def _extrema_of_arctan(threshold, slope):
    return [threshold + 4 / (math.pi**2 * slope**2 * threshold)]


def _extrema_of_logistic(threshold, slope):
    scaled = slope * threshold
    above = _bisect(lambda y: (y + scaled) * np.tanh(y / 2) < 2, np.zeros_like(scaled, float), 4.0)
    below = _bisect(lambda y: y * np.tanh((y + scaled) / 2) < 2, np.zeros_like(scaled, float), 4.0)
    return [threshold + above / slope, -below / slope]


_COVERED = {
    "arctan": _Covered(_extrema_of_arctan, 1 / 4),
    "logistic": _Covered(_extrema_of_logistic, 0.16),
    "fast_sigmoid": _Covered(lambda threshold, slope: [threshold], 4 / 27),  # Its kink.
}
"""The families that the proofs cover. One that is not here has no bounds, whatever its values."""


def check_covered(family: str) -> None:
    """Refuses a family of surrogates that the theory says nothing of."""
    if family not in _COVERED:
        raise ValueError(
            f"family must be one of {', '.join(_COVERED)}, which the theory covers; got {family!r}, of which nothing is proved"
        )


def _check(decay, threshold, reset, family, slope):
    check_neuron(decay=decay, threshold=threshold, reset=reset)
    check_covered(family)
    check_range("slope", slope, "positive and finite")


def _bisect(is_before, low, high):
    """Where `is_before` turns from true to false between `low` and `high`, element-wise."""
    low, high = np.broadcast_arrays(np.asarray(low, float), np.asarray(high, float))
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        before = is_before(middle)
        low, high = np.where(before, middle, low), np.where(before, high, middle)
    return high


@functools.partial(jax.jit, static_argnames="family")
def surrogate(potential: npt.ArrayLike, threshold: float, family: str, slope: float) -> tuple[jax.Array, jax.Array]:
    """Returns value and derivative of the surrogate at potentials: one program for arrays of a shape."""
    x = jnp.asarray(potential) - threshold
    return FAMILIES[family].value(x, slope), FAMILIES[family].derivative(x, slope)


@in_float64
def carry_over(potential: npt.ArrayLike, *, decay: float, threshold: float, reset: Reset, family: str, slope: float) -> Array:
    """Returns :math:`g(u)`, what a step keeps of the potential `u` of the step before."""
    potential = np.asarray(potential, float)
    spikes = np.asarray(surrogate(potential, threshold, family, slope)[0])
    return {
        "zero": decay * potential * (1 - spikes),
        "subtract": decay * potential - threshold * spikes,
        "none": decay * potential,
    }[reset]


@in_float64
def carry_over_slope(
    potential: npt.ArrayLike, *, decay: float, threshold: float, reset: Reset, family: str, slope: float
) -> Array:
    r"""Returns :math:`g'(u)`, which for reset zero is :math:`\tau (1 - \sigma(u - \vartheta) - u\, \sigma'(u - \vartheta))`.

    At infinite potentials it is the limit.
    """
    potential = np.asarray(potential, float)
    finite = np.where(np.isfinite(potential), potential, 0)
    spikes, derivative = map(np.asarray, surrogate(finite, threshold, family, slope))
    if reset == "zero":
        limit = np.where(potential > 0, 0, decay)
        return np.where(np.isfinite(potential), decay * (1 - spikes - finite * derivative), limit)
    drop = threshold * derivative if reset == "subtract" else 0.0
    return np.where(np.isfinite(potential), decay - drop, decay)


def _extrema_of_slope(threshold, reset, family, slope):
    """The potentials at which g' has its finite extrema: for reset zero first a minimum at or above the threshold."""
    return _COVERED[family].extrema(threshold, slope) if reset == "zero" else [threshold]  # Where sigma' is largest.


def _extrema(neuron):
    """The potentials at which g itself has its extrema."""
    if neuron["reset"] == "zero":
        lowest = _extrema_of_slope(**{key: neuron[key] for key in ("threshold", "reset", "family", "slope")})[0]
        return [_bisect(lambda u: carry_over_slope(u, **neuron) > 0, np.zeros_like(lowest), lowest)]
    if neuron["reset"] == "subtract":
        # x sigma'(x) < 1/4 in every family, so sigma' has fallen below decay / threshold there.
        furthest = 0.25 * neuron["threshold"] / np.maximum(neuron["decay"], 1e-9)
        distance = _bisect(lambda x: carry_over_slope(neuron["threshold"] + x, **neuron) < 0, 0.0, furthest)
        return [neuron["threshold"] - distance, neuron["threshold"] + distance]
    return []


@in_float64
def contraction_factor(
    *,
    decay: float,
    threshold: float,
    reset: Reset,
    family: str,
    slope: float,
    low: npt.ArrayLike = -math.inf,
    high: npt.ArrayLike = math.inf,
) -> Array:
    r"""Returns the contraction factor of a neuron's state map: proved, exact (Theorem 2).

    .. math:: \kappa = \sup_{u \in [low, high]} |g'(u)|

    Two trajectories under equal currents approach each other by at least this factor a step. Over all reals, with
    :math:`c = \tfrac{\pi}{2} k \vartheta`: for reset zero :math:`\tau \max(1, (c - \arctan c) / \pi)` with arctan and
    :math:`\tau \max(1, (k \vartheta - 1) / 2)` with the fast sigmoid (logistic: roots of an equation); for reset subtract
    :math:`\max(\tau, |\tau - \vartheta L_1|)`; for reset none :math:`\tau`.

    Args:
        decay: :math:`\tau` in [0, 1].
        threshold: :math:`\vartheta > 0`.
        reset: `zero`, `subtract` or `none`.
        family: `arctan`, `logistic` or `fast_sigmoid`.
        slope: :math:`k > 0`.
        low: Lowest potential that either trajectory reaches, as from `reachable_potentials`.
        high: Highest one.

    Raises:
        ValueError: If a parameter is out of its range, the family is not covered, or an interval is empty.

    Example:
        >>> neuron = dict(decay=0.9, threshold=1.0, reset="zero", family="arctan")
        >>> [round(float(contraction_factor(slope=k, **neuron)), 3) for k in (2.0, 4.0)]
        [0.9, 1.395]
    """
    _check(decay, threshold, reset, family, slope)
    low, high = np.asarray(low, float), np.asarray(high, float)
    if not np.all(low <= high):
        raise ValueError("low must be at most high")
    neuron = {"decay": decay, "threshold": threshold, "reset": reset, "family": family, "slope": slope}
    points = [low, high] + [np.clip(u, low, high) for u in _extrema_of_slope(threshold, reset, family, slope)]
    return np.max(np.abs(np.stack(np.broadcast_arrays(*(carry_over_slope(u, **neuron) for u in points)))), axis=0)


def state_bound(current_bound: npt.ArrayLike, *, decay: float, threshold: float, reset: Reset) -> Array:
    r"""Returns a bound of the potential at all times, from rest, in every mode: proved (Theorem 1).

    .. math:: |u_t| \le \frac{B_I}{1 - \tau} \text{ for resets zero and none,} \qquad
              |u_t| \le \frac{B_I + \vartheta}{1 - \tau} \text{ for reset subtract}

    Args:
        current_bound: :math:`B_I \ge |I_t|`.
        decay: :math:`\tau` in [0, 1).
        threshold: :math:`\vartheta > 0`.
        reset: `zero`, `subtract` or `none`.

    Raises:
        ValueError: If a parameter is out of its range. At decay 1 potentials may grow without end.
    """
    _check(decay, threshold, reset, "arctan", 1.0)
    if np.any(np.asarray(decay) == 1):
        raise ValueError("the state bound needs a decay below 1: a neuron that does not leak adds up its currents; got 1")
    return (np.asarray(current_bound, float) + (threshold if reset == "subtract" else 0)) / (1 - np.asarray(decay, float))


@in_float64
def reachable_potentials(
    current_low: npt.ArrayLike,
    current_high: npt.ArrayLike,
    num_time_steps: int,
    *,
    decay: float,
    threshold: float,
    reset: Reset,
    family: str,
    slope: float,
) -> tuple[Array, Array]:
    r"""Returns an interval that holds the potential at steps 1 to T, in surrogate mode, from rest: proved (Theorem 1).

    .. math:: X_1 = [I_{low}, I_{high}], \qquad X_{t+1} = X_t \cup \bigl(g(X_t) + [I_{low}, I_{high}]\bigr)

    The image :math:`g(X_t)` is exact, so that the end points are reached if the current may take any value at any step and
    the extremum of :math:`g` they come from is reached; it is never wider than `state_bound`.

    Args:
        current_low: Lowest current of each neuron.
        current_high: Highest one.
        num_time_steps: Number of steps T.
        decay: As in `contraction_factor`, as all that follow.
        threshold: Same.
        reset: Same.
        family: Same.
        slope: Same.

    Returns:
        Lowest and highest potential, in the shape of the currents.
    """
    _check(decay, threshold, reset, family, slope)
    neuron = {"decay": decay, "threshold": threshold, "reset": reset, "family": family, "slope": slope}
    current_low, current_high = np.broadcast_arrays(np.asarray(current_low, float), np.asarray(current_high, float))
    extrema = _extrema(neuron)
    low, high = current_low, current_high
    for _ in range(num_time_steps - 1):
        points = [low, high] + [np.clip(u, low, high) for u in extrema]
        images = np.stack([carry_over(u, **neuron) for u in points])
        new_low = np.minimum(low, images.min(0) + current_low)
        new_high = np.maximum(high, images.max(0) + current_high)
        if np.array_equal(new_low, low) and np.array_equal(new_high, high):
            break
        low, high = new_low, new_high
    return low, high


def time_gain(contraction: npt.ArrayLike, num_time_steps: int) -> Array:
    r"""Returns :math:`\sum_{j < T} \kappa^j`, by which a change of the currents of T steps can grow in the potential (Theorem 3).

    It tends to :math:`1 / (1 - \kappa)` for :math:`\kappa < 1`, and is finite for any :math:`\kappa` otherwise.
    """
    contraction = np.asarray(contraction, float)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        series = (1 - contraction**num_time_steps) / (1 - contraction)
    return np.where(np.abs(1 - contraction) < 1e-9, float(num_time_steps), series)


@in_float64
def max_current(margin: float, *, decay: float, threshold: float, reset: Reset, family: str, slope: float) -> float:
    r"""Returns the largest current under which a neuron contracts by :math:`1 - margin` at all times (Theorem 4).

    If every current is at most this, then :math:`\kappa \le 1 - margin` over the reachable potentials; there is no lower limit.
    It is infinite where :math:`\kappa \le 1 - margin` over all reals. Where it is finite it may be too small to spike: a
    neuron of reset zero that reaches its threshold has :math:`\kappa \ge \tau |\vartheta L_1 - \tfrac12|`, of reset subtract
    :math:`|\tau - \vartheta L_1|`.

    Raises:
        ValueError: If the margin is not in [0, 1), or too large for this decay whatever the currents.
    """
    _check(decay, threshold, reset, family, slope)
    neuron = {"decay": decay, "threshold": threshold, "reset": reset, "family": family, "slope": slope}
    if not 0 <= margin < 1:
        raise ValueError(f"margin must be in [0, 1); got {margin!r}")
    allowed = 1 - margin
    below = float(contraction_factor(**neuron, high=0.0))
    if below > allowed:
        raise ValueError(f"an inhibited neuron has contraction factor {below:.4g} at decay {decay:g}, and {allowed:g} is wanted")
    if contraction_factor(**neuron) <= allowed:
        return math.inf
    # From 0 up to its minimum g' falls, and it passes -allowed on the way.
    lowest = _extrema_of_slope(threshold, reset, family, slope)[0]
    ceiling = _bisect(lambda u: carry_over_slope(u, **neuron) > -allowed, 0.0, lowest) * (1 - 1e-12)
    kept = max(0.0, *(float(carry_over(np.minimum(u, ceiling), **neuron)) for u in [ceiling, *_extrema(neuron)]))
    return float(ceiling - kept)


@in_float64
def max_second_derivative(*, decay: float, threshold: float, reset: Reset, family: str, slope: float) -> float:
    r"""Returns :math:`M_2 \ge \sup_u |g''(u)|`, for the smoothness of the loss: proved, not tight (Theorem 5).

    Reset zero: :math:`\tau (2 L_1 + \vartheta L_2 + k\, c)` with :math:`c = \sup_y |y\, \sigma_1''(y)|`; subtract:
    :math:`\vartheta L_2`; none: 0.
    """
    _check(decay, threshold, reset, family, slope)
    sup = _COVERED[family].max_bend
    first, second = FAMILIES[family].max_derivative(slope), FAMILIES[family].max_second_derivative(slope)
    return {"zero": decay * (2 * first + threshold * second + slope * sup), "subtract": threshold * second, "none": 0.0}[reset]
