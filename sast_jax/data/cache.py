"""Binned recordings on disk: built once, checked at every load."""

import hashlib
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sast_jax.errors import UserError
from sast_jax.files import atomic_write, cache_dir, check_regular, remove_leftovers

_LOGGER = logging.getLogger(__name__)


class Recordings(NamedTuple):
    """Binned recordings of N samples.

    Attributes:
        frames: uint8 `[N, T, H, W, 2]` event counts.
        labels: int32 `[N]`.
        ids: str `[N]`, the name of each recording in its data set.
        skipped: str `[M]`, what could not be read, a line per file with the reason.
        remarks: str `[L]`, what looks wrong about those that could, a line each.
    """

    frames: np.ndarray
    labels: np.ndarray
    ids: np.ndarray
    skipped: np.ndarray = np.array([], np.str_)
    remarks: np.ndarray = np.array([], np.str_)

    def take(self, index: np.ndarray) -> "Recordings":
        """Returns the samples with the given indices, in that order."""
        return Recordings(self.frames[index], self.labels[index], self.ids[index])

    def checksum(self) -> str:
        """SHA-256 over shapes, dtypes and bytes of frames, labels and ids."""
        digest = hashlib.sha256()
        for array in (self.frames, self.labels, self.ids):
            digest.update(f"{array.shape}{array.dtype}".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def load_or_build(description: dict[str, Any], build: Callable[[], Recordings]) -> Recordings:
    """Returns the cached recordings of `description`, building them if they are missing or damaged.

    Args:
        description: All that the result depends on (data set, files, binning), as JSON values with a `name`; anything
            else gets another cache file, so a changed binning never meets stale frames.
        build: Makes the recordings.

    Returns:
        The recordings, equal to what `build` returns.
    """
    key = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]
    path = cache_dir() / f"{description['name']}-{key}.npz"
    remove_leftovers(path.parent, r".+\.npz")
    cached = _load(path)
    if cached is None:
        cached = build()
        try:
            with atomic_write(path) as file:
                np.savez(file, checksum=np.array(cached.checksum()), **cached._asdict())
        except OSError as error:
            raise UserError(
                f"cannot write the cache {str(path)!r} ({error.strerror}); make room there, or set the environment variable "
                "SAST_JAX_CACHE to a folder for it"
            ) from error
    return cached


def _load(path: Path) -> Recordings | None:
    try:
        check_regular(path, sys.maxsize)
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            # Nothing is stored compressed, so nothing can be larger than the file.
            if sum(entry.file_size for entry in arrays.zip.infolist()) <= path.stat().st_size:
                recordings = Recordings(**{name: arrays[name] for name in Recordings._fields if name in arrays})
                if recordings.checksum() == arrays["checksum"].item():
                    return recordings
    except FileNotFoundError:
        return None
    except Exception as error:  # What a damaged archive raises depends on where the damage is.
        _LOGGER.debug("%s", error)
    _LOGGER.warning("the cache file %r is damaged or of another version; its recordings are read and binned anew", str(path))
    return None
