"""Address events and their binning into frames."""

import numpy as np

EVENT_DTYPE = np.dtype([("x", np.int16), ("y", np.int16), ("t", np.int64), ("p", np.int8)])
"""One event: column x and row y in pixels, time t in microseconds, polarity p (1 brighter, 0 darker)."""

NUM_POLARITIES = 2


def bin_events(
    events: np.ndarray, *, sensor_size: tuple[int, int], num_time_steps: int, duration: int, downsample: int = 1
) -> np.ndarray:
    r"""Counts events per time step, pixel and polarity.

    .. math::
        n_{t,y,x,p} =
        \bigl|\{i : t = \lfloor t_i T / D \rfloor,\; (x, y) = \lfloor (x_i, y_i) / d \rfloor,\; p = p_i\}\bigr|

    The edges of the bins are multiples of :math:`D / T`, equal for all recordings; events at or after :math:`D` are left out.

    Args:
        events: Structured array of `EVENT_DTYPE`, any order in time.
        sensor_size: Height H and width W in pixels.
        num_time_steps: Number of bins T.
        duration: D, in microseconds.
        downsample: d, side of the squares of pixels that are counted together; it divides H and W.

    Returns:
        uint8 `[T, H / d, W / d, 2]`, counts above 255 saturated.

    Raises:
        ValueError: If an event lies outside the sensor, has a negative time or a polarity other than 0 and 1.

    Example:
        >>> events = np.array([(1, 0, 10, 1), (1, 0, 20, 1), (0, 1, 90, 0)], EVENT_DTYPE)
        >>> frames = bin_events(events, sensor_size=(2, 2), num_time_steps=2, duration=100)
        >>> frames[0, 0, 1].tolist(), frames[1, 1, 0].tolist()
        ([0, 2], [1, 0])
    """
    height, width = sensor_size
    for name, limit in (("x", width), ("y", height), ("p", NUM_POLARITIES), ("t", None)):
        values = events[name]
        if len(values) and (values.min() < 0 or (limit is not None and values.max() >= limit)):
            allowed = "0 or more" if limit is None else f"0 to {limit - 1}"
            raise ValueError(f"event {name} must be {allowed}; got {values.min()} to {values.max()}")
    events = events[events["t"] < duration]
    shape = (num_time_steps, height // downsample, width // downsample, NUM_POLARITIES)
    step = events["t"] * num_time_steps // duration
    index = np.ravel_multi_index((step, events["y"] // downsample, events["x"] // downsample, events["p"]), shape)
    counts = np.bincount(index, minlength=int(np.prod(shape)))
    return np.minimum(counts, 255).astype(np.uint8).reshape(shape)
