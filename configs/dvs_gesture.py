"""Convolutional network on DVS128 Gesture recordings: 64 x 64 pixels, the first 1.5 s in 20 frames.

    sast-jax train --config=configs/dvs_gesture.py --config.dataset.root=FOLDER --workdir=runs/dvs_gesture

FOLDER holds the recordings as tonic distributes them (ibmGestureTrain/, ibmGestureTest/) or as their authors do
(userNN_<light>.aedat with userNN_<light>_labels.csv), whole or in part. Users 24 to 29 are the test part. The authors' files
hold 1,176 training and 288 test gestures, tonic's 1,077 and 264.

No accuracy has been measured with this config: only ten recordings were at hand, on which it was seen to run. Convolutional
networks of about this size are published at 93 to 97 % test accuracy (93.6 % by Shrestha, Orchard, SLAYER, NeurIPS 2018). The
variant small (and small_baseline, small_sast, ...) is the network of configs/nmnist.py on 32 x 32 pixels, the size that the 63 %
of the SAST papers suggest.
"""

import runpy
from pathlib import Path

_digits = runpy.run_path(str(Path(__file__).with_name("digits.py")))
VARIANTS = _digits["VARIANTS"]
SMALL = "small"


def get_config(variant=""):
    """Returns the config of a variant of configs/digits.py, which explains the fields, or small_... of one; else of the pair."""
    is_small = variant.partition("_")[0] == SMALL
    training = variant.removeprefix(SMALL).removeprefix("_") if is_small else variant
    if training not in ("", *VARIANTS):
        raise ValueError(
            f"the variant must be one of {', '.join(VARIANTS)}, or none for the pair, each also as {SMALL}_...; got {variant!r}"
        )
    config = _digits["get_config"](training)
    if is_small and not training:
        config.variants = tuple(f"{SMALL}_{name}" for name in config.variants)
    # Frames of 75 ms; 128 pixels become 64. Whole persons are drawn until there are at least 96 recordings.
    config.dataset.update(name="dvs_gesture", num_time_steps=20, duration=1.5, downsample=2, num_validation=96, num_test=0)
    config.augmentation.update(max_shift=4, time_jitter=0.1, drop=0.1)
    config.network.update(features=(32, 64, 128, 128))
    config.optimizer.learning_rate = 1e-3
    config.update(batch_size=16, num_epochs=100, evaluate_every_epochs=5, checkpoint_every_epochs=5)
    if is_small:
        config.dataset.downsample = 4  # 32 pixels.
        config.augmentation.max_shift = 2
        config.network.update(features=(12, 32), kernel_size=5)
    return config
