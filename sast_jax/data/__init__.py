"""Event data sets as binned, split and cached arrays."""

import hashlib
import zlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from sast_jax.data import gestures, recorded, simulated
from sast_jax.data.augmentation import make_augment
from sast_jax.data.batches import (
    BATCH_SPECS,
    DESCENT,
    PERTURBATION,
    SAMPLE_AXES,
    Batch,
    batch_indices,
    evaluation_batches,
    take_batch,
)
from sast_jax.data.cache import Recordings, load_or_build
from sast_jax.data.catalogue import CATALOGUE
from sast_jax.data.corruption import CORRUPTIONS, corrupt
from sast_jax.data.events import NUM_POLARITIES, bin_events, count_events, downsampled
from sast_jax.data.images import load_mnist
from sast_jax.data.loading import Prefetch, make_take
from sast_jax.data.splits import split, take_fold
from sast_jax.errors import UserError, refuse
from sast_jax.files import local_path

__all__ = [
    "BATCH_SPECS",
    "CATALOGUE",
    "CORRUPTIONS",
    "DATASETS",
    "DESCENT",
    "PERTURBATION",
    "SAMPLE_AXES",
    "Batch",
    "Prefetch",
    "Recordings",
    "Splits",
    "batch_indices",
    "bin_events",
    "corrupt",
    "evaluation_batches",
    "load_dataset",
    "make_augment",
    "make_take",
    "sensor_size",
    "take_batch",
]

DATASETS = tuple(CATALOGUE)

_CACHE_VERSION = 1  # Raise it when the same arguments give other frames than before.

_MAX_LISTED = 10


class Splits(NamedTuple):
    """Disjoint parts of a data set.

    Attributes:
        train: For gradients.
        validation: For every choice; may be empty.
        test: For the reported numbers, and nothing else.
        num_classes: Number of classes K.
        duration: Microseconds that the frames of a recording share; 0: recordings differ.
        num_skipped: Number of recordings and files that could not be read and were left out.
        notes: What a user should know about the data, a line each: what was left out, which classes are missing.
    """

    train: Recordings
    validation: Recordings
    test: Recordings
    num_classes: int
    duration: int = 0
    num_skipped: int = 0
    notes: tuple[str, ...] = ()

    def describe(self) -> dict[str, Any]:
        """Returns the sizes of the parts and a checksum over all of them, as JSON values."""
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        checksums = "".join(part.checksum() for part in parts.values())
        return {
            **{f"num_{name}": len(part.labels) for name, part in parts.items()},
            "num_classes": self.num_classes,
            "num_skipped": self.num_skipped,
            "checksum": hashlib.sha256(checksums.encode()).hexdigest(),
        }


