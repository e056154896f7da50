"""A shift, a downsampling or a pool that leaves nothing of an axis is refused; the largest that leaves something is not."""

import jax
import numpy as np
import pytest

from sast_jax import SpikingConvNet, data
from sast_jax.config import load_configs
from sast_jax.data import bin_events, make_augment
from sast_jax.data.batches import Batch
from sast_jax.data.events import EVENT_DTYPE
from sast_jax.errors import UserError


def shifted(max_shift, height, width):
    batch = Batch(np.ones((2, 64, height, width, 2), np.uint8), np.zeros(64, np.int32), np.ones(64, bool))
    return make_augment(max_shift=max_shift, binary=True, seed=0)(batch, 0, 0).frames


@pytest.mark.parametrize(("height", "width"), [(700, 1), (1, 700), (4, 4)])
def test_shift_that_can_blank_a_recording_is_refused(height, width):
    with pytest.raises(ValueError, match=f"max_shift: must be less than the {height} x {width} pixels of a frame.*; got 4"):
        shifted(4, height, width)


def test_largest_shift_leaves_something_of_every_recording():
    assert shifted(3, 4, 9).sum((0, 2, 3, 4)).min() > 0


def test_config_with_a_shift_as_wide_as_a_frame_is_refused():
    fields = ["dataset.downsample=2", "network.features=8", "augmentation.max_shift="]
    with pytest.raises(UserError, match=r"augmentation.max_shift: must be less than the 17 pixels of a frame.*; got 17"):
        load_configs("configs/digits.py:sast", [*fields[:2], fields[2] + "17"])
    assert load_configs("configs/digits.py:sast", [*fields[:2], fields[2] + "16"])[""].augmentation.max_shift == 16


@pytest.mark.parametrize("downsample", [0, 3, 35, 68])
def test_downsampling_that_loses_pixels_is_refused(downsample):
    message = f"downsample must be positive and divide the 34 x 34 pixels of the sensor; got {downsample}"
    with pytest.raises(ValueError, match=message):
        bin_events(np.zeros(1, EVENT_DTYPE), sensor_size=(34, 34), num_time_steps=1, duration=10, downsample=downsample)
    with pytest.raises(ValueError, match=message):
        data.sensor_size("digits", downsample)
    with pytest.raises(UserError, match=f"dataset.downsample: must divide the 34 pixels of digits; got {downsample}"):
        data.load_dataset("digits", num_time_steps=1, num_validation=0, num_test=1, downsample=downsample)


@pytest.mark.parametrize(("height", "width"), [(1, 700), (700, 1), (3, 8)])
def test_pool_that_leaves_nothing_of_an_axis_is_refused(height, width):
    network = SpikingConvNet(num_classes=3, features=(2, 2), kernel_size=1, pool_size=2)
    frames = jax.ShapeDtypeStruct((1, 1, height, width, 2), np.float32)
    with pytest.raises(ValueError, match=r"pool_size: .* at most the \d+ x \d+ pixels that reach layer (conv_1|readout); got 2"):
        jax.eval_shape(lambda x: network.init(jax.random.key(0), x), frames)


def test_pool_that_leaves_one_pixel_is_accepted():
    network = SpikingConvNet(num_classes=3, features=(2, 2), kernel_size=1, pool_size=2)
    frames = jax.ShapeDtypeStruct((1, 1, 4, 5, 2), np.float32)
    params = jax.eval_shape(lambda x: network.init(jax.random.key(0), x), frames)["params"]
    assert params["readout"]["kernel"].shape == (2, 3)
