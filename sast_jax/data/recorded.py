"""Folders of real recordings: where they are, what is in them, and how they get there."""

import contextlib
import functools
import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from sast_jax.data import decoders
from sast_jax.data.cache import Recordings
from sast_jax.data.events import NUM_POLARITIES, count_events, find_time_problems, measure_times
from sast_jax.errors import UserError
from sast_jax.files import is_side_file, local_path
from sast_jax.text import printable

NMNIST_SENSOR_SIZE = (34, 34)
NMNIST_DURATION = 310_000
"""Microseconds; recordings end between 297,000 and 315,000, half of them before 308,000."""

GESTURE_SENSOR_SIZE = (128, 128)
GESTURE_TEST_USERS = range(24, 30)
"""Of the authors' split; users 1 to 23 are for training."""


class Source(NamedTuple):
    """A recording that has yet to be read.

    Attributes:
        id: Its name in the data set.
        label: Its class.
        file: The file that holds it.
        read: Returns its events, or raises a `ValueError` saying what is wrong with the file.
    """

    id: str
    label: int
    file: Path
    read: Callable[[], np.ndarray]


class Collection(NamedTuple):
    """A published data set of recordings.

    Attributes:
        title: Its name in texts.
        folders: Names of its folder, tonic's first.
        layout: What that folder holds, in words.
        is_there: Whether a folder looks like it.
        list_files: All files in a folder that recordings depend on, sorted.
        list_sources: Recordings in a folder, and what is wrong with files that had to be read to list them.
        is_test: Whether the recording of an id belongs to the test part.
        person: Who made the recording of an id; empty if that is not known.
        time_unit: What its files give times in, in words.
        tonic_name: Class of tonic that downloads it; its parts are the folders `tonic_parts`, training first.
        tonic_parts: Those folders.
        by_hand: How to get it without tonic.
    """

    title: str
    folders: tuple[str, ...]
    layout: str
    is_there: Callable[[Path], bool]
    list_files: Callable[[Path], list[Path]]
    list_sources: Callable[[Path], tuple[list[Source], list[str]]]
    is_test: Callable[[str], bool]
    person: Callable[[str], str]
    time_unit: str
    tonic_name: str
    tonic_parts: tuple[str, str]
    by_hand: str


_MAX_DEPTH = 3  # Of folders in the one of a part; so deep, recordings in a wrong place are found and named.


def _find(folder: Path, suffix: str, depth: int = _MAX_DEPTH) -> Iterator[Path]:
    """Yields what in a folder ends in a suffix, in small or capital letters, at any place: not all of it need be recordings.

    Raises:
        OSError: If a folder cannot be read, so that recordings would be missed.
    """
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_side_file(entry.name):
                continue
            if entry.name.lower().endswith(suffix):
                yield folder / entry.name
            elif depth and entry.is_dir():
                yield from _find(folder / entry.name, suffix, depth - 1)


_DIGITS = tuple("0123456789")


def _nmnist_files(folder):
    return sorted(file for part in ("Train", "Test") for file in _find(folder / part, ".bin"))


def _nmnist_sources(folder):
    sources, problems = [], []
    for file in _nmnist_files(folder):
        _, *digits = file.relative_to(folder).parts[:-1]
        if len(digits) == 1 and digits[0] in _DIGITS and file.suffix == ".bin":
            read = functools.partial(decoders.read_nmnist_file, file)
            sources.append(Source(_id(file, folder), int(digits[0]), file, read))
        else:
            problems.append(f"{printable(str(file))}: is no Train/<digit>/<name>.bin or Test/<digit>/<name>.bin, digit 0 to 9")
    return sources, problems


def _gesture_files(folder):
    parts = [part for part in (folder / "ibmGestureTrain", folder / "ibmGestureTest") if part.is_dir()]
    arrays = sorted(file for part in parts for file in _find(part, ".npy"))
    return arrays or sorted(
        file for suffix in (".aedat", "_labels.csv") for file in _find(folder, suffix, 0) if suffix == ".aedat" or _is_user(file)
    )


def _is_user(file):
    return file.name.startswith("user")


