"""The methods of configs/study_nmnist_tuned.py on simulated gestures, over folds of persons, offline.

    sast-jax sweep --config=configs/study_gestures_tuned.py --workdir=runs/study_gestures_tuned --processes=2

Each of the five seeds is tested on other persons. Each method's learning rate is selected together with what is its own; the
warm-up and the grid were settled by trial runs on the validation part, and which methods are here on N-MNIST. Its 176 runs take
two CPU cores that do nothing else about half an hour, estimated from single ones.
"""

import runpy
from pathlib import Path

from sast_jax.experiments import Study, change, with_grid

_get_base = runpy.run_path(str(Path(__file__).with_name("gestures.py")))["get_config"]
_NAMES = runpy.run_path(str(Path(__file__).with_name("study_nmnist_tuned.py")))["NAMES"]


def get_config(variant=""):
    """Returns the config of a method."""
    config = _get_base("baseline")
    config.dataset.downsample = 2  # 16 x 16 pixels: a quarter of the time.
    config.optimizer.warmup = 0.15
    config.update(evaluate_every_epochs=16, checkpoint_every_epochs=16)
    return change(config, variant)


def get_study():
    """Returns the methods, each with all combinations of these values and of those of its own; the first of equals is taken."""
    methods = with_grid({"optimizer.learning_rate": (24e-3, 12e-3, 48e-3, 96e-3, 192e-3)})
    methods = {name: method for name, method in methods.items() if name in {*_NAMES, "straight_through_longer"}}
    return Study(methods, seeds=(0, 1, 2, 3, 4), selection_seeds=(100, 101), folds=5)
