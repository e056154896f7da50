"""Study on few N-MNIST recordings by cross-validation, at half the resolution: two CPU cores finish it in an hour.

    sast-jax sweep --config=configs/study_nmnist_small.py --config.dataset.root=FOLDER --workdir=runs/study_small --processes=2

Unlike in configs/study_nmnist.py each of the five seeds is tested on another fifth of the recordings and trained on the others.
Those of the validation part are in no fold, and all seeds select by them. There are 30 epochs; learning rate and epochs are not
selected, only what is each method's own. FOLDER holds a part of the recordings.
"""

import runpy
from pathlib import Path

from sast_jax.experiments import METHODS, Study, change

_get_base = runpy.run_path(str(Path(__file__).with_name("nmnist.py")))["get_config"]


def get_config(variant=""):
    """Returns the config of a method."""
    config = _get_base("baseline")
    config.dataset.downsample = 2  # 17 x 17 pixels: a quarter of the time.
    config.update(num_epochs=30, evaluate_every_epochs=30, checkpoint_every_epochs=30)
    return change(config, variant)


def get_study():
    """Returns the methods, each with all combinations of the values of its own; the first of equals is taken."""
    return Study(METHODS, seeds=(0, 1, 2, 3, 4), selection_seeds=(100, 101), folds=5)
