"""Simulated persons who move their arms before an event camera: the eleven motions of DVS128 Gesture, which need time to be told.

Lengths are in pixels of an average person, from the middle between the shoulders; x to the right of the image, y down. Persons
face the camera, so that their right arm is on the left.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from sast_jax.data.camera import Camera, count_changes, draw_thresholds, emit

SENSOR_SIZE = (32, 32)
DURATION = 1_000_000
"""Length of a recording in microseconds: one performance of a motion."""

CLASSES = (
    "hand clapping",
    "right hand wave",
    "left hand wave",
    "right arm clockwise",
    "right arm counter-clockwise",
    "left arm clockwise",
    "left arm counter-clockwise",
    "arm roll",
    "air drums",
    "air guitar",
    "other gestures",
)
"""Names of the classes in the order of their labels; clockwise is as the camera sees it."""

NUM_PERSONS = 29
FIRST_TEST_PERSON = 23
"""Persons from this one on, counted from 0, are the test part, as in DVS128 Gesture."""

CAMERA = Camera(contrast_threshold=0.3, step=10_000)


class Lighting(NamedTuple):
    """A place to record.

    Attributes:
        contrast: Log intensity of the arms relative to the wall; negative: persons are darker than the wall.
        noise_rate: Background events per pixel and second.
    """

    contrast: float
    noise_rate: float


# Each contrast has its opposite: the polarity of a moving edge alone does not tell where the arm is going.
LIGHTINGS = (Lighting(1.2, 0.5), Lighting(-1.2, 0.5), Lighting(0.8, 2.0), Lighting(-0.8, 2.0))

NUM_TURNS = {"hand clapping": 2, "right hand wave": 2, "left hand wave": 2, "air drums": 2, "air guitar": 2, "arm roll": 2}
"""How often a performance repeats its motion; the others, once.