def _gesture_sources(folder):
    sources, problems = [], []
    read_aedat = functools.lru_cache(maxsize=1)(decoders.read_aedat)  # The gestures of a file follow each other.
    for file in _gesture_files(folder):
        shown = printable(str(file))
        if file.suffix.lower() == ".npy":
            if file.suffix != ".npy" or len(file.relative_to(folder).parts) != 3 or not _is_user(file.parent):
                problems.append(f"{shown}: is no userNN_<light>/<class>.npy in ibmGestureTrain or ibmGestureTest")
            elif file.stem in map(str, range(11)):
                sources.append(
                    Source(_id(file, folder), int(file.stem), file, functools.partial(decoders.read_gesture_array, file))
                )
            else:
                problems.append(f"{shown}: the name must be the class, 0.npy to 10.npy")
        elif file.suffix.lower() == ".aedat" and (file.suffix != ".aedat" or not _is_user(file)):
            problems.append(f"{shown}: is no userNN_<light>.aedat")
        elif file.suffix == ".aedat":
            labels = file.with_name(f"{file.stem}_labels.csv")
            try:
                gestures = decoders.read_gesture_labels(labels)
            except FileNotFoundError:
                problems.append(
                    f"{printable(str(labels))}: is missing; without it the gestures in {printable(file.name)} are not known"
                )
            except ValueError as error:
                problems.append(f"{printable(str(labels))}: {error}")
            else:
                for i, gesture in enumerate(gestures):
                    nth = sum(earlier.label == gesture.label for earlier in gestures[:i])
                    name = f"{_id(file, folder)}/{gesture.label}" + f"-{nth + 1}" * (nth > 0)
                    sources.append(Source(name, gesture.label, file, functools.partial(_read_gesture, read_aedat, gesture, file)))
    return sources, problems


def _read_gesture(read_aedat, gesture, file):
    return decoders.cut_gesture(read_aedat(file), gesture)


def _gesture_person(name):
    return re.search(r"user\d*", name)[0]


def _is_gesture_test(name):
    number = int(_gesture_person(name).removeprefix("user") or 0)
    # Users beside the authors' 29 are taken for what the folder says they are.
    return number in GESTURE_TEST_USERS or (number not in range(1, 24) and name.startswith("ibmGestureTest"))


def _id(file, folder):
    name = file.relative_to(folder).with_suffix("").as_posix()
    try:
        name.encode()
    except UnicodeEncodeError:  # Bytes of another encoding, which not every file that names a recording could hold.
        name = os.fsencode(name).decode(errors="backslashreplace")
    return name


COLLECTIONS = {
    "nmnist": Collection(
        title="N-MNIST",
        folders=("NMNIST",),
        layout="Train/<digit>/*.bin and Test/<digit>/*.bin",
        is_there=lambda folder: all((folder / part).is_dir() for part in ("Train", "Test")),
        list_files=_nmnist_files,
        list_sources=_nmnist_sources,
        is_test=lambda name: name.startswith("Test/"),
        person=lambda name: "",
        time_unit="microseconds",
        tonic_name="NMNIST",
        tonic_parts=("Train", "Test"),
        by_hand="Train.zip and Test.zip from N-MNIST's own page, https://www.garrickorchard.com/datasets/n-mnist",
    ),
    "dvs_gesture": Collection(
        title="DVS128 Gesture",
        folders=("DVSGesture", "DvsGesture"),
        layout="ibmGestureTrain/userNN_<light>/<class>.npy and ibmGestureTest/..., or userNN_<light>.aedat with "
        "userNN_<light>_labels.csv",
        is_there=lambda folder: (
            any((folder / f"ibmGesture{part}").is_dir() for part in ("Train", "Test")) or any(folder.glob("user*.aedat"))
        ),
        list_files=_gesture_files,
        list_sources=_gesture_sources,
        is_test=_is_gesture_test,
        person=_gesture_person,
        time_unit="milliseconds (.npy) or microseconds (.aedat)",
        tonic_name="DVSGesture",
        tonic_parts=("ibmGestureTrain", "ibmGestureTest"),
        by_hand="DvsGesture.tar.gz from its authors' page, https://research.ibm.com/interactive/dvsgesture/, or, with a browser, "
        "ibmGestureTrain.tar.gz from https://figshare.com/ndownloader/files/38022171 and ibmGestureTest.tar.gz from "
        "https://figshare.com/ndownloader/files/38020584",
    ),
}
"""The published data sets by the name that a config calls them."""


