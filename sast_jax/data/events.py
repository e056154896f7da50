"""Address events, their binning into frames, and whether their times fit the frames."""

import operator
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sast_jax.errors import warn
from sast_jax.text import printable

EVENT_DTYPE = np.dtype([("x", np.int16), ("y", np.int16), ("t", np.int64), ("p", np.int8)])
"""One event: column x and row y in pixels, time t in microseconds, polarity p (1 brighter, 0 darker)."""

NUM_POLARITIES = 2

_MAX_INT64 = 2**63 - 1


def bin_events(
    events: np.ndarray, *, sensor_size: tuple[int, int], num_time_steps: int, duration: int, downsample: int = 1
) -> np.ndarray:
    r"""Counts events per time step, pixel and polarity.

    .. math::
        n_{t,y,x,p} =
        \bigl|\{i : t = \lfloor t_i T / D \rfloor,\; (x, y) = \lfloor (x_i, y_i) / d \rfloor,\; p = p_i\}\bigr|

    The edges of the bins are multiples of :math:`D / T`, equal for all recordings; events at or after :math:`D` are left out.
    A `SuspicionWarning` says so if the times do not look like microseconds from the start of the recording: see
    `find_time_problems`.

    Args:
        events: Structured array with the fields of `EVENT_DTYPE`, of any integer types (a polarity may be boolean), in any
            order in time.
        sensor_size: Height H and width W in pixels.
        num_time_steps: Number of bins T.
        duration: D, in microseconds.
        downsample: d, side of the squares of pixels that are counted together; it divides H and W.

    Returns:
        uint8 `[T, H / d, W / d, 2]`, counts above 255 saturated.

    Raises:
        ValueError: If an event lies outside the sensor, has a negative time or a polarity other than 0 and 1, or a size is
            not positive or not divided by `downsample`.
        TypeError: If the events are no structured array of integers.

    Example:
        >>> events = np.array([(1, 0, 10, 1), (1, 0, 20, 1), (0, 1, 90, 0)], EVENT_DTYPE)
        >>> frames = bin_events(events, sensor_size=(2, 2), num_time_steps=2, duration=100)
        >>> frames[0, 0, 1].tolist(), frames[1, 1, 0].tolist()
        ([0, 2], [1, 0])
    """
    frames = count_events(
        events, sensor_size=sensor_size, num_time_steps=num_time_steps, duration=duration, downsample=downsample
    )
    for problem in find_time_problems([measure_times(events, duration)], duration, setting="duration={microseconds}"):
        warn(f"bin_events: {problem}")
    return frames


