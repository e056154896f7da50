import itertools
import math

import numpy as np
import pytest

from sast_jax.spikes import FAMILIES
from sast_jax.theory.neuron import (
    carry_over_slope,
    contraction_factor,
    max_current,
    max_second_derivative,
    reachable_potentials,
    state_bound,
    time_gain,
)

RESETS = ("zero", "subtract", "none")
COMBINATIONS = list(itertools.product(FAMILIES, RESETS))
NUM_RANDOM = 1500  # Per combination; there are 9.

# Families written out again in numpy: value and derivative.
SIGMAS = {
    "arctan": (lambda x, k: 0.5 + np.arctan(np.pi / 2 * k * x) / np.pi, lambda x, k: 0.5 * k / (1 + (np.pi / 2 * k * x) ** 2)),
    "logistic": (
        lambda x, k: 0.5 + 0.5 * np.tanh(k * x / 2),
        lambda x, k: 0.25 * k / np.cosh(np.clip(k * x / 2, -300, 300)) ** 2,
    ),
    "fast_sigmoid": (lambda x, k: 0.5 + 0.5 * k * x / (1 + k * np.abs(x)), lambda x, k: 0.5 * k / (1 + k * np.abs(x)) ** 2),
}


def step_map(u, family, reset, decay, threshold, slope):
    sigma, _ = SIGMAS[family]
    s = sigma(u - threshold, slope)
    return {"zero": decay * u * (1 - s), "subtract": decay * u - threshold * s, "none": decay * u}[reset]


def step_map_slope(u, family, reset, decay, threshold, slope):
    sigma, derivative = SIGMAS[family]
    s, d = sigma(u - threshold, slope), derivative(u - threshold, slope)
    return {"zero": decay * (1 - s - u * d), "subtract": decay - threshold * d, "none": decay + 0 * u}[reset]


def random_neurons(seed, number=NUM_RANDOM):
    rng = np.random.default_rng(seed)
    return rng, {
        "decay": rng.uniform(0, 1, number),
        "threshold": rng.uniform(0.1, 3, number),
        "slope": np.exp(rng.uniform(np.log(0.3), np.log(30), number)),
    }


