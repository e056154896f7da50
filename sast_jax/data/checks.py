"""What must hold of a data set's parts before a number about them means anything."""

import hashlib
from collections.abc import Mapping

import numpy as np

from sast_jax.data.cache import Recordings
from sast_jax.errors import refuse, warn


def content_ids(recordings: Recordings) -> np.ndarray:
    """Returns uint64 `[N]`: a hash of each recording's frames, equal for equal frames."""
    digests = [hashlib.blake2b(frames.tobytes(), digest_size=8).digest() for frames in recordings.frames]
    return np.frombuffer(b"".join(digests), np.uint64)


def check_parts(parts: Mapping[str, Recordings], num_classes: int) -> None:
    """Refuses damaged or leaking parts, and warns of recordings that are in several under different names.

    Args:
        parts: Parts by name, which no recording may share.
        num_classes: Number of classes K.

    Raises:
        UserError: Listing labels out of range, numbers that are not finite, and ids that occur more than once.
    """
    problems = []
    for name, part in parts.items():
        wrong = (part.labels < 0) | (part.labels >= num_classes)
        if wrong.any():
            found = f"{_some(part.ids[wrong])} has {part.labels[wrong][0]}"
            problems.append(f"{name}: labels must be 0 to {num_classes - 1}; {found}")
        if part.frames.dtype.kind not in "iub":
            damaged = ~np.isfinite(part.frames).reshape(len(part.frames), -1).all(1)
            if damaged.any():
                problems.append(f"{name}: frames must be finite numbers; those of {_some(part.ids[damaged])} are not")
    ids = np.concatenate([part.ids for part in parts.values()])
    unique, counts = np.unique(ids, return_counts=True)
    if (counts > 1).any():
        problems.append(f"{_some(unique[counts > 1])} is in {' and '.join(parts)}, or twice in one of them")
    refuse(problems, "dataset: its parts cannot be trained and tested on:")

    contents = {name: content_ids(part) for name, part in parts.items()}
    first, *others = contents
    for name in others:
        also = np.isin(contents[name], contents[first])
        if also.any():
            warn(
                f"dataset: {also.sum()} of {len(also)} {name} recordings have the same frames as a {first} recording, as "
                f"{_some(parts[name].ids[also])}: what is measured on them is not generalisation. Remove the copies, or take "
                "more dataset.num_time_steps if different recordings look alike"
            )


def _some(ids: np.ndarray) -> str:
    return f"{str(ids[0])!r}" + (f" and {len(ids) - 1} more" if len(ids) > 1 else "")
