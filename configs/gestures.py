"""Convolutional network on simulated persons who show eleven motions: what takes memory to tell, trained anywhere, offline.

    sast-jax train --config=configs/gestures.py --workdir=runs/gestures

Clockwise and counter-clockwise circles show the same frames in opposite order, so a network without memory, or with frames in
random order, cannot tell them (benchmarks/results/memory.md). Of 29 persons the last six are the test part; validation takes
whole persons too.
"""

import runpy
from pathlib import Path

_digits = runpy.run_path(str(Path(__file__).with_name("digits.py")))
VARIANTS = _digits["VARIANTS"]


def get_config(variant=""):
    """Returns the config of a variant of configs/digits.py, which explains the fields; without one, of the pair."""
    config = _digits["get_config"](variant)
    config.dataset.update(name="gestures", num_validation=132, num_test=0)  # Three persons, and six; 880 recordings are left.
    config.network.update(kernel_size=5, readout_decay=0.95)  # Early outputs count more than late ones: order is told.
    config.num_epochs = 16
    if variant == "cheap_sast":
        config.sam.perturbation_batch_size = 8
    return config
