"""What goes wrong with an event camera, at five severities: pure functions of events and a seed."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from sast_jax.data.events import EVENT_DTYPE, NUM_POLARITIES, check_events

SEVERITIES = (1, 2, 3, 4, 5)

HOT_PIXEL_RATE = 100.0
"""Events per second of a hot pixel."""


class Scene(NamedTuple):
    """Where and how long a recording is: height and width in pixels, duration in microseconds."""

    height: int
    width: int
    duration: int


def _drop(events, strength, rng, scene):
    return events[rng.random(len(events)) >= strength]


def _background(events, strength, rng, scene):
    number = rng.poisson(strength * scene.height * scene.width * scene.duration * 1e-6)
    noise = np.empty(number, EVENT_DTYPE)
    noise["x"], noise["y"] = rng.integers(0, scene.width, number), rng.integers(0, scene.height, number)
    noise["t"], noise["p"] = rng.integers(0, scene.duration, number), rng.integers(0, NUM_POLARITIES, number)
    return np.concatenate([events, noise])


def _time_jitter(events, strength, rng, scene):
    times = events["t"] + np.rint(rng.normal(0.0, strength * scene.duration, len(events))).astype(np.int64)
    times %= 2 * scene.duration  # Reflected at both ends, so that no time gathers what left the recording.
    events["t"] = np.where(times < scene.duration, times, 2 * scene.duration - 1 - times)
    return events


def _space_jitter(events, strength, rng, scene):
    shift = np.rint(rng.normal(0.0, strength * min(scene.height, scene.width), (2, len(events)))).astype(np.int64)
    x, y = events["x"] + shift[0], events["y"] + shift[1]
    stays = (x >= 0) & (x < scene.width) & (y >= 0) & (y < scene.height)
    events["x"], events["y"] = x, y
    return events[stays]


def _polarity_flip(events, strength, rng, scene):
    events["p"] ^= rng.random(len(events)) < strength
    return events


def _hot_pixels(events, strength, rng, scene):
    num_pixels = scene.height * scene.width
    hot = rng.permutation(num_pixels)[: int(np.ceil(strength * num_pixels))]
    pixels = np.repeat(hot, rng.poisson(HOT_PIXEL_RATE * scene.duration * 1e-6, len(hot)))
    added = np.empty(len(pixels), EVENT_DTYPE)
    added["y"], added["x"] = np.divmod(pixels, scene.width)
    added["t"], added["p"] = rng.integers(0, scene.duration, len(pixels)), 1
    return np.concatenate([events, added])


def _occlusion(events, strength, rng, scene):
    inside = np.ones(len(events), bool)
    for axis, size in (("y", scene.height), ("x", scene.width)):
        extent = round(strength * size)
        start = int(rng.random() * (size - extent + 1))
        inside &= (events[axis] >= start) & (events[axis] < start + extent)
    return events[~inside]


def _time_crop(events, strength, rng, scene):
    kept = round((1.0 - strength) * scene.duration)
    start = int(rng.random() * (scene.duration - kept + 1))
    return events[(events["t"] >= start) & (events["t"] < start + kept)]


class Corruption(NamedTuple):
    """A kind of corruption.

    Attributes:
        apply: Function of events (its own copy), strength, generator and scene to events in any order.
        strengths: Strength at severity 1 to 5.
    """

    apply: Callable[[np.ndarray, float, np.random.Generator, Scene], np.ndarray]
    strengths: tuple[float, float, float, float, float]


CORRUPTIONS: dict[str, Corruption] = {
    "drop": Corruption(_drop, (0.1, 0.2, 0.4, 0.6, 0.8)),
    "background": Corruption(_background, (1.0, 2.0, 5.0, 10.0, 20.0)),
    "time_jitter": Corruption(_time_jitter, (0.01, 0.02, 0.05, 0.1, 0.2)),
    "space_jitter": Corruption(_space_jitter, (0.015, 0.03, 0.045, 0.06, 0.09)),
    "polarity_flip": Corruption(_polarity_flip, (0.05, 0.1, 0.2, 0.35, 0.5)),
    "hot_pixels": Corruption(_hot_pixels, (0.002, 0.005, 0.01, 0.02, 0.05)),
    "occlusion": Corruption(_occlusion, (0.1, 0.2, 0.3, 0.45, 0.6)),
    "time_crop": Corruption(_time_crop, (0.1, 0.2, 0.4, 0.6, 0.8)),
}
"""The kinds by name."""


def corrupt(
    events: np.ndarray, kind: str, severity: int, seed: int | Sequence[int], *, sensor_size: tuple[int, int], duration: int
) -> np.ndarray:
    """Corrupts a recording.

    Strengths are relative to the sensor and the duration, so that they mean the same for every data set:

    =============  ============================================================  =====  =====  =====  =====  =====
    kind           strength                                                          1      2      3      4      5
    =============  ============================================================  =====  =====  =====  =====  =====
    drop           probability of each event to be lost                          0.1    0.2    0.4    0.6    0.8
    background     events added per pixel and second, anywhere at any time       1      2      5      10     20
    time_jitter    standard deviation of each time, share of the duration        0.01   0.02   0.05   0.1    0.2
    space_jitter   standard deviation of x and y, share of the shorter side      0.015  0.03   0.045  0.06   0.09
    polarity_flip  probability of each polarity to be inverted                   0.05   0.1    0.2    0.35   0.5
    hot_pixels     share of pixels that add `HOT_PIXEL_RATE` ON events a second  0.002  0.005  0.01   0.02   0.05
    occlusion      height and width of a blind patch, share of the sensor's      0.1    0.2    0.3    0.45   0.6
    time_crop      share of the duration outside the one stretch that is kept    0.1    0.2    0.4    0.6    0.8
    =============  ============================================================  =====  =====  =====  =====  =====

    Jittered times are reflected at the ends of the recording; events jittered off the sensor are lost. A crop leaves times
    as they are.

    Args:
        events: Events as `bin_events` takes them, in any order, on the sensor; not changed.
        kind: One of `CORRUPTIONS`.
        severity: 1 to 5.
        seed: Non-negative seed, or several that together make one.
        sensor_size: Height H and width W in pixels.
        duration: D, in microseconds; events at or after it are left out.

    Returns:
        A new array of `EVENT_DTYPE`, ordered in time, on the sensor and within the duration.

    Raises:
        ValueError: If the kind or the severity is unknown, or an event is not on the sensor.
        TypeError: If the events are no structured array of integers.

    Example:
        >>> events = np.array([(1, 0, 10, 1), (1, 0, 20, 1), (0, 1, 90, 0)], EVENT_DTYPE)
        >>> corrupt(events, "drop", 4, seed=0, sensor_size=(2, 2), duration=100).tolist()
        [(1, 0, 10, 1)]

    References:
        Hendrycks, Dietterich. Benchmarking Neural Network Robustness to Common Corruptions and Perturbations. ICLR 2019.
    """
    if kind not in CORRUPTIONS:
        raise ValueError(f"corruption must be one of {', '.join(CORRUPTIONS)}; got {kind!r}")
    if severity not in SEVERITIES:
        raise ValueError(f"severity must be 1 to {len(SEVERITIES)}; got {severity!r}")
    apply, strengths = CORRUPTIONS[kind]
    columns = dict(zip("xytp", check_events(events, sensor_size), strict=True))
    is_inside = columns["t"] < duration
    inside = np.empty(np.count_nonzero(is_inside), EVENT_DTYPE)  # A copy, which `apply` may change.
    for name, values in columns.items():
        inside[name] = values[is_inside]
    corrupted = apply(inside, strengths[severity - 1], np.random.default_rng(seed), Scene(*sensor_size, duration))
    return corrupted[np.argsort(corrupted["t"], kind="stable")]