def find_recordings(name: str, root: str, *, download: bool) -> Path:
    """Returns the folder that holds the recordings of a data set, whole or in part.

    Args:
        name: A key of `COLLECTIONS`.
        root: That folder, or the one around it (as `<root>/NMNIST`). Empty: the environment variable `SAST_JAX_DATA`.
        download: Whether tonic may download the whole set into `root` if it is not there.

    Raises:
        UserError: If there is no such folder, or the download failed.
    """
    collection = COLLECTIONS[name]
    data = os.environ.get("SAST_JAX_DATA")
    if not root and not data:
        raise UserError(
            f"dataset.root: the folder of the {collection.title} recordings is not set; give --config.dataset.root=FOLDER, and "
            "--config.dataset.download=true if they have yet to be downloaded there"
        )
    base = local_path(root or str(data), "dataset.root")
    candidates = [base, *(base / name for name in collection.folders)]
    with _naming(base):
        if download and not any(map(collection.is_there, candidates)):
            _download(collection, base)
        for folder in candidates:
            if collection.is_there(folder):
                return folder
        state = "does not exist" if not base.exists() else "holds none" if base.is_dir() else "is not a folder"
        for folder in candidates:
            if folder.is_dir():
                os.scandir(folder).close()  # Of what may not be looked into nothing can be said.
    raise UserError(
        f"dataset.root: {str(base)!r} {state}; with recordings of {collection.title} it must hold {collection.layout}, itself "
        f"or in {collection.folders[0]}/. Change --config.dataset.root, or add --config.dataset.download=true"
    )


