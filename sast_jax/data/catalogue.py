"""What is known of every data set before it is loaded."""

from typing import NamedTuple

from sast_jax.data import gestures, recorded, simulated


class Entry(NamedTuple):
    """A data set.

    Attributes:
        sensor_size: Height and width of the camera in pixels.
        duration: Length of a recording in microseconds; 0: recordings differ, and the config says how much is taken.
        classes: Names of the classes in the order of their labels.
        origin: Where it comes from.
        licence: Under what terms.
    """

    sensor_size: tuple[int, int]
    duration: int
    classes: tuple[str, ...]
    origin: str
    licence: str


_DIGITS = tuple("0123456789")

CATALOGUE = {
    "digits": Entry(
        sensor_size=simulated.SENSOR_SIZE,
        duration=simulated.DIGITS.duration,
        classes=_DIGITS,
        origin="simulated event camera over the handwritten digits of scikit-learn (Alpaydin, Kaynak, UCI, 1998)",
        licence="CC BY 4.0 (images)",
    ),
    "nmnist": Entry(
        sensor_size=recorded.NMNIST_SENSOR_SIZE,
        duration=recorded.NMNIST_DURATION,
        classes=_DIGITS,
        origin="N-MNIST (Orchard, Jayawant, Cohen, Thakor, 2015)",
        licence="CC BY-SA 4.0",
    ),
    "gestures": Entry(
        sensor_size=gestures.SENSOR_SIZE,
        duration=gestures.DURATION,
        classes=gestures.CLASSES,
        origin="simulated persons before a simulated event camera, after DVS128 Gesture",
        licence="Apache 2.0, as sast_jax",
    ),
    "dvs_gesture": Entry(
        sensor_size=recorded.GESTURE_SENSOR_SIZE,
        duration=0,
        classes=gestures.CLASSES,
        origin="DVS128 Gesture (Amir et al., IBM, 2017)",
        licence="CC BY 4.0",
    ),
}
"""The data sets by the name that a config calls them."""
