"""The methods of configs/study_nmnist_tuned.py on simulated gestures, over folds of persons, offline.

    sast-jax sweep --config=configs/study_gestures_tuned.py --workdir=runs/study_gestures_tuned --processes=2

Each of the five seeds is tested on other persons. Each method's learning rate is selected together with what is its own; which
methods are here was settled on N-MNIST, but for `straight_through_longer`, added when all others had been seen here. Warm-up and
first grid were settled by trial runs on the validation part; five methods chose the end of that, 48e-3, so that two higher rates
were added, after the test accuracies had been seen. Its 285 runs take two CPU cores about 55 minutes.
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
