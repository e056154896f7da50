"""Study on DVS128 Gesture recordings: does SAST close the transfer gap, and is it SAM that closes it?

    sast-jax sweep --config=configs/study_dvs_gesture.py --config.dataset.root=FOLDER --workdir=runs/study_dvs_gesture
    sast-jax train --config=configs/study_dvs_gesture.py:slope_annealing --config.dataset.root=FOLDER --workdir=runs/one

Every method is a variant: small_baseline of configs/dvs_gesture.py, whose network is of the size that the papers' 63 % suggest,
with the changes that `sast_jax.experiments.METHODS` lists, each with its reference and its controls. A field set on the command
line is not selected any more, which is how to make the study smaller: with --config.optimizer.learning_rate=1e-3
--config.num_epochs=100 only what is each method's own is. It has not been run: only ten recordings were at hand.
"""

import runpy
from pathlib import Path

from sast_jax.experiments import Study, change, with_grid

_get_base = runpy.run_path(str(Path(__file__).with_name("dvs_gesture.py")))["get_config"]


def get_config(variant=""):
    """Returns the config of a method."""
    return change(_get_base("small_baseline"), variant)


def get_study():
    """Returns the methods, each with all combinations of these values and of those of its own; the first of equals is taken."""
    grid = {"optimizer.learning_rate": (1e-3, 2e-3), "num_epochs": (50, 100)}  # Epochs: the baseline's.
    reported = {"baseline": "hard 31.8", "sast": "rho 0.40: hard 63.3"}
    return Study(with_grid(grid, reported), seeds=(0, 1, 2, 3, 4), selection_seeds=(100, 101))