def sensor_size(name: str, downsample: int = 1) -> tuple[int, int]:
    """Returns height and width, in pixels, of the frames of a data set; a `ValueError` if `downsample` does not divide them."""
    return downsampled(CATALOGUE[name].sensor_size, downsample)


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
    duration: float = 0.0,
    downsample: int = 1,
    skip_bad: bool = False,
    images: str = "",
    image_range: tuple[int, ...] = (),
    fold: tuple[int, ...] = (),
    corruption: tuple[str, int] | None = None,
) -> Splits:
    """Loads a data set, from the cache if it was loaded before.

    Args:
        name: `digits`: scikit-learn's 1,797 handwritten digits, or the images of a folder, under a simulated event camera;
            `gestures`: simulated persons; `nmnist`: N-MNIST recordings; `dvs_gesture`: DVS128 Gesture recordings.
        num_time_steps: Number of frames T per recording.
        num_validation: Number of validation samples, drawn from the training part by `seed`, classes in proportion. Of
            gestures whole persons are drawn until there are as many, unless there is only one person.
        num_test: Number of test samples of scikit-learn's digits, drawn likewise, and of `dvs_gesture` where none of its test
            users is there; else data sets bring their own test part.
        seed: Seed of the simulation and of the splits; not the seed of a run.
        root: Folder of the recordings; see `recorded.find_recordings`.
        download: Whether recordings may be downloaded.
        binary: Whether frames say that there was an event (0 or 1) instead of how many.
        duration: Seconds of a recording of `dvs_gesture`, from its first event, that the frames share; later events are
            left out, and frames after its end are empty. 0: all of it, so that the frames of recordings differ in length.
        downsample: Side of the squares of pixels that are counted together; it divides the sensor's height and width.
        skip_bad: Whether recordings that cannot be read are left out, and listed in the notes, instead of refused.
        images: Folder of MNIST's files, whose images `digits` then shows to the camera as N-MNIST was recorded: its `train`
            part for training and validation, its `t10k` part for the test.
        image_range: First of the training images and one past the last; empty: all. Recording k of N-MNIST shows image k - 1.
        fold: Which part `(k, n)` of n, counted from 0, is tested in cross-validation; empty: the test part that is described
            above. The validation part is drawn first and is the same in all folds; all others, of both parts, are cut into n
            folds by `seed`, classes in proportion, or whole persons.
        corruption: Kind and severity of a corruption of the events of the test part, as `corrupt` takes them. Each recording's
            is a function of `seed` and its id; the other parts stay as they are.

    Returns:
        The three parts.

    Raises:
        UserError: If the name is unknown, the recordings are missing or damaged, or a part would be empty.
    """
    if name not in CATALOGUE:
        raise UserError(f"dataset.name: must be one of {', '.join(DATASETS)}; got {name!r}")
    entry = CATALOGUE[name]
    if (images or image_range) and name != "digits":
        raise UserError(f"dataset.images: only digits are simulated from images, not {name}; got {images or image_range!r}")
    if downsample < 1 or any(size % downsample for size in entry.sensor_size):
        raise UserError(f"dataset.downsample: must divide the {entry.sensor_size[0]} pixels of {name}; got {downsample}")
    binning: dict[str, Any] = {
        "num_time_steps": num_time_steps,
        "duration": simulated.NMNIST.duration if images else entry.duration or round(duration * 1e6),
        "sensor_size": entry.sensor_size,
        "downsample": downsample,
    }
    if name == "digits":
        source = _mnist(binning, seed, images, image_range) if images else _digits(binning, seed)
    elif name == "gestures":
        source = _gestures(binning, seed)
    else:
        source = _recorded(name, binning, root, download)
    recordings = source.recordings
    if not skip_bad:
        refuse(
            _listed(recordings.skipped),
            f"dataset.root: {_counted(recordings.skipped, source.place)}; mend or remove them, or leave them out with "
            "--config.dataset.skip_bad=true:",
        )
    is_test = source.is_test
    train, test = np.flatnonzero(~is_test), np.flatnonzero(is_test)
    if not len(train):
        raise UserError(f"dataset.root: {source.place} holds no recordings of the training part")
    if not len(test) and not num_test and not fold:
        raise UserError(
            f"dataset.root: {source.place} holds no recordings of the test part; add some, or split some off the training part "
            "with --config.dataset.num_test=N"
        )
    if len(test) and num_test:
        raise UserError(f"dataset.num_test: {name} brings its own test part, so it must be 0; got {num_test}")
    choose = {"labels": recordings.labels, "seed": seed, "groups": source.persons}
    if num_test:
        train, test = split(train, num_second=num_test, what="num_test", **choose)
    train, validation = split(train, num_second=num_validation, what="num_validation", **choose)
    if fold:
        train, test = take_fold(np.concatenate([train, test]), number=fold[0], num_folds=fold[1], **choose)
    parts = {name: recordings.take(part) for name, part in (("train", train), ("validation", validation), ("test", test))}
    notes = (*_notes(recordings.skipped, parts, entry.classes, source.place), *map(str, recordings.remarks))
    if corruption is not None:
        parts["test"] = _corrupt_part(source, test, corruption, seed)
    if binary:
        for part in parts.values():
            np.minimum(part.frames, 1, out=part.frames)
    return Splits(
        **parts,
        num_classes=len(entry.classes),
        duration=binning["duration"],
        num_skipped=len(recordings.skipped),
        notes=notes,
    )


def _counted(problems, place):
    return f"{len(problems)} problem{'s' * (len(problems) > 1)} with the files of {place}"


def _listed(problems):
    more = [f"... and {len(problems) - _MAX_LISTED} more"] if len(problems) > _MAX_LISTED else []
    return [*problems[:_MAX_LISTED], *more]


def _notes(skipped, parts, classes, place):
    lines = []
    if len(skipped):
        lines.append("\n  ".join([f"{_counted(skipped, place)}; these are left out:", *_listed(skipped)]))
    for name in ("train", "test"):
        counts = np.bincount(parts[name].labels, minlength=len(classes))
        missing = [f"{label} ({classes[label]})" for label in np.flatnonzero(counts == 0)]
        if missing:
            lines.append(f"the {name} part of {place} has no recording of class {', '.join(missing)}")
    return tuple(lines)


class _Source(NamedTuple):
    """A data set before it is split.

    Attributes:
        recordings: All its recordings.
        description: What they depend on.
        binning: How their events became frames; a duration of 0 is that of each recording.
        is_test: bool `[N]`, of its own test part.
        persons: `[N]`, who made each recording; all the same if that is not known.
        place: Where it is, in words.
        read: Function from indices to the events of these recordings.
    """

    recordings: Recordings
    description: dict[str, Any]
    binning: dict[str, Any]
    is_test: np.ndarray
    persons: np.ndarray
    place: str
    read: Callable[[np.ndarray], Iterable[np.ndarray]]