def count_events(
    events: np.ndarray, *, sensor_size: tuple[int, int], num_time_steps: int, duration: int, downsample: int = 1
) -> np.ndarray:
    """Returns what `bin_events` returns, without a word about times."""
    size = downsampled(sensor_size, downsample)
    duration, num_time_steps = operator.index(duration), operator.index(num_time_steps)
    if duration < 1 or num_time_steps < 1 or duration > _MAX_INT64 // num_time_steps:
        raise ValueError(
            f"num_time_steps and duration must be positive integers whose product is at most {_MAX_INT64}; got {num_time_steps} "
            f"and {duration}"
        )
    x, y, t, p = check_events(events, sensor_size)
    inside = t < duration
    shape = (num_time_steps, *size, NUM_POLARITIES)
    x, y, t, p = (column[inside].astype(np.int64) for column in (x, y, t, p))  # Products below may exceed narrower types.
    index = np.ravel_multi_index((t * num_time_steps // duration, y // downsample, x // downsample, p), shape)
    counts = np.bincount(index, minlength=int(np.prod(shape)))
    return np.minimum(counts, 255).astype(np.uint8).reshape(shape)


def check_events(events: np.ndarray, sensor_size: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Returns the columns x, y, t, p of events that `bin_events` takes; raises what it raises for others."""
    names = getattr(getattr(events, "dtype", None), "names", None) or ()
    if not {*"xytp"} <= set(names) or events.ndim != 1:
        raise TypeError("events must be a structured array with the fields x, y, t (microseconds), p, as of EVENT_DTYPE")
    height, width = sensor_size
    for name, limit in (("x", width), ("y", height), ("p", NUM_POLARITIES), ("t", None)):
        values = events[name]
        if values.dtype.kind not in "iu" + "b" * (name == "p"):
            unit = " in microseconds" if name == "t" else ""
            raise TypeError(f"event {name} must be integers{unit}; got {values.dtype}")
        if len(values) and (values.min() < 0 or (limit is not None and values.max() >= limit)):
            allowed = "0 or more" if limit is None else f"0 to {limit - 1}"
            raise ValueError(f"event {name} must be {allowed}; got {values.min():d} to {values.max():d}")
    return tuple(events[name] for name in "xytp")


def downsampled(sensor_size: tuple[int, int], downsample: int) -> tuple[int, int]:
    """Returns height and width in squares of `downsample` pixels.

    Raises:
        ValueError: If they are not whole numbers of squares, so that pixels, or all of them, would be lost.
    """
    height, width = sensor_size
    if downsample < 1 or min(height, width) < 1 or height % downsample or width % downsample:
        raise ValueError(f"downsample must be positive and divide the {height} x {width} pixels of the sensor; got {downsample}")
    return height // downsample, width // downsample


class Times(NamedTuple):
    """When the events of a recording are.

    Attributes:
        first: The earliest time, in microseconds; 0 if there are no events.
        last: The latest one.
        num_events: Number of events.
        num_inside: Number of them before the end of the frames.
    """

    first: int
    last: int
    num_events: int
    num_inside: int


def measure_times(events: np.ndarray, duration: int) -> Times:
    """Returns when the events of a recording are, which frames of `duration` microseconds show."""
    t = events["t"]
    if not len(t):
        return Times(0, 0, 0, 0)
    return Times(int(t.min()), int(t.max()), len(t), int(np.count_nonzero(t < duration)))


FRONT_SHARE = 50
"""Events that all lie in less than this part of the duration, or fewer than this part of the events within it, look wrong."""

_MIN_EVENTS = 10  # Of which all lie at the start, before that says something about the unit of time.


def find_time_problems(
    recordings: Sequence[Times],
    duration: int,
    *,
    ids: Sequence[str] = (),
    setting: str = "",
    unit: str = "microseconds",
) -> list[str]:
    """Returns what looks wrong about the times of a set of recordings, a line each: what was seen and what to set.

    Three things are looked for: recordings without an event within the duration, as of a camera whose clock does not start at
    0; recordings of which less than 1 in `FRONT_SHARE` events is within it; and recordings whose events, `_MIN_EVENTS` or more,
    all lie in the first of `FRONT_SHARE` parts of it, as times in seconds or milliseconds do that are taken for microseconds.

    Args:
        recordings: When the events of each are.
        duration: Length of the frames, in microseconds.
        ids: Names of the recordings; none for a single one that has none.
        setting: What sets the duration, with `{microseconds}` or `{seconds}` for its value; empty: it cannot be set.
        unit: What times are given in, in words.
    """
    outside: list[int] = []
    few: list[int] = []
    front: list[int] = []
    for i, times in enumerate(recordings):
        if times.num_events and not times.num_inside:
            outside.append(i)
        elif times.num_inside * FRONT_SHARE < times.num_events:
            few.append(i)
        elif times.num_events >= _MIN_EVENTS and (times.last + 1) * FRONT_SHARE <= duration:
            front.append(i)
    problems = []
    for members in (outside, few, front):
        if members:
            times = recordings[members[0]]
            which = f"{len(members):,} of {len(recordings):,} recordings, as {printable(ids[members[0]])}: " if len(ids) else ""
            seen = (
                f"{times.num_inside:,} of {times.num_events:,} events are within the duration of {duration:,} us; they are at "
                f"{times.first:,} to {times.last:,} us"
            )
            if members is front:
                seen += f", all in the first {100 * (times.last + 1) / duration:.2g} % of it"
            length = times.last - times.first + 1
            is_only_late = not times.num_inside and length <= FRONT_SHARE * duration
            advice = "subtract the first time from all of a recording" if is_only_late else "convert them"
            if setting and not is_only_late:
                advice += f", or set {setting.format(microseconds=length, seconds=f'{length / 1e6:g}')}"
            problems.append(f"{which}{seen}. Times must be in {unit} from the start of the recording: {advice}")
    return problems