A circle is shown once and whole, begun and ended at its lowest point: backwards in time, a clockwise recording is a
counter-clockwise one.
"""

UPPER_ARM, FOREARM, SHOULDER, REST = 6.0, 7.0, 4.5, (6.0, 11.5)


class Listing(NamedTuple):
    """Who shows what in which light, `[N]` each."""

    labels: np.ndarray
    persons: np.ndarray
    lightings: np.ndarray


def list_recordings() -> Listing:
    """Lists all recordings: every person shows every motion once in every light."""
    shape = NUM_PERSONS, len(LIGHTINGS), len(CLASSES)
    persons, lightings, labels = np.unravel_index(np.arange(np.prod(shape)), shape)
    return Listing(labels.astype(np.int32), persons, lightings)


def simulate_gestures(*, seed: int, indices: np.ndarray | None = None) -> Iterator[np.ndarray]:
    """Simulates the events of the recordings of `list_recordings`.

    Persons differ in place, size, arms, pace and width of their motions; performances of one person differ a little in pace and
    width, and in when they begin. A recording depends on `seed` and its index alone.

    Args:
        seed: Non-negative seed of camera, persons and recordings.
        indices: Which recordings; `None` stands for all.

    Yields:
        For each of them its events, of `EVENT_DTYPE`, ordered in time.

    References:
        Amir et al. A Low Power, Fully Event-Based Gesture Recognition System. CVPR 2017.
    """
    recordings = list_recordings()
    thresholds = draw_thresholds(CAMERA, SENSOR_SIZE, seed)
    for i in range(len(recordings.labels)) if indices is None else indices:
        person = _Person.draw(np.random.default_rng((seed, 0, recordings.persons[i])))
        lighting = LIGHTINGS[recordings.lightings[i]]
        rng = np.random.default_rng((seed, 1, i))
        hands, sway = _move(person, int(recordings.labels[i]), rng)
        seen = _render(person, hands, sway, lighting)
        counts = count_changes(seen[None], thresholds)[0]
        yield emit(counts, CAMERA._replace(noise_rate=lighting.noise_rate), rng)


class _Person(NamedTuple):
    """A body and its habits."""

    size: float
    place: np.ndarray
    thickness: float
    length: float
    width: float

    @classmethod
    def draw(cls, rng):
        return cls(
            size=rng.uniform(0.85, 1.1),
            place=np.array([15.5, 10.5]) + rng.uniform(-1.0, 1.0, 2),
            thickness=rng.uniform(0.7, 1.3),
            length=rng.uniform(0.5, 0.85),
            width=rng.uniform(0.8, 1.15),
        )


def _move(person, label, rng):
    """Draws one performance: the hands, `[S + 1, 2, 2]` (right and left, x and y), and the sway of the body, `[S + 1, 2]`."""
    time = np.arange(0, DURATION + 1, CAMERA.step) / DURATION
    length = person.length * rng.uniform(0.9, 1.1)
    s = np.clip((time - rng.uniform(0.0, 1.0 - length)) / length, 0.0, 1.0)
    turns = NUM_TURNS.get(CLASSES[label], 1)
    phase = 2 * np.pi * turns * s**2 * (3 - 2 * s) + rng.normal(0.0, 0.2)  # As slow to begin as to end.
    width = person.width * rng.uniform(0.9, 1.1)
    hands = _hands(CLASSES[label], phase, width, rng) + rng.normal(0.0, 0.5, (2, 2))
    sway = rng.uniform(0.2, 0.6) * np.sin(2 * np.pi * (rng.uniform(0.2, 0.6) * time[:, None] + rng.random(2)))
    return hands, sway


def _hands(motion, phase, width, rng):
    sides = np.array([-1.0, 1.0])
    hands = np.empty((len(phase), 2, 2))
    hands[:] = sides[:, None] * [REST[0], 0.0] + [0.0, REST[1]]
    turning = np.stack([-np.sin(phase), np.cos(phase)], axis=-1)  # Clockwise from the lowest point, as y points down.
    right, left = 0, 1
    arm = left if motion.startswith("left") else right

    def mirrored(x, y):
        """Both hands at distance x from the middle and height y, `[S + 1]` or `[S + 1, 2]` each."""
        x, y = (np.broadcast_to(np.asarray(each).reshape(len(phase), -1), (len(phase), 2)) for each in (x, y))
        return np.stack([sides * x, y], axis=-1)

    swing = np.sin(phase)
    alternating = np.stack([swing, -swing], axis=-1)
    level = np.full(len(phase), 4.0)
    if motion == "hand clapping":
        hands = mirrored(0.8 + 2.2 * width * (1 + swing), level)
    elif motion.endswith("hand wave"):
        angle = 0.6 * width * swing
        hands[:, arm] = np.stack([sides[arm] * 9.0 + FOREARM * np.sin(angle), 1.0 - FOREARM * np.cos(angle)], axis=-1)
    elif motion.endswith("clockwise"):
        direction = [-1.0, 1.0] if motion.endswith("counter-clockwise") else [1.0, 1.0]
        hands[:, arm] = [sides[arm] * 9.5, 0.0] + 4.2 * width * turning * direction
    elif motion == "arm roll":
        direction = rng.choice([-1.0, 1.0])
        hands = [0.0, 4.0] + sides[:, None] * (width * turning * [1.5 * direction, 2.7])[:, None]
    elif motion == "air drums":
        hands = mirrored(np.full(len(phase), 5.0), 6.0 + 3.3 * width * alternating)
    elif motion == "air guitar":
        hands[:, left] = [9.5, 1.5] + 0.7 * turning
        hands[:, right] = [-0.5, 7.0] + width * np.stack([0.6 * swing, 2.6 * swing], axis=-1)
    else:
        hands = _other(rng.integers(3), mirrored, phase, width, alternating, hands, rng.integers(2))
    return hands


def _other(which, mirrored, phase, width, alternating, hands, arm):
    """Motions of no class of their own: arms raised and lowered, punches in turn, a figure of eight."""
    reach = UPPER_ARM + FOREARM - 1.0
    if which == 0:
        angle = 0.9 * width * np.sin(phase)
        return mirrored(SHOULDER + reach * np.cos(angle), reach * np.sin(angle))
    if which == 1:
        return mirrored(5.5 + 3.2 * width * alternating, np.full(len(phase), 1.0))
    hands[:, arm] = [(-8.5, 8.5)[arm], 1.0] + width * np.stack([4.2 * np.sin(phase), 3.0 * np.sin(2 * phase)], axis=-1)
    return hands


def _render(person, hands, sway, lighting):
    """Log intensity relative to the wall, float32 `[S + 1, H, W]`."""
    y, x = (
        (np.arange(size)[None] - place - person.size * moved[:, None]).astype(np.float32) / np.float32(person.size)
        for size, place, moved in zip(SENSOR_SIZE, person.place[::-1], sway.T[::-1], strict=True)
    )
    x, y = x[:, None, :], y[:, :, None]  # In the person's own frame, [S + 1, 1, W] and [S + 1, H, 1].

    def covered(start, end, radius):
        """Share of each pixel that a capsule covers whose ends are `[S + 1, 2]` or `[2]`."""
        start, end = (np.atleast_2d(np.asarray(point, np.float32))[..., None, None] for point in (start, end))
        from_start = x - start[:, 0], y - start[:, 1]
        along = end - start
        length = np.maximum((along**2).sum(1), 1e-6)
        nearest = np.clip((from_start[0] * along[:, 0] + from_start[1] * along[:, 1]) / length, 0.0, 1.0)
        distance = np.sqrt((from_start[0] - nearest * along[:, 0]) ** 2 + (from_start[1] - nearest * along[:, 1]) ** 2)
        return np.clip(person.size * (radius - distance) + 0.5, 0.0, 1.0)

    torso = np.maximum(covered((0.0, 2.5), (0.0, 12.0), 3.8), covered((0.0, -4.8), (0.0, -4.8), 2.4))
    seen = 0.3 * lighting.contrast * torso
    for side, hand in zip((-1.0, 1.0), np.moveaxis(hands, 1, 0), strict=True):
        shoulder = np.array([side * SHOULDER, 0.0])
        elbow = _elbow(shoulder, hand, side)
        upper, lower = covered(shoulder, elbow, person.thickness), covered(elbow, hand, 0.9 * person.thickness)
        arm = np.maximum(np.maximum(upper, lower), covered(hand, hand, 1.4))
        seen += arm * (lighting.contrast - seen)
    return seen.astype(np.float32)


def _elbow(shoulder, hand, side):
    """Where the elbow hangs: on the way to the hand, lowered and turned out as far as the arm is longer than the way."""
    way = hand - shoulder
    distance = np.clip(np.linalg.norm(way, axis=-1), FOREARM - UPPER_ARM, UPPER_ARM + FOREARM)
    share = (UPPER_ARM**2 - FOREARM**2 + distance**2) / (2 * distance**2)
    slack = np.sqrt(np.maximum(UPPER_ARM**2 - (share * distance) ** 2, 0.0))
    return shoulder + share[:, None] * way + slack[:, None] * [0.5 * side, 0.6]