def _corrupt_part(source, indices, corruption, seed):
    """Recordings with corrupted events; each is corrupted by a generator seeded with `seed` and its id."""
    part = source.recordings.take(indices)

    def build():
        frames = np.empty_like(part.frames)
        for i, (name, events) in enumerate(zip(part.ids, source.read(indices), strict=True)):
            binning = {**source.binning, "duration": source.binning["duration"] or int(events["t"][-1]) + 1}
            scene = {"sensor_size": binning["sensor_size"], "duration": binning["duration"]}
            frames[i] = count_events(corrupt(events, *corruption, (seed, zlib.crc32(name.encode())), **scene), **binning)
        return part._replace(frames=frames)

    own = {"corruption": corruption, "corruption_seed": seed, "ids": part.checksum()}
    return load_or_build({**source.description, **own}, build)


def _simulated(read, labels, ids, binning, place, *, is_test, persons=None, **description):
    """A source whose recordings are simulated, in the order of their ids."""

    def build():
        frames = np.empty((len(ids), binning["num_time_steps"], *_frame_size(binning), NUM_POLARITIES), np.uint8)
        for i, events in enumerate(tqdm(read(np.arange(len(ids))), "simulating", len(ids), unit=" recordings", disable=None)):
            frames[i] = count_events(events, **binning)
        return Recordings(frames, labels.astype(np.int32), np.array(ids))

    description = {"version": _CACHE_VERSION, **binning, **description}
    persons = np.zeros(len(ids), int) if persons is None else persons
    return _Source(load_or_build(description, build), description, binning, is_test, persons, place, read)


def _frame_size(binning):
    return tuple(size // binning["downsample"] for size in binning["sensor_size"])


def _digits(binning, seed):
    from sklearn.datasets import load_digits

    digits = load_digits()

    def read(indices):
        return simulated.simulate_saccades(digits.images / 16.0, seed=seed, indices=indices)

    ids = [f"digits/{i:04d}" for i in range(len(digits.target))]
    is_test = np.zeros(len(ids), bool)
    return _simulated(read, digits.target, ids, binning, "digits", is_test=is_test, name="digits", seed=seed)


def _mnist(binning, seed, folder, image_range):
    parts = {part: load_mnist(local_path(folder, "dataset.images"), part) for part in ("train", "t10k")}
    first, end = image_range or (0, len(parts["train"].labels))
    if end > len(parts["train"].labels):
        raise UserError(f"dataset.image_range: there are {len(parts['train'].labels)} training images in {folder!r}; got {end}")
    pixels = np.concatenate([each.pixels for each in parts.values()])
    labels = np.concatenate([each.labels for each in parts.values()])
    shown = np.concatenate([np.arange(first, end), np.arange(len(parts["train"].labels), len(labels))])
    ids = np.array([f"{part}/{i:05d}" for part, each in parts.items() for i in range(len(each.labels))])[shown]

    def read(indices):
        return simulated.simulate_saccades(pixels, seed=seed, recorder=simulated.NMNIST, indices=shown[indices])

    return _simulated(
        read,
        labels[shown],
        ids,
        binning,
        repr(folder),
        is_test=np.char.startswith(ids, "t10k"),
        name="digits",
        seed=seed,
        images=hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest(),
        image_range=[int(first), int(end)],
    )


def _gestures(binning, seed):
    listed = gestures.list_recordings()

    def read(indices):
        return gestures.simulate_gestures(seed=seed, indices=indices)

    ids = [
        f"person{person:02d}/light{lighting}/{label}"
        for label, person, lighting in zip(*map(np.ndarray.tolist, listed), strict=True)
    ]
    is_test = listed.persons >= gestures.FIRST_TEST_PERSON
    own = {"is_test": is_test, "persons": listed.persons, "name": "gestures", "seed": seed}
    return _simulated(read, listed.labels, ids, binning, "gestures", **own)


def _recorded(name, binning, root, download):
    folder = recorded.find_recordings(name, root, download=download)
    description = {"name": name, "version": _CACHE_VERSION, **binning, **recorded.describe_recordings(name, folder)}
    recordings = load_or_build(description, lambda: recorded.read_recordings(name, folder, **binning))

    def read(indices):
        return recorded.read_events(name, folder, recordings.ids[indices])

    collection = recorded.COLLECTIONS[name]
    is_test = np.array([collection.is_test(each) for each in recordings.ids], bool)
    persons = np.array([collection.person(each) for each in recordings.ids], np.str_)
    return _Source(recordings, description, binning, is_test, persons, repr(str(folder)), read)
