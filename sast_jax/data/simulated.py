"""An event camera, simulated, that looks at still images with three micro-saccades, as N-MNIST was recorded."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from sast_jax.data.camera import Camera, count_changes, draw_thresholds, emit

SENSOR_SIZE = (34, 34)


class Recorder(NamedTuple):
    """A camera, what it looks at, and how it moves.

    Attributes:
        camera: The camera.
        dark_current: Intensity that every pixel sees in the dark, relative to the brightest; keeps the logarithm finite.
        duration: Length of a recording in microseconds.
        corners: Where the saccades start and end: four (x, y) shifts of the image in pixels.
        starts: When each saccade starts, in microseconds.
        lengths: How long each takes, in microseconds.
        amplitude_deviation: Relative standard deviation of the size of the movement between recordings, per axis.
        corner_deviation: Standard deviation of each corner between recordings, in pixels.
        object_size: Height of the image on the sensor, in pixels.
        is_negative: Whether images are shown dark on bright ground.
        time_constant: Of the pixels' low-pass filter, in microseconds; 0: none.
    """

    camera: Camera
    dark_current: float
    duration: int
    corners: tuple[tuple[float, float], ...]
    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    amplitude_deviation: float
    corner_deviation: float
    object_size: float
    is_negative: bool = False
    time_constant: float = 0.0


DIGITS = Recorder(
    camera=Camera(contrast_threshold=0.35),
    dark_current=0.15,
    duration=300_000,
    corners=((0.0, 0.0), (-2.0, 4.0), (2.0, 4.0), (0.0, 0.0)),
    starts=(0, 100_000, 200_000),
    lengths=(100_000, 100_000, 100_000),
    amplitude_deviation=0.1,
    corner_deviation=0.3,
    object_size=24,
)
"""For scikit-learn's digits: an isosceles triangle at even pace, more varied than N-MNIST's."""

NMNIST = Recorder(
    camera=Camera(contrast_threshold=0.29, mismatch=0.07, noise_rate=0.37, is_refractory=True),
    dark_current=0.11,
    duration=310_000,
    corners=((-2.96, -2.17), (-1.26, 3.70), (2.57, -1.71), (-2.48, -1.70)),
    starts=(3_200, 97_800, 211_100),
    lengths=(85_400, 103_900, 89_300),
    amplitude_deviation=0.012,
    corner_deviation=0.04,
    object_size=29.0,
    is_negative=True,
    time_constant=3_600.0,
)
"""For MNIST's images: fitted to what 900 recordings of N-MNIST count, by `benchmarks/calibration.py`.

That the images are dark on bright ground is part of the fit: the polarities of N-MNIST, as they are distributed, are those of
white digits on black inverted, and the number of events of a recording follows the dark side of its edges.
"""

_BATCH = 32


def _shifts(recorder: Recorder, rng: np.random.Generator) -> np.ndarray:
    """Shift of the image at the edges of the steps, `[S + 1, 2]`: minimum-jerk saccades between corners placed anew."""
    corners = np.array(recorder.corners)
    corners = corners * rng.normal(1.0, recorder.amplitude_deviation, size=2)
    corners += rng.normal(0.0, recorder.corner_deviation, size=corners.shape)
    time = np.arange(0, recorder.duration + 1, recorder.camera.step)
    leg = np.maximum(np.searchsorted(recorder.starts, time, side="right") - 1, 0)
    s = np.clip((time - np.array(recorder.starts)[leg]) / np.array(recorder.lengths)[leg], 0.0, 1.0)
    smooth = (s**3 * (10 - 15 * s + 6 * s**2))[:, None]
    return corners[leg] * (1 - smooth) + corners[leg + 1] * smooth


def _interpolation(shift: np.ndarray, num_source: int, num_sensor: int, scale: float) -> np.ndarray:
    """Linear interpolation of image pixels, `scale` sensor pixels wide, at the shifted sensor pixels, `[..., sensor, source]`."""
    sensor = np.arange(num_sensor) - (num_sensor - 1) / 2
    source = np.arange(num_source) - (num_source - 1) / 2
    distance = np.abs((sensor - shift[..., None])[..., None] / scale - source)
    return np.maximum(0.0, 1.0 - distance).astype(np.float32)


def _see(images: np.ndarray, shifts: np.ndarray, recorder: Recorder) -> np.ndarray:
    """Log intensity at each pixel, float32 `[N, S + 1, H, W]`, of images `[N, h, w]` shifted by `[N, S + 1, 2]`."""
    scale = recorder.object_size / images.shape[1]
    columns = _interpolation(shifts[..., 0], images.shape[2], SENSOR_SIZE[1], scale)
    rows = _interpolation(shifts[..., 1], images.shape[1], SENSOR_SIZE[0], scale)
    intensity = rows @ images[:, None] @ columns.swapaxes(-1, -2)
    if recorder.is_negative:
        intensity = np.maximum(1 - intensity, 0)
    log_intensity = np.log(intensity + recorder.dark_current)
    if recorder.time_constant:
        share = np.float32(-np.expm1(-recorder.camera.step / recorder.time_constant))
        for step in range(1, log_intensity.shape[1]):
            log_intensity[:, step] = (1 - share) * log_intensity[:, step - 1] + share * log_intensity[:, step]
    return log_intensity


def simulate_saccades(
    images: np.ndarray, *, seed: int, recorder: Recorder = DIGITS, indices: np.ndarray | None = None
) -> Iterator[np.ndarray]:
    r"""Simulates the events that a moving event camera records of still images.

    Pixels see :math:`\log(I + I_0)`, with :math:`I` the shifted image; see `camera.count_changes`. Uniform background noise
    is added. Recording i depends on `(seed, i)` and its image alone.

    Args:
        images: `[N, h, w]` intensities in [0, 1], or, of dtype uint8, in [0, 255].
        seed: Non-negative seed of the pixels' thresholds, the saccades and the noise.
        recorder: The camera and its movement.
        indices: Which images to record; `None` stands for all.

    Yields:
        For each of them its events, of `EVENT_DTYPE`, ordered in time.

    References:
        Orchard, Jayawant, Cohen, Thakor. Converting Static Image Datasets to Spiking Neuromorphic Datasets Using Saccades.
        Frontiers in Neuroscience 2015.
    """
    camera = recorder.camera
    thresholds = draw_thresholds(camera, SENSOR_SIZE, seed)
    indices = np.arange(len(images)) if indices is None else indices
    for start in range(0, len(indices), _BATCH):
        batch = indices[start : start + _BATCH]
        rngs = [np.random.default_rng((seed, i)) for i in batch]
        shifts = np.stack([_shifts(recorder, rng) for rng in rngs])
        shown = images[batch] / np.float32(255) if images.dtype == np.uint8 else images[batch].astype(np.float32)
        seen = _see(shown, shifts, recorder)
        counts = count_changes(seen, thresholds, is_refractory=camera.is_refractory)
        for rng, recording in zip(rngs, counts, strict=True):
            yield emit(recording, camera, rng)
