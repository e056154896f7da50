"""Recordings of real event cameras, decoded by tonic."""

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from sast_jax.data.cache import Recordings
from sast_jax.data.events import EVENT_DTYPE, bin_events
from sast_jax.errors import UserError, refuse

NMNIST_SENSOR_SIZE = (34, 34)
NMNIST_DURATION = 310_000
"""Microseconds; recordings end between 297,000 and 315,000, half of them before 308,000."""

_BYTES_PER_EVENT = 5


def find_nmnist(root: str, *, download: bool) -> Path:
    """Returns the folder that holds `Train/<digit>/*.bin` and `Test/<digit>/*.bin`, whole or in part.

    Args:
        root: That folder, or the one around it (`<root>/NMNIST`). Empty: the folder `NMNIST` in the environment
            variable `SAST_JAX_DATA`.
        download: Whether tonic may download the whole set (1.2 GB) into `root` if it is not there.

    Raises:
        UserError: If there is no such folder, or the download failed.
    """
    data = os.environ.get("SAST_JAX_DATA")
    if not root and not data:
        raise UserError(
            "dataset.root: the folder with N-MNIST's Train/ and Test/ is not set; give --config.dataset.root=FOLDER, and "
            "--config.dataset.download=true if it has yet to be downloaded there"
        )
    base = Path(os.path.expanduser(root or str(data)))
    candidates = [base, base / "NMNIST"]
    if download and not any(_is_nmnist(folder) for folder in candidates):
        _download_nmnist(base)
    for folder in candidates:
        if _is_nmnist(folder):
            return folder
    state = "does not exist" if not base.exists() else "is not a folder" if not base.is_dir() else "has no Train/ and Test/"
    raise UserError(
        f"dataset.root: {str(base)!r} {state}; it must hold Train/<digit>/*.bin and Test/<digit>/*.bin, itself or in NMNIST/. "
        "Change --config.dataset.root, or add --config.dataset.download=true"
    )


def _is_nmnist(folder: Path) -> bool:
    return (folder / "Train").is_dir() and (folder / "Test").is_dir()


def _download_nmnist(base: Path) -> None:
    import tonic

    try:
        for train in (True, False):
            tonic.datasets.NMNIST(save_to=str(base), train=train)
    except Exception as error:  # tonic lets anything through: network, archive and disk errors.
        raise UserError(
            f"dataset.download: tonic could not download N-MNIST to {str(base)!r} ({type(error).__name__}: {error}). Download "
            "Train.zip and Test.zip from N-MNIST's own page, unpack both into one folder and give --config.dataset.root=FOLDER"
        ) from error


def describe_nmnist(folder: Path) -> dict[str, Any]:
    """Returns what identifies the recordings in a folder: number of files, and a digest of names, sizes and times of change."""
    digest = hashlib.sha256()
    files = _nmnist_files(folder)
    for file in files:
        stat = file.stat()
        digest.update(f"{file.relative_to(folder).as_posix()} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return {"num_files": len(files), "files": digest.hexdigest()}


def _nmnist_files(folder: Path) -> list[Path]:
    return sorted(file for part in ("Train", "Test") for file in (folder / part).glob("[0-9]/*.bin"))


def read_nmnist(folder: Path, *, num_time_steps: int) -> Recordings:
    """Reads and bins all recordings of an N-MNIST folder.

    Args:
        folder: As returned by `find_nmnist`.
        num_time_steps: Number of bins T over `NMNIST_DURATION`.

    Returns:
        The recordings, ids `Train/<digit>/<file>` and `Test/<digit>/<file>`, sorted.

    Raises:
        UserError: Naming every file that cannot be read as an N-MNIST recording, or a part that has none.

    References:
        Orchard, Jayawant, Cohen, Thakor. Frontiers in Neuroscience 2015. CC BY-SA 4.0.
    """
    files = _nmnist_files(folder)
    ids = [file.relative_to(folder).with_suffix("").as_posix() for file in files]
    refuse(
        [
            f"dataset.root: {str(folder / part)!r} holds no recordings; expected {part}/<digit>/*.bin"
            for part in ("Train", "Test")
            if not any(name.startswith(part) for name in ids)
        ]
    )
    frames = np.empty((len(files), num_time_steps, *NMNIST_SENSOR_SIZE, 2), np.uint8)
    problems = []
    for i, file in enumerate(files):
        try:
            frames[i] = bin_events(
                read_nmnist_file(file), sensor_size=NMNIST_SENSOR_SIZE, num_time_steps=num_time_steps, duration=NMNIST_DURATION
            )
        except (ValueError, OSError) as error:
            problems.append(f"{file}: {error}")
    if problems:
        shown = problems[:10] + ([f"... and {len(problems) - 10} more"] if len(problems) > 10 else [])
        refuse(shown, f"dataset.root: {len(problems)} of {len(files)} files are no N-MNIST recordings:")
    labels = np.array([int(file.parent.name) for file in files], np.int32)
    return Recordings(frames, labels, np.array(ids))


def read_nmnist_file(file: Path) -> np.ndarray:
    """Reads the events of one recording: 40 bits an event (x 8, y 8, polarity 1, time 23).

    Args:
        file: A `.bin` file.

    Returns:
        Events of `EVENT_DTYPE`.

    Raises:
        ValueError: If the file is empty, ends within an event, or its times run backwards.
    """
    from tonic.io import read_mnist_file

    size = file.stat().st_size
    if size == 0 or size % _BYTES_PER_EVENT:
        raise ValueError(f"size must be a positive multiple of {_BYTES_PER_EVENT} bytes; got {size} (truncated, or not N-MNIST)")
    events = read_mnist_file(str(file), dtype=EVENT_DTYPE)
    if (np.diff(events["t"]) < 0).any():
        raise ValueError("event times must not decrease; they do (damaged, or not N-MNIST)")
    return events
