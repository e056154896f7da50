"""What configs/study_nmnist_tuned.py recommends for hard spikes on few N-MNIST recordings, at the cost of plain training.

    sast-jax train --config=configs/best_nmnist.py --config.dataset.root=FOLDER --workdir=runs/best

Of the methods that take at most 1.3 times the baseline's gradients it is the best with hard spikes on validation recordings.
There, at half the resolution and 30 epochs, it reached 91.5 ± 0.8 % on the test recordings of five folds, 1.2 ± 0.9 points below
the best of any method in any mode (docs/study_nmnist_tuned/results.md). At full resolution it has not been measured.
"""

import runpy
from pathlib import Path

from sast_jax.experiments import change

_get_base = runpy.run_path(str(Path(__file__).with_name("nmnist.py")))["get_config"]


def get_config(variant=""):
    """Returns the config; it has no variants."""
    if variant:
        raise ValueError(f"there are no variants; got {variant!r}")
    config = change(_get_base("baseline"), "straight_through")
    config.optimizer.learning_rate = 24e-3
    return config
