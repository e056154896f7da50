"""Event data sets as binned, split and cached arrays."""

import hashlib
from typing import Any, NamedTuple

import numpy as np

from sast_jax.data import recorded, simulated
from sast_jax.data.batches import DESCENT, PERTURBATION, SAMPLE_AXES, Batch, batch_indices, evaluation_batches, take_batch
from sast_jax.data.cache import Recordings, load_or_build
from sast_jax.data.events import bin_events
from sast_jax.errors import UserError

__all__ = [
    "DATASETS",
    "DESCENT",
    "PERTURBATION",
    "SAMPLE_AXES",
    "SENSOR_SIZE",
    "Batch",
    "Recordings",
    "Splits",
    "batch_indices",
    "bin_events",
    "evaluation_batches",
    "load_dataset",
    "take_batch",
]

DATASETS = ("digits", "nmnist")

SENSOR_SIZE = (34, 34)
"""Height and width of the frames of every data set, in pixels."""

_CACHE_VERSION = 1  # Raise it when the same arguments give other frames than before.


class Splits(NamedTuple):
    """Disjoint parts of a data set.

    Attributes:
        train: For gradients.
        validation: For every choice; may be empty.
        test: For the reported numbers, and nothing else.
        num_classes: Number of classes K.
    """

    train: Recordings
    validation: Recordings
    test: Recordings
    num_classes: int

    def describe(self) -> dict[str, Any]:
        """Returns the sizes of the parts and a checksum over all of them, as JSON values."""
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        checksums = "".join(part.checksum() for part in parts.values())
        return {
            **{f"num_{name}": len(part.labels) for name, part in parts.items()},
            "num_classes": self.num_classes,
            "checksum": hashlib.sha256(checksums.encode()).hexdigest(),
        }


def load_dataset(
    name: str,
    *,
    num_time_steps: int,
    num_validation: int,
    num_test: int = 0,
    seed: int = 0,
    root: str = "",
    download: bool = False,
    binary: bool = True,
) -> Splits:
    """Loads a data set, from the cache if it was loaded before.

    Args:
        name: `digits`: scikit-learn's 1,797 handwritten digits under a simulated event camera; `nmnist`: N-MNIST recordings.
        num_time_steps: Number of frames T per recording.
        num_validation: Number of validation samples, drawn from the training part by `seed`, classes in proportion.
        num_test: Number of test samples of `digits`, drawn likewise; `nmnist` brings its own test part.
        seed: Seed of the simulation and of the splits; not the seed of a run.
        root: Folder of the recordings; see `recorded.find_nmnist`.
        download: Whether recordings may be downloaded.
        binary: Whether frames say that there was an event (0 or 1) instead of how many.

    Returns:
        The three parts.

    Raises:
        UserError: If the name is unknown, the recordings are missing or damaged, or a part would be empty.
    """
    description = {"name": name, "version": _CACHE_VERSION, "num_time_steps": num_time_steps}
    if name == "digits":
        recordings = load_or_build({**description, "seed": seed}, lambda: _simulate_digits(num_time_steps, seed))
        train, test = split(np.arange(len(recordings.labels)), recordings.labels, num_test, seed=seed, what="num_test")
    elif name == "nmnist":
        folder = recorded.find_nmnist(root, download=download)
        recordings = load_or_build(
            {**description, **recorded.describe_nmnist(folder)},
            lambda: recorded.read_nmnist(folder, num_time_steps=num_time_steps),
        )
        is_test = np.char.startswith(recordings.ids, "Test/")
        train, test = np.flatnonzero(~is_test), np.flatnonzero(is_test)
    else:
        raise UserError(f"dataset.name: must be one of {', '.join(DATASETS)}; got {name!r}")
    train, validation = split(train, recordings.labels, num_validation, seed=seed, what="num_validation")
    if binary:
        recordings = recordings._replace(frames=np.minimum(recordings.frames, 1))
    return Splits(recordings.take(train), recordings.take(validation), recordings.take(test), num_classes=10)


def split(
    indices: np.ndarray, labels: np.ndarray, num_second: int, *, seed: int, what: str = "num_second"
) -> tuple[np.ndarray, np.ndarray]:
    """Splits samples in two at random, each class in proportion.

    Args:
        indices: Samples to split.
        labels: Labels of all samples, not only of these.
        num_second: Size of the second part, less than the number of samples.
        seed: Non-negative seed.
        what: Name of `num_second` in messages.

    Returns:
        The sorted indices of the first and of the second part.

    Raises:
        UserError: If the first part would be empty.
    """
    if not 0 <= num_second < len(indices):
        raise UserError(f"dataset.{what}: must be 0 to {len(indices) - 1}, as there are {len(indices)} samples; got {num_second}")
    shuffled = np.random.default_rng(seed).permutation(indices)
    # Samples are ranked by their position within their class, as a share of it: any prefix holds the classes in proportion.
    rank = np.empty(len(shuffled))
    for label in np.unique(labels[shuffled]):
        members = labels[shuffled] == label
        rank[members] = (np.arange(members.sum()) + 0.5) / members.sum()
    order = shuffled[np.argsort(rank, kind="stable")]
    return np.sort(order[num_second:]), np.sort(order[:num_second])


def _simulate_digits(num_time_steps, seed):
    from sklearn.datasets import load_digits

    digits = load_digits()
    frames = [
        bin_events(events, sensor_size=simulated.SENSOR_SIZE, num_time_steps=num_time_steps, duration=simulated.DURATION)
        for events in simulated.simulate_saccades(digits.images / 16.0, seed=seed)
    ]
    ids = np.array([f"digits/{i:04d}" for i in range(len(frames))])
    return Recordings(np.stack(frames), digits.target.astype(np.int32), ids)
