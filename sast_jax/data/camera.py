"""A simulated event camera: from what its pixels see over time to events."""

from typing import NamedTuple

import numpy as np

from sast_jax.data.events import EVENT_DTYPE, NUM_POLARITIES


class Camera(NamedTuple):
    """An event camera.

    Attributes:
        contrast_threshold: Change of log intensity per event.
        mismatch: Relative standard deviation of the pixels' own thresholds around it.
        noise_rate: Background events per pixel and second.
        step: Time resolution of the simulation in microseconds.
        is_refractory: Whether a pixel emits at most one event per step and then starts anew from what it sees, so that fast
            changes lose events; else it emits one per threshold passed.
    """

    contrast_threshold: float
    mismatch: float = 0.05
    noise_rate: float = 0.5
    step: int = 2_000
    is_refractory: bool = False


def draw_thresholds(camera: Camera, sensor_size: tuple[int, int], seed: int) -> np.ndarray:
    """Draws the contrast threshold of each pixel, float32 `[H, W]`, at least half of the camera's."""
    thresholds = camera.contrast_threshold * np.random.default_rng(seed).normal(1.0, camera.mismatch, sensor_size)
    return np.maximum(thresholds, 0.5 * camera.contrast_threshold).astype(np.float32)


def count_changes(log_intensity: np.ndarray, thresholds: np.ndarray, *, is_refractory: bool = False) -> np.ndarray:
    r"""Returns how many events of which sign each pixel emits in each step.

    A pixel remembers the log intensity :math:`\ell` of its last event and emits an event of polarity 1 (or 0) each time it
    has risen (fallen) by the pixel's threshold from it.

    Args:
        log_intensity: float32 `[N, S + 1, H, W]`, what is seen at the start and the end of each of S steps.
        thresholds: float32 `[H, W]`.
        is_refractory: See `Camera`.

    Returns:
        int8 `[N, S, H, W]`.

    References:
        Lichtsteiner, Posch, Delbruck. A 128x128 120 dB 15 us Latency Asynchronous Temporal Contrast Vision Sensor. JSSC 2008.
    """
    reference = log_intensity[:, 0].copy()
    counts: np.ndarray = np.empty(log_intensity[:, 1:].shape, np.int8)
    for step in range(counts.shape[1]):
        change = np.trunc((log_intensity[:, step + 1] - reference) / thresholds)
        if is_refractory:
            change = np.clip(change, -1, 1)
            np.copyto(reference, log_intensity[:, step + 1], where=change != 0)
        else:
            reference += change * thresholds
        counts[:, step] = change
    return counts


def emit(counts: np.ndarray, camera: Camera, rng: np.random.Generator) -> np.ndarray:
    """Returns the events of one recording, with noise and ordered in time.

    Args:
        counts: Signed number of events per step and pixel, int8 `[S, H, W]`.
        camera: The camera.
        rng: Draws the noise and, of a refractory camera, when within its step an event falls; else those of a step are
            spread evenly over it.

    Returns:
        Events of `EVENT_DTYPE`.
    """
    num_steps, height, width = counts.shape
    duration = num_steps * camera.step
    step, y, x = np.unravel_index(np.flatnonzero(counts != 0), counts.shape)  # Many times as quick as `np.nonzero(counts)`.
    signed = counts[step, y, x]
    number = np.abs(signed).astype(np.int64)
    nth = np.arange(number.sum()) - np.repeat(np.cumsum(number) - number, number)
    num_noise = rng.poisson(camera.noise_rate * height * width * duration * 1e-6)

    events = np.empty(number.sum() + num_noise, EVENT_DTYPE)
    signal, noise = events[: number.sum()], events[number.sum() :]
    signal["x"], signal["y"] = np.repeat(x, number), np.repeat(y, number)
    signal["p"] = np.repeat(signed > 0, number)
    within = rng.integers(0, camera.step, len(signal)) if camera.is_refractory else nth * camera.step // np.repeat(number, number)
    signal["t"] = np.repeat(step, number) * camera.step + within
    noise["x"], noise["y"] = rng.integers(0, width, num_noise), rng.integers(0, height, num_noise)
    noise["p"], noise["t"] = rng.integers(0, NUM_POLARITIES, num_noise), rng.integers(0, duration, num_noise)
    return events[np.argsort(events["t"], kind="stable")]
