"""An event camera, simulated, that looks at still images with three micro-saccades, as N-MNIST was recorded."""

from collections.abc import Iterator

import numpy as np

from sast_jax.data.events import EVENT_DTYPE

SENSOR_SIZE = (34, 34)
DURATION = 300_000
"""Length of a recording in microseconds: three saccades of 100 ms."""

STEP = 2_000
"""Time resolution of the simulation in microseconds."""

OBJECT_SIZE = 24
"""Height of the image on the sensor, in pixels."""

CORNERS = np.array([(0.0, 0.0), (-2.0, 4.0), (2.0, 4.0), (0.0, 0.0)])
"""Where the saccades start and end: (x, y) shifts of the image in pixels, the corners of an isosceles triangle."""

DARK_CURRENT = 0.15
"""Intensity of the dark background relative to the brightest pixel; keeps the logarithm finite."""

CONTRAST_THRESHOLD = 0.35
"""Change of log intensity per event; each pixel's own threshold deviates from it by 5 % (standard deviation)."""

NOISE_RATE = 0.5
"""Background events per pixel and second."""

_BATCH = 128


def _shifts(rng: np.random.Generator) -> np.ndarray:
    """Shift of the image at each step, `[S + 1, 2]`: minimum-jerk saccades between corners placed 10 % anew per recording."""
    corners = CORNERS * rng.normal(1.0, 0.1, size=2) + rng.normal(0.0, 0.3, size=CORNERS.shape)
    phase = np.linspace(0.0, len(corners) - 1.0, DURATION // STEP + 1)
    leg = np.minimum(phase.astype(int), len(corners) - 2)
    s = phase - leg
    smooth = (s**3 * (10 - 15 * s + 6 * s**2))[:, None]
    return corners[leg] * (1 - smooth) + corners[leg + 1] * smooth


def _interpolation(shift: np.ndarray, num_source: int, num_sensor: int) -> np.ndarray:
    """Linear interpolation of `num_source` image pixels at the shifted sensor pixels, `[..., num_sensor, num_source]`."""
    scale = OBJECT_SIZE / num_source
    sensor = np.arange(num_sensor) - (num_sensor - 1) / 2
    source = np.arange(num_source) - (num_source - 1) / 2
    distance = np.abs((sensor - shift[..., None])[..., None] / scale - source)
    return np.maximum(0.0, 1.0 - distance).astype(np.float32)


def simulate_saccades(images: np.ndarray, *, seed: int) -> Iterator[np.ndarray]:
    r"""Simulates the events that a moving event camera records of still images.

    A pixel remembers the log intensity :math:`\ell` of its last event and emits an event of polarity 1 (or 0) each time
    :math:`\log(I + I_0)` has risen (fallen) by its contrast threshold :math:`C` from it. Uniform background noise is added.
    Recording i depends on `(seed, i)` and its image alone.

    Args:
        images: `[N, h, w]` intensities in [0, 1].
        seed: Non-negative seed of the pixels' thresholds, the saccades and the noise.

    Yields:
        For each image its events, of `EVENT_DTYPE`, ordered in time.

    References:
        Lichtsteiner, Posch, Delbruck. A 128x128 120 dB 15 us Latency Asynchronous Temporal Contrast Vision Sensor. JSSC 2008.
        Orchard, Jayawant, Cohen, Thakor. Converting Static Image Datasets to Spiking Neuromorphic Datasets Using Saccades.
        Frontiers in Neuroscience 2015.
    """
    thresholds = CONTRAST_THRESHOLD * np.random.default_rng(seed).normal(1.0, 0.05, SENSOR_SIZE)
    thresholds = np.maximum(thresholds, 0.5 * CONTRAST_THRESHOLD).astype(np.float32)
    for start in range(0, len(images), _BATCH):
        batch = images[start : start + _BATCH].astype(np.float32)
        rngs = [np.random.default_rng((seed, start + i)) for i in range(len(batch))]
        shifts = np.stack([_shifts(rng) for rng in rngs])
        counts = _contrast_changes(batch, shifts, thresholds)
        for rng, recording in zip(rngs, counts, strict=True):
            yield _emit(recording, rng)


def _contrast_changes(images, shifts, thresholds):
    """Signed number of events per step and pixel, `[N, S, H, W]`."""
    columns = _interpolation(shifts[..., 0], images.shape[2], SENSOR_SIZE[1])
    rows = _interpolation(shifts[..., 1], images.shape[1], SENSOR_SIZE[0])
    seen = rows @ images[:, None] @ columns.swapaxes(-1, -2)
    log_intensity = np.log(seen + DARK_CURRENT)
    reference = log_intensity[:, 0].copy()
    counts = np.empty(log_intensity[:, 1:].shape, np.int8)
    for step in range(counts.shape[1]):
        change = np.trunc((log_intensity[:, step + 1] - reference) / thresholds)
        reference += change * thresholds
        counts[:, step] = change
    return counts


def _emit(counts, rng):
    """Events of one recording from its signed counts `[S, H, W]`, spread evenly within a step, and its noise."""
    step, y, x = np.nonzero(counts)
    signed = counts[step, y, x]
    number = np.abs(signed).astype(np.int64)
    nth = np.arange(number.sum()) - np.repeat(np.cumsum(number) - number, number)
    num_noise = rng.poisson(NOISE_RATE * np.prod(SENSOR_SIZE) * DURATION * 1e-6)

    events = np.empty(number.sum() + num_noise, EVENT_DTYPE)
    signal, noise = events[: number.sum()], events[number.sum() :]
    signal["x"], signal["y"] = np.repeat(x, number), np.repeat(y, number)
    signal["p"] = np.repeat(signed > 0, number)
    signal["t"] = np.repeat(step, number) * STEP + nth * STEP // np.repeat(number, number)
    noise["x"], noise["y"] = rng.integers(0, SENSOR_SIZE[1], num_noise), rng.integers(0, SENSOR_SIZE[0], num_noise)
    noise["p"], noise["t"] = rng.integers(0, 2, num_noise), rng.integers(0, DURATION, num_noise)
    return events[np.argsort(events["t"], kind="stable")]