@pytest.mark.parametrize(("family", "reset"), COMBINATIONS)
def test_contraction_factor_is_the_supremum_over_a_fine_grid(family, reset):
    rng, neurons = random_neurons(0, 200)
    ends = np.sort(rng.normal(0, 3, (2, 200)), axis=0)
    for low, high in ((np.full(200, -math.inf), np.full(200, math.inf)), ends):
        factor = contraction_factor(family=family, reset=reset, low=low, high=high, **neurons)
        # Fine where the slope of the surrogate makes g' change, and far out.
        scaled = np.sinh(np.linspace(-12, 12, 20_001))[:, None] / neurons["slope"]
        grid = np.clip(neurons["threshold"] + scaled, low, high)
        sizes = np.abs(step_map_slope(grid, family, reset, **neurons)).max(0)
        assert (sizes <= factor * (1 + 1e-9) + 1e-12).all()
        np.testing.assert_allclose(sizes, factor, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize(
    ("family", "slope", "expected"),
    [("logistic", k, v) for k, v in ((4, 1.0025), (5, 1.0009), (6, 1.16), (8, 1.62), (10, 2.10), (25, 5.79))]
    + [("arctan", k, v) for k, v in ((2, 1.0), (4, 1.55), (5, 2.04), (8, 3.53), (10, 4.52))],
)
def test_contraction_factor_is_that_of_the_derivation_page(family, slope, expected):
    factor = contraction_factor(decay=1.0, threshold=1.0, reset="zero", family=family, slope=float(slope))
    assert factor == pytest.approx(expected, abs=5e-3 if expected > 1.1 else 5e-5)


def test_closed_forms_of_the_contraction_factor():
    for slope, threshold in itertools.product((0.5, 2.0, 7.0), (0.3, 1.0, 2.0)):
        neuron = {"decay": 0.8, "threshold": threshold, "slope": slope}
        c = math.pi / 2 * slope * threshold
        arctan, fast = 0.8 * max(1, (c - math.atan(c)) / math.pi), 0.8 * max(1, (slope * threshold - 1) / 2)
        assert contraction_factor(**neuron, reset="zero", family="arctan") == pytest.approx(arctan, rel=1e-12)
        assert contraction_factor(**neuron, reset="zero", family="fast_sigmoid") == pytest.approx(fast, rel=1e-12)
        for family in FAMILIES:
            steep = threshold * FAMILIES[family].max_derivative(slope)
            subtract = contraction_factor(**neuron, reset="subtract", family=family)
            assert subtract == pytest.approx(max(0.8, abs(0.8 - steep)), rel=1e-12)
            at_threshold = abs(carry_over_slope(threshold, **neuron, reset="zero", family=family))
            assert at_threshold == pytest.approx(0.8 * abs(steep - 0.5), rel=1e-12)


@pytest.mark.parametrize(("family", "reset"), COMBINATIONS)
def test_random_neurons_stay_in_bounds_and_approach_each_other(family, reset):
    rng, neurons = random_neurons(1)
    num_time_steps = 12
    centre, spread = rng.normal(0, 1.5, NUM_RANDOM), rng.exponential(1.0, NUM_RANDOM)
    # Extreme currents as often as others: bounds are reached by them.
    draw = rng.uniform(-1, 1, (2, num_time_steps, NUM_RANDOM))
    draw = np.where(rng.random(draw.shape) < 0.4, np.sign(draw), draw)
    first, second = currents = centre + spread * draw
    kappa_anywhere = contraction_factor(family=family, reset=reset, **neurons)
    low, high = reachable_potentials(centre - spread, centre + spread, num_time_steps, family=family, reset=reset, **neurons)
    kappa = contraction_factor(family=family, reset=reset, low=low, high=high, **neurons)
    assert (kappa <= kappa_anywhere).all()
    bound = state_bound(np.abs(currents).max((0, 1)), reset=reset, decay=neurons["decay"], threshold=neurons["threshold"])
    widest = state_bound(np.abs(centre) + spread, reset=reset, decay=neurons["decay"], threshold=neurons["threshold"])
    assert (np.maximum(-low, high) <= widest * (1 + 1e-12)).all()
    steepest = FAMILIES[family].max_derivative(neurons["slope"])
    u, v = first[0], second[0]
    for t in range(num_time_steps):
        if t:
            # From where two trajectories are, equal currents bring them together.
            gap = np.abs(step_map(u, family, reset, **neurons) - step_map(v, family, reset, **neurons))
            assert (gap <= kappa * np.abs(u - v) + 1e-12).all()
            u, v = (step_map(x, family, reset, **neurons) + now for x, now in ((u, first[t]), (v, second[t])))
        assert ((low - 1e-9 <= np.minimum(u, v)) & (np.maximum(u, v) <= high + 1e-9)).all()
        assert (np.maximum(np.abs(u), np.abs(v)) <= bound + 1e-9).all()
        change = np.abs(first[: t + 1] - second[: t + 1]).max(0)
        spikes = [SIGMAS[family][0](x - neurons["threshold"], neurons["slope"]) for x in (u, v)]
        assert (np.abs(u - v) <= time_gain(kappa, t + 1) * change * (1 + 1e-9) + 1e-12).all()
        assert (np.abs(spikes[0] - spikes[1]) <= steepest * time_gain(kappa, t + 1) * change * (1 + 1e-9) + 1e-12).all()


@pytest.mark.parametrize("mode", ["surrogate", "hard"])
@pytest.mark.parametrize("reset", RESETS)
def test_state_bound_holds_with_hard_spikes_too_and_is_approached(reset, mode):
    def run(current, decay, threshold):
        u = s = np.zeros_like(current)
        largest = 0.0
        for _ in range(300):
            u = {"zero": decay * u * (1 - s), "subtract": decay * u - threshold * s, "none": decay * u}[reset] + current
            s = (u > threshold).astype(float) if mode == "hard" else SIGMAS["logistic"][0](u - threshold, 5.0)
            largest = np.maximum(largest, np.abs(u))
        return largest

    current = np.linspace(-2, 2, 41)
    bound = state_bound(np.abs(current), decay=0.9, threshold=0.7, reset=reset)
    sizes = run(current, 0.9, 0.7)
    assert (sizes <= bound).all()
    assert sizes[0] > 0.7 * bound[0]  # Steady inhibition.


def test_state_bound_refuses_a_decay_of_1():
    with pytest.raises(ValueError, match="needs a decay below 1"):
        state_bound(1.0, decay=1.0, threshold=1.0, reset="zero")


@pytest.mark.parametrize(("family", "reset"), COMBINATIONS)
def test_reachable_potentials_are_reached(family, reset):
    neuron = {"decay": 0.9, "threshold": 1.0, "slope": 3.0}
    low, high = reachable_potentials(-0.4, 0.8, 4, family=family, reset=reset, **neuron)
    u = np.linspace(-0.4, 0.8, 201)
    reached = [u.min()], [u.max()]
    for _ in range(3):
        u = (step_map(u, family, reset, **neuron)[:, None] + np.linspace(-0.4, 0.8, 201)).ravel()
        u = np.linspace(u.min(), u.max(), 2001)  # The image of an interval is one.
        reached[0].append(u.min()), reached[1].append(u.max())
    np.testing.assert_allclose([low, high], [min(reached[0]), max(reached[1])], atol=2e-3)


@pytest.mark.parametrize(("family", "reset"), [c for c in COMBINATIONS if c[1] != "none"])
@pytest.mark.parametrize("margin", [0.07])
def test_largest_current_is_the_largest_that_contracts(family, reset, margin):
    neuron = {"decay": 0.85, "threshold": 0.8, "family": family, "reset": reset}
    for slope in (1.0, 12.0):
        limit = max_current(margin, slope=slope, **neuron)
        assert math.isinf(limit) == (contraction_factor(slope=slope, **neuron) <= 1 - margin)
        if math.isfinite(limit):
            assert limit > 0
            for share, holds in ((1.0, True), (1.03, False)):
                low, high = reachable_potentials(-5.0, share * limit, 200, slope=slope, **neuron)
                factor = contraction_factor(slope=slope, low=low, high=high, **neuron)
                assert (factor <= 1 - margin + 1e-9) == holds
    assert math.isinf(max_current(margin, slope=1.0, **neuron))
    assert math.isfinite(max_current(margin, slope=12.0, **neuron))


def test_margin_that_no_current_can_hold_is_refused():
    with pytest.raises(ValueError, match=r"an inhibited neuron has contraction factor 0\.9 at decay 0\.9, and 0\.8 is wanted"):
        max_current(0.2, decay=0.9, threshold=1.0, reset="zero", family="arctan", slope=2.0)


@pytest.mark.parametrize(("family", "reset"), COMBINATIONS)
def test_second_derivative_of_the_state_map_is_bounded(family, reset):
    for slope, threshold in itertools.product((0.5, 2.0, 10.0), (0.3, 1.0, 2.5)):
        neuron = {"decay": 0.9, "threshold": threshold, "slope": slope}
        u = threshold + np.linspace(-40, 40, 400_001) / slope
        measured = np.abs(np.diff(step_map_slope(u, family, reset, **neuron)) / np.diff(u)).max()
        bound = max_second_derivative(family=family, reset=reset, **neuron)
        assert measured <= bound * (1 + 1e-6) + 1e-9
        assert measured >= 0.4 * bound


@pytest.mark.parametrize(("family", "sup"), [("arctan", 1 / 4), ("logistic", 0.16), ("fast_sigmoid", 4 / 27)])
def test_supremum_of_y_times_the_second_derivative(family, sup):
    y = np.linspace(1e-3, 30, 3_000_001)
    middle = (y[1:] + y[:-1]) / 2
    sizes = np.abs(middle * np.diff(SIGMAS[family][1](y, 1.0)) / np.diff(y))
    assert 0.999 * sup <= sizes.max() <= sup * (1 + 1e-7)


def test_time_gain_is_the_geometric_sum():
    for kappa in (0.0, 0.5, 1.0, 1.3):
        assert time_gain(kappa, 7) == pytest.approx(sum(kappa**j for j in range(7)))
    assert time_gain(0.5, 10_000) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decay": 1.1}, "decay must be in"),
        ({"threshold": 0.0}, "must be positive"),
        ({"reset": "soft"}, "reset must be one of"),
        ({"family": "relu"}, "family must be one of"),
        ({"low": 1.0, "high": 0.0}, "low must be at most high"),
    ],
)
def test_what_is_not_covered_is_refused(change, message):
    neuron = {"decay": 0.9, "threshold": 1.0, "reset": "zero", "family": "arctan", "slope": 2.0}
    with pytest.raises(ValueError, match=message):
        contraction_factor(**neuron | change)
