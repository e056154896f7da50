"""Study on N-MNIST recordings: does SAST close the transfer gap, and is it SAM that closes it?

    sast-jax sweep --config=configs/study_nmnist.py --config.dataset.root=FOLDER --workdir=runs/study_nmnist
    sast-jax train --config=configs/study_nmnist.py:slope_annealing --config.dataset.root=FOLDER --workdir=runs/one

Every method is a variant: the baseline of configs/nmnist.py with the changes that `sast_jax.experiments.METHODS` lists, each
with its reference and its controls. A field set on the command line is not selected any more, which is how to make the study
smaller: with --config.optimizer.learning_rate=3e-3 --config.num_epochs=40 only what is each method's own is.
"""

import runpy
from pathlib import Path

from sast_jax.experiments import Study, change, with_grid

_get_base = runpy.run_path(str(Path(__file__).with_name("nmnist.py")))["get_config"]


def get_config(variant=""):
    """Returns the config of a method."""
    return change(_get_base("baseline"), variant)


def get_study():
    """Returns the methods, each with all combinations of these values and of those of its own; the first of equals is taken."""
    grid = {"optimizer.learning_rate": (3e-3, 1.5e-3), "num_epochs": (20, 40)}  # Epochs: the baseline's.
    reported = {"baseline": "hard 65.7, gap 30.3", "sast": "rho 0.30: hard 94.7, gap 2.5; epoch time 2.08x"}
    return Study(with_grid(grid, reported), seeds=(0, 1, 2, 3, 4), selection_seeds=(100, 101))
