"""Study on simulated gestures by cross-validation over persons, at half the resolution: two CPU cores, offline.

    sast-jax sweep --config=configs/study_gestures_small.py --workdir=runs/study_gestures_small --processes=2

As configs/study_digits_small.py: each of the five seeds is tested on other persons, and only what is each method's own is
selected.
"""

import runpy
from pathlib import Path

from sast_jax.experiments import METHODS, Study, change

_get_base = runpy.run_path(str(Path(__file__).with_name("gestures.py")))["get_config"]


def get_config(variant=""):
    """Returns the config of a method."""
    config = _get_base("baseline")
    config.dataset.downsample = 2  # 16 x 16 pixels: a quarter of the time.
    config.update(evaluate_every_epochs=16, checkpoint_every_epochs=16)
    return change(config, variant)


def get_study():
    """Returns the methods, each with all combinations of the values of its own; the first of equals is taken."""
    return Study(METHODS, seeds=(0, 1, 2, 3, 4), selection_seeds=(100, 101), folds=5)