@contextlib.contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Turns errors of the disk or its permissions, which are none of the data, into a `UserError` that names the file."""
    try:
        yield
    except OSError as error:
        place = printable(os.fsdecode(error.filename or folder))
        raise UserError(f"dataset.root: {place}: cannot be read ({error.strerror or error})") from error


def _download(collection: Collection, base: Path) -> None:
    """Lets tonic download each part beside its place and moves it there when it is whole; a failed one leaves nothing."""
    import tonic

    for part, train in zip(collection.tonic_parts, (True, False), strict=True):
        place = base / collection.folders[0] / part
        if place.exists():
            continue
        made = [folder for folder in (place.parent, *place.parent.parents) if not folder.exists()]
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=place.parent, prefix=".download-") as name:
                try:
                    with contextlib.redirect_stdout(sys.stderr):  # Where tonic says what it does; ours holds results.
                        getattr(tonic.datasets, collection.tonic_name)(save_to=name, train=train)
                except Exception as error:  # tonic lets anything through: network, archive and disk errors.
                    problem = _download_problem(Path(name), error)
                    raise UserError(
                        f"dataset.download: tonic could not download {collection.title} ({problem}). "
                        f"Download it by hand: {collection.by_hand}. Unpack it into {str(place.parent)!r}, so that this folder "
                        f"holds {collection.layout}, and give --config.dataset.root={base}"
                    ) from error
                (Path(name) / collection.folders[0] / part).rename(place)
        except BaseException:
            for folder in made:
                with contextlib.suppress(OSError):
                    folder.rmdir()
            raise


def _download_problem(folder: Path, error: Exception) -> str:
    """Says what came instead of an archive, or else what the error says."""
    for archive in folder.rglob("*"):
        if archive.is_file():
            with archive.open("rb") as file:
                start = file.read(512).lstrip().lower()
            if not start:
                return f"the link is dead: it answered with 0 bytes instead of {archive.name}"
            if start.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml")):
                return f"the link is dead: it answered with a web page instead of {archive.name}"
    return f"{type(error).__name__}: {error}"


def describe_recordings(name: str, folder: Path) -> dict[str, Any]:
    """Returns what identifies the recordings in a folder: number of files, and a digest of names, sizes and times of change.

    The times are of the content, which a program may set, and of the file, which only the system sets: a recording that gets
    another content at equal size and time is another. (On Windows the second is the time of its creation.)

    Raises:
        UserError: If a file or folder cannot be read.
    """
    digest = hashlib.sha256()
    with _naming(folder):
        files = COLLECTIONS[name].list_files(folder)
        for file in files:
            stat = file.stat()
            line = f"{file.relative_to(folder).as_posix()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}\n"
            digest.update(line.encode(errors="surrogatepass"))
    return {"num_files": len(files), "files": digest.hexdigest()}


def read_recordings(
    name: str, folder: Path, *, sensor_size: tuple[int, int], num_time_steps: int, duration: int, downsample: int = 1
) -> Recordings:
    """Reads and bins all recordings of a folder.

    Args:
        name: A key of `COLLECTIONS`.
        folder: As returned by `find_recordings`.
        sensor_size: Height and width of the camera in pixels.
        num_time_steps: Number of bins T.
        duration: Length of the bins together, in microseconds; 0: that of the recording, so that bins differ in length.
        downsample: Side of the squares of pixels that are counted together.

    Returns:
        The recordings, sorted by file. Those that cannot be read are left out, and `skipped` names them; `remarks` are
        `find_time_problems`'.

    Raises:
        UserError: If a file cannot be opened, or the frames do not fit into memory.

    References:
        Orchard, Jayawant, Cohen, Thakor. Converting Static Image Datasets to Spiking Neuromorphic Datasets Using Saccades.
        Frontiers in Neuroscience 2015.
        Amir et al. A Low Power, Fully Event-Based Gesture Recognition System. CVPR 2017.
    """
    collection = COLLECTIONS[name]
    with _naming(folder):
        sources, problems = collection.list_sources(folder)
        frame_shape = (num_time_steps, *(size // downsample for size in sensor_size), NUM_POLARITIES)
        frames = _allocate((len(sources), *frame_shape))
        read: list[Source] = []
        times = []
        for source in tqdm(sources, desc=f"reading {collection.title}", disable=None, leave=False):
            try:
                events = source.read()
                frames[len(read)] = count_events(
                    events,
                    sensor_size=sensor_size,
                    num_time_steps=num_time_steps,
                    duration=duration or int(events["t"][-1]) + 1,
                    downsample=downsample,
                )
                read.append(source)
                times.append(measure_times(events, duration or int(events["t"][-1]) + 1))
            except ValueError as error:
                problems.append(f"{printable(str(source.file))}: {error}")
    labels = np.array([source.label for source in read], np.int32)
    ids = np.array([source.id for source in read], np.str_)
    remarks = []
    if duration:
        setting = "" if name == "nmnist" else "dataset.duration={seconds}"
        remarks = find_time_problems(times, duration, ids=ids.tolist(), setting=setting, unit=collection.time_unit)
    skipped = np.array(list(dict.fromkeys(problems)), np.str_)
    return Recordings(frames[: len(read)], labels, ids, skipped, np.array(remarks, np.str_))


def read_events(name: str, folder: Path, ids: np.ndarray) -> Iterator[np.ndarray]:
    """Yields the events of the recordings of the given ids, which `read_recordings` has read before.

    Raises:
        UserError: If one of them is gone, or has been changed into what cannot be read.
    """
    with _naming(folder):
        sources = {source.id: source for source in COLLECTIONS[name].list_sources(folder)[0]}
        for each in ids:
            if each not in sources:
                raise UserError(f"dataset.root: {str(folder)!r}: recording {str(each)!r} is gone since it was binned")
            try:
                events = sources[each].read()
            except ValueError as error:
                file = printable(str(sources[each].file))
                raise UserError(f"dataset.root: {file}: {error}; it has been changed since it was binned") from error
            yield events


def _allocate(shape: tuple[int, ...]) -> np.ndarray:
    num_bytes = int(np.prod(shape, dtype=object))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else num_bytes
    if num_bytes > memory:
        raise UserError(
            f"dataset.num_time_steps: frames {'x'.join(map(str, shape))} need {num_bytes / 1e9:.0f} GB, this machine has "
            f"{memory / 1e9:.0f} GB; take fewer steps, or a larger dataset.downsample"
        )
    return np.empty(shape, np.uint8)
