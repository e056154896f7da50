"""Study on simulated gestures: does SAST close the transfer gap, and is it SAM that closes it?

    sast-jax sweep --config=configs/study_gestures.py --workdir=runs/study_gestures
    sast-jax train --config=configs/study_gestures.py:slope_annealing --workdir=runs/one  # one of its methods

Every method is a variant: the baseline of configs/gestures.py with the changes that `sast_jax.experiments.METHODS` lists, each
with its reference and its controls.
"""

import runpy
from pathlib import Path

from sast_jax.experiments import Study, change, with_grid

_get_base = runpy.run_path(str(Path(__file__).with_name("gestures.py")))["get_config"]


def get_config(variant=""):
    """Returns the config of a method."""
    return change(_get_base("baseline"), variant)


def get_study():
    """Returns the methods, each with all combinations of these values and of those of its own; the first of equals is taken."""
    grid = {"optimizer.learning_rate": (3e-3, 6e-3), "num_epochs": (16, 32)}  # Epochs: the baseline's.
    return Study(with_grid(grid), seeds=(0, 1, 2, 3, 4), selection_seeds=(100, 101))
