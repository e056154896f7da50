"""What a study compares: methods as changes of the plain surrogate-forward training, each with its control and its source."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections

from sast_jax import config as config_lib

BASELINE = "baseline"


class Method(NamedTuple):
    """A way of training, or of deploying what another way has trained.

    Attributes:
        title: What it is called in tables.
        changes: Config fields in which it differs from the baseline, by their dotted paths.
        reference: Authors, title, venue and year; and in what it differs from them.
        controls: Names of the methods it is compared with, seed by seed. The first is the *matched* one, of equal gradient
            evaluations, if there is one. A study leaves out those that it does not have.
        calibrates: Name of the method whose trained networks it calibrates; it is not trained itself. Empty: it is.
        epochs: Factor of the epochs of the baseline, whose product is rounded.
        grid: Fields that are selected on the validation part, each with its values, the preferred one of equals first; all
            combinations are trained. Values of `num_epochs` are those of the baseline, before the factor.
        reported: What its source reports, for a column beside the measured numbers.
    """

    title: str
    changes: Mapping[str, Any] = {}  # Never changed.
    reference: str = ""
    controls: Sequence[str] = ()
    calibrates: str = ""
    epochs: float = 1
    grid: Mapping[str, Sequence[Any]] = {}
    reported: str = ""

    def lengthen(self, num_epochs: int) -> int:
        """Returns its epochs, given those of the baseline."""
        return round(num_epochs * self.epochs)


class Study(NamedTuple):
    """Methods on one data set.

    Attributes:
        methods: Methods by name; one of them is `baseline`, without changes.
        seeds: Seeds of the runs that are tested; at least 2.
        selection_seeds: Seeds of the runs that choose among the values of the grids; none of `seeds`.
        question: One sentence for the head of the results page.
        folds: Number of parts of the data for cross-validation: the run of the k-th seed is tested on part k, counted round and
            round, and trained on the others. All settings are selected by the same validation part, which is never tested; what
            they are selected from has been trained on recordings that other folds test. 0: no folds, but the data set's own
            test part.
    """

    methods: Mapping[str, Method]
    seeds: Sequence[int] = (0, 1, 2, 3, 4)
    selection_seeds: Sequence[int] = (100, 101)
    question: str = "Does it close the transfer gap, and what closes it?"
    folds: int = 0

    def fold(self, number: int) -> dict[str, tuple[int, int]]:
        """Returns the config fields of the fold of the `number`-th seed, from 0; none without cross-validation."""
        return {"dataset.fold": (number % self.folds, self.folds)} if self.folds else {}


def change(config: ml_collections.ConfigDict, name: str) -> ml_collections.ConfigDict:
    """Returns the baseline's config with the changes and the epochs of a method of `METHODS`.

    Raises:
        ValueError: If no method of that name is trained.
    """
    trained = [each for each, method in METHODS.items() if not method.calibrates]
    if name not in trained:
        raise ValueError(f"the variant must be one of {', '.join(trained)}; got {name!r}")
    method = METHODS[name]
    with config.unlocked():
        for key, value in method.changes.items():
            config_lib.set_field(config, key, value)
        config.num_epochs = method.lengthen(config.num_epochs)
    return config


_RADII = {"sam.rho": (0.1, 0.2, 0.4)}
_SAM = "Foret, Kleiner, Mobahi, Neyshabur. Sharpness-Aware Minimization for Efficiently Improving Generalization. ICLR 2021"
_SAST = "Nicholson. Sharpness Aware Surrogate Training for Spiking Neural Networks. arXiv:2603.18039, 2026"
_STRAIGHT_THROUGH = "Neftci, Mostafa, Zenke. Surrogate Gradient Learning in Spiking Neural Networks. IEEE SPM 2019"
_CALIBRATION = (
    "thresholds and gains of the hard network set on the validation part, weights frozen (`sast_jax.evaluation.calibration`)"
)

METHODS: dict[str, Method] = {
    BASELINE: Method("surrogate-forward", reference="plain training on smooth spikes"),
    "baseline_twice": Method(
        "surrogate-forward, twice the epochs",
        epochs=2,
        controls=(BASELINE,),
        reference="control of equal gradient evaluations for all that take two a step",
    ),
    "sast": Method(
        "SAST, independent batch",
        {"sam.rho": 0.2},
        grid=_RADII,
        controls=("baseline_twice", BASELINE, "same_batch", "noise", "straight_through"),
        reference=_SAST,
    ),
    "same_batch": Method(
        "SAST, same batch",
        {"sam.rho": 0.2, "sam.perturbation": "same"},
        grid=_RADII,
        controls=("baseline_twice", BASELINE),
        reference=f"{_SAM}, on smooth spikes",
    ),
    "asam": Method(
        "adaptive SAM",
        {"sam.rho": 0.5, "sam.adaptive": "element"},
        grid={"sam.rho": (0.25, 0.5, 1.0)},
        controls=("baseline_twice", BASELINE, "sast"),
        reference="Kwon, Kim, Park, Choi. ASAM: Adaptive Sharpness-Aware Minimization. ICML 2021; with an independent batch",
    ),
    "noise": Method(
        "random weight noise",
        {"sam.rho": 0.2, "sam.perturbation": "noise"},
        grid={"sam.rho": (0.2, 0.4, 0.8)},
        controls=(BASELINE,),
        reference="the radius of SAM in a random direction: normal noise scaled to norm rho, drawn anew at each step; a control",
    ),
    "stale": Method(
        "perturbation by the gradient before",
        {"sam.rho": 0.2, "sam.perturbation": "stale"},
        grid=_RADII,
        controls=(BASELINE, "sast", "noise"),
        reference="after Ji et al. A Single-Step, Sharpness-Aware Minimization is All You Need to Achieve Efficient and Accurate "
        "Sparse Training. NeurIPS 2024 (from its abstract); Becker, Altrock, Risse. Momentum-SAM. arXiv:2401.12033, 2024, moves "
        "against the momentum instead",
    ),
    "weight_decay": Method(
        "weight decay",
        {"optimizer.name": "adamw", "optimizer.weight_decay": 1e-2},
        grid={"optimizer.weight_decay": (1e-3, 1e-2, 1e-1)},
        controls=(BASELINE,),
        reference="Loshchilov, Hutter. Decoupled Weight Decay Regularization. ICLR 2019",
    ),
    "steep_slope": Method(
        "steeper slope",
        {"network.slope": 10.0},
        grid={"network.slope": (5.0, 10.0, 20.0)},
        controls=(BASELINE, "sast"),
        reference="smooth spikes that are closer to hard ones throughout; a control",
    ),
    "slope_annealing": Method(
        "slope annealing",
        {"spikes.initial_slope": 2.0, "network.slope": 10.0},
        grid={"network.slope": (5.0, 10.0, 20.0)},
        controls=(BASELINE, "steep_slope", "straight_through"),
        reference="Chung, Ahn, Bengio. Hierarchical Multiscale Recurrent Neural Networks. ICLR 2017 (there with hard units "
        "forward; here smooth ones). The slope rises geometrically; surrogate accuracy is that at the final slope",
    ),
    "mixing": Method(
        "stochastic hard and smooth spikes",
        {"spikes.hard_share": 0.8},
        grid={"spikes.hard_share": (0.2, 0.5, 0.8)},
        controls=(BASELINE, "straight_through"),
        reference="Wang, Jiang, Lian, Yan, Tang. Adaptive Smoothing Gradient Learning for Spiking Neural Networks. ICML 2023. "
        "Forward each neuron of a sample is hard with a fixed probability, else smooth, drawn anew at each optimizer step and "
        "equal over time steps; backward all have the smooth derivative. Unlike there, slope and share are fixed: the slope is "
        "not learnt and the share does not change",
    ),
    "straight_through": Method(
        "straight-through",
        {"mode": "straight_through"},
        controls=(BASELINE,),
        reference=_STRAIGHT_THROUGH,
    ),
    "straight_through_twice": Method(
        "straight-through, twice the epochs",
        {"mode": "straight_through"},
        epochs=2,
        controls=("baseline_twice", "straight_through"),
        reference=_STRAIGHT_THROUGH,
    ),
    "straight_through_steep": Method(
        "straight-through, steeper slope",
        {"mode": "straight_through", "network.slope": 5.0},
        grid={"network.slope": (5.0, 10.0)},
        controls=(BASELINE, "straight_through"),
        reference=f"{_STRAIGHT_THROUGH}, with the derivative of smooth spikes that are closer to hard ones",
    ),
    "straight_through_longer": Method(
        "straight-through, steeper slope, a quarter more epochs",
        {"mode": "straight_through", "network.slope": 5.0},
        epochs=1.25,
        grid={"network.slope": (5.0, 10.0)},
        controls=(BASELINE, "straight_through_steep"),
        reference=f"{_STRAIGHT_THROUGH}; what 1.25 times the gradients of plain training buy",
    ),
    "straight_through_sam": Method(
        "straight-through + SAM",
        {"mode": "straight_through", "sam.rho": 0.1},
        grid={"sam.rho": (0.05, 0.1, 0.2)},
        controls=("straight_through_twice", "straight_through", "sast"),
        reference=f"{_SAM}, in straight-through mode; the gradient is not that of the loss, so no theory holds",
    ),
    "finish": Method(
        "surrogate-forward, straight-through finish",
        {"spikes.finish": 0.25},
        controls=(BASELINE, "straight_through"),
        reference="plain training whose last quarter of the steps is in straight-through mode; ours, the control of SAST's",
    ),
    "sast_finish": Method(
        "SAST, straight-through finish",
        {"sam.rho": 0.2, "spikes.finish": 0.25},
        grid=_RADII,
        controls=("straight_through_twice", "sast", "straight_through", "finish"),
        reference="SAST whose last quarter of the steps is in straight-through mode; ours",
    ),
    "sast_steep": Method(
        "SAST, steeper slope",
        {"sam.rho": 0.2, "network.slope": 5.0},
        grid={"network.slope": (5.0, 10.0)},
        controls=("baseline_twice", "sast", "steep_slope"),
        reference=f"{_SAST}, on smooth spikes that are closer to hard ones; ours",
    ),
    "baseline_calibrated": Method(
        "surrogate-forward + calibration", calibrates=BASELINE, controls=(BASELINE, "straight_through"), reference=_CALIBRATION
    ),
    "sast_calibrated": Method(
        "SAST + calibration",
        calibrates="sast",
        controls=("baseline_twice", "sast", "baseline_calibrated", "straight_through"),
        reference=_CALIBRATION,
    ),
    "straight_through_calibrated": Method(
        "straight-through + calibration", calibrates="straight_through", controls=("straight_through",), reference=_CALIBRATION
    ),
}
"""The methods and controls of the studies that come with the package, each with the grid of what is its own.

Surrogate accuracy is always that at `network.slope`, so of slope annealing at the last and steepest one.
"""


def with_grid(grid: Mapping[str, Sequence[Any]], reported: Mapping[str, str] | None = None) -> dict[str, Method]:
    """Returns `METHODS`, each of which selects among these values as well as its own.

    Args:
        grid: Fields of all methods, each with its values, the preferred one of equals first.
        reported: What the source of a method reports, by its name.
    """
    return {
        name: method._replace(grid={} if method.calibrates else {**grid, **method.grid}, reported=(reported or {}).get(name, ""))
        for name, method in METHODS.items()
    }
