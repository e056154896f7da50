"""Files of event recordings as events. Whatever a file holds, a decoder returns events or raises a `ValueError`."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sast_jax.data.events import EVENT_DTYPE
from sast_jax.files import check_regular, read_regular

_MAX_MILLISECONDS = 10**10  # Months; times of any number of bins then fit into 64 bits.

MAX_EVENTS = 2**25
"""Of a recording of DVS128 Gesture, whose longest have some millions; a sparse file may claim any number."""

_MAX_AEDAT_BYTES = 2**29
_MAX_LABEL_BYTES = 2**20

_NMNIST_BYTES_PER_EVENT = 5
_MAX_NMNIST_BYTES = _NMNIST_BYTES_PER_EVENT * 2**23  # An event in each microsecond that its 23 bits of time can count.
_NMNIST_OVERFLOW_ROW = 240

_AEDAT_VERSION = b"#!AER-DAT3.1"
_AEDAT_END_OF_HEADER = b"#!END-HEADER\r\n"
_AEDAT_PACKET = np.dtype(
    [("type", "<i2"), ("source", "<i2")]
    + [(name, "<i4") for name in ("size", "timestamp_offset", "overflow", "capacity", "number", "valid")]
)
_AEDAT_POLARITY = 1
_AEDAT_EVENT = np.dtype([("data", "<u4"), ("timestamp", "<i4")])


def read_nmnist_file(file: Path) -> np.ndarray:
    """Reads the events of an N-MNIST recording: 40 bits an event (x 8, y 8, polarity 1, time 23).

    Args:
        file: A `.bin` file.

    Returns:
        Events of `EVENT_DTYPE`.

    Raises:
        ValueError: If the file is empty or too large, ends within an event, holds nothing but zeros, or its times run backwards.
        OSError: If it is no regular file, or cannot be read.
    """
    from tonic.io import read_mnist_file

    raw = read_regular(file, _MAX_NMNIST_BYTES)
    if not raw or len(raw) % _NMNIST_BYTES_PER_EVENT:
        raise ValueError(
            f"size must be a positive multiple of {_NMNIST_BYTES_PER_EVENT} bytes; got {len(raw)} (truncated, or not N-MNIST)"
        )
    if not raw.strip(b"\0"):
        raise ValueError(f"holds {len(raw):,} bytes that are all 0 (a copy that was cut off, or not N-MNIST)")
    # tonic takes time squared in the number of events of this row, which mark an overflow of time in longer recordings.
    if _NMNIST_OVERFLOW_ROW in raw[1::_NMNIST_BYTES_PER_EVENT]:
        raise ValueError(f"event y must be 0 to 33; got {_NMNIST_OVERFLOW_ROW} (damaged, or not N-MNIST)")
    return _ordered(read_mnist_file(io.BytesIO(raw), dtype=EVENT_DTYPE, is_stream=True))


def read_gesture_array(file: Path) -> np.ndarray:
    """Reads the events of a DVS128 Gesture recording as tonic distributes it.

    Args:
        file: A `.npy` file `[N, 4]` of numbers: column x, row y, polarity, time in milliseconds.

    Returns:
        Events of `EVENT_DTYPE`, times from the first event.

    Raises:
        ValueError: If the file is no such array, holds none, all equal or more than `MAX_EVENTS` events, or its times are
            negative or run backwards.
        OSError: If it is no regular file, or cannot be read.
    """
    check_regular(file, 32 * MAX_EVENTS + 2**16)
    try:
        array = np.lib.format.open_memmap(file, mode="r")  # It takes no memory, whatever size the header claims.
    except OSError:
        raise
    except Exception as error:  # What a damaged header raises depends on where the damage is.
        raise ValueError(f"is no readable .npy file ({error})") from error
    if array.ndim != 2 or array.shape[1] != 4 or array.dtype.kind not in "iuf":
        raise ValueError(f"must be an array [N, 4] of numbers (x, y, p, t); got {list(array.shape)} of {array.dtype}")
    if len(array) > MAX_EVENTS:
        raise ValueError(f"holds {len(array):,} events; {MAX_EVENTS:,} are allowed")
    events = np.empty(len(array), EVENT_DTYPE)
    for i, name in enumerate(("x", "y", "p", "t")):  # One by one, which takes less memory.
        column = np.array(array[:, i], np.float64)
        if not np.isfinite(column).all() or np.abs(column).max(initial=0) > _MAX_MILLISECONDS:
            raise ValueError(f"x, y, p, t must be finite numbers up to {_MAX_MILLISECONDS:g}; there are others")
        if name == "t":
            column = np.rint(column * 1000)
        elif (column != np.rint(column)).any() or np.abs(column).max(initial=0) > np.iinfo(np.int8).max:
            raise ValueError("x, y and p must be integers from 0 to 127; there are others")
        events[name] = column
    if len(events) > 1 and (events == events[0]).all():
        raise ValueError(f"holds {len(events):,} equal events (zero-filled: a copy that was cut off)")
    return _from_first(_ordered(events))


class Gesture(NamedTuple):
    """A line of a label file: class 0 to 10, and start and end in microseconds on the clock of the recording."""

    label: int
    start: int
    end: int


def read_gesture_labels(file: Path) -> list[Gesture]:
    """Reads the label file of a DVS128 Gesture recording as its authors distribute it.

    Args:
        file: A `.csv` file: a heading, then class from 1, start and end in microseconds.

    Returns:
        The gestures in the order of the file.

    Raises:
        ValueError: If it is no such file; the line is named.
        OSError: If it is no regular file, or cannot be read.
    """
    text = read_regular(file, _MAX_LABEL_BYTES).decode("utf-8-sig", errors="replace")  # Editors may begin with a BOM.
    heading, *lines = text.splitlines() or [""]
    if heading.split(",")[0].strip() != "class":
        raise ValueError(f"must begin with the heading class,startTime_usec,endTime_usec; got {heading[:60]!r}")
    gestures = []
    for number, line in enumerate(lines, 2):
        if not line.strip():
            continue
        try:
            label, start, end = (int(cell) for cell in line.split(","))
        except ValueError:
            raise ValueError(f"line {number} must be three integers; got {line[:60]!r}") from None
        if not (1 <= label <= 11 and 0 <= start < end <= 1000 * _MAX_MILLISECONDS):
            raise ValueError(f"line {number} must be a class from 1 to 11, a start and a later end; got {line[:60]!r}")
        gestures.append(Gesture(label - 1, start, end))
    if not gestures:
        raise ValueError("lists no gestures")
    return gestures


def read_aedat(file: Path) -> np.ndarray:
    """Reads the polarity events of a recording in the format AEDAT 3.1.

    Decoded here because no kept library does it: `aedat` and `dv-processing` read AEDAT 4 only, and tonic's
    `read_dvs_ibm` fails (its issue 302), while the function below it takes packets of any type for events and believes
    whatever size they claim.

    Args:
        file: An `.aedat` file.

    Returns:
        Events of `EVENT_DTYPE`, in the order of the file and on its clock.

    Raises:
        ValueError: If the file is of another format, too large, ends within a packet, or holds no events.
        OSError: If it is no regular file, or cannot be read.

    References:
        iniVation AG. AEDAT file formats: AEDAT 3.1.
    """
    raw = read_regular(file, _MAX_AEDAT_BYTES)
    if not raw.startswith(_AEDAT_VERSION):
        raise ValueError(f"must begin with {_AEDAT_VERSION.decode()}; got {raw[:12]!r}")
    position = raw.find(_AEDAT_END_OF_HEADER)
    if position < 0:
        raise ValueError("has no end of its header (truncated)")
    packets = [packet for packet in _polarity_packets(raw, position + len(_AEDAT_END_OF_HEADER)) if len(packet)]
    if not packets:
        raise ValueError("holds no polarity events")
    return np.concatenate(packets)


def _polarity_packets(raw: bytes, position: int) -> Iterator[np.ndarray]:
    while position < len(raw):
        if len(raw) - position < _AEDAT_PACKET.itemsize:
            raise ValueError(f"ends within the header of a packet, at byte {position} (truncated)")
        packet = np.frombuffer(raw, _AEDAT_PACKET, 1, position)[0]
        position += _AEDAT_PACKET.itemsize
        size, capacity, number = (int(packet[name]) for name in ("size", "capacity", "number"))
        if size <= 0 or not 0 <= number <= capacity or packet["overflow"] < 0:
            raise ValueError(f"has a packet of {number} of {capacity} events of {size} bytes, before byte {position} (damaged)")
        if size * capacity > len(raw) - position:
            raise ValueError(
                f"has a packet of {size * capacity} bytes where {len(raw) - position} are left, at byte {position} (truncated)"
            )
        if packet["type"] == _AEDAT_POLARITY:
            if size != _AEDAT_EVENT.itemsize:
                raise ValueError(f"has polarity events of {size} bytes instead of {_AEDAT_EVENT.itemsize}, at byte {position}")
            encoded = np.frombuffer(raw, _AEDAT_EVENT, number, position)
            encoded = encoded[encoded["data"] & 1 == 1]  # The others were marked as invalid by whoever wrote them.
            events = np.empty(len(encoded), EVENT_DTYPE)
            events["x"], events["y"] = encoded["data"] >> 17, encoded["data"] >> 2 & 0x7FFF
            events["p"] = encoded["data"] >> 1 & 1
            events["t"] = encoded["timestamp"].astype(np.int64) + (int(packet["overflow"]) << 31)
            yield events
        position += size * capacity


def cut_gesture(events: np.ndarray, gesture: Gesture) -> np.ndarray:
    """Returns the events of a gesture, times from its first event.

    Args:
        events: Events of a recording, as from `read_aedat`.
        gesture: When it was made.

    Raises:
        ValueError: If there are none, or their times run backwards.
    """
    inside = (gesture.start <= events["t"]) & (events["t"] < gesture.end)
    try:
        return _from_first(_ordered(events[inside]))
    except ValueError as error:
        raise ValueError(f"from {gesture.start} to {gesture.end} us: {error}") from error


def _ordered(events):
    if not len(events):
        raise ValueError("holds no events")
    if events["t"][0] < 0:
        raise ValueError(f"event times must be 0 or more; got {events['t'][0]} us")
    if (np.diff(events["t"]) < 0).any():
        raise ValueError("event times must not decrease; they do (damaged, or another format)")
    return events


def _from_first(events):
    events["t"] -= events["t"][0]
    return events
