"""Convolutional network on N-MNIST recordings, the papers' protocol: reset zero, hard spikes by swap only.

    sast-jax train --config=configs/nmnist.py --config.dataset.root=FOLDER --workdir=runs/nmnist

FOLDER holds Train/<digit>/*.bin and Test/<digit>/*.bin, whole or in part; with --config.dataset.download=true tonic
downloads the whole set (1.2 GB) there first.

Cost and result on a subset of 600 training, 100 validation and 200 test recordings: baseline 131 s, SAST 255 s on two CPU cores.
Test accuracy with hard spikes, mean of seeds 0 to 2 and its standard error: baseline 79.8 ± 1.8 %, SAST 86.2 ± 0.6 %,
straight-through 90.3 ± 0.3 %; transfer gap 8.8 ± 2.0, 1.0 ± 1.0 and -26.7 ± 1.6 points
(benchmarks/results/transfer_gap_nmnist.md).
"""

import runpy
from pathlib import Path

_digits = runpy.run_path(str(Path(__file__).with_name("digits.py")))
VARIANTS = _digits["VARIANTS"]


def get_config(variant=""):
    """Returns the config of a variant of configs/digits.py, which explains the fields; without one, of the pair."""
    config = _digits["get_config"](variant)
    config.dataset.update(name="nmnist", num_validation=100, num_test=0)
    config.network.update(features=(12, 32), kernel_size=5)
    config.update(num_epochs=40, evaluate_every_epochs=5, checkpoint_every_epochs=5)
    return config
