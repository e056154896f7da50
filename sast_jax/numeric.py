"""Ranges and dtypes of the numbers that the equations take."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

Range = Literal["in [0, 1]", "positive", "positive and finite", "a finite number >= 0"]

_HOLDS = {
    "in [0, 1]": lambda x: (x >= 0) & (x <= 1),
    "positive": lambda x: x > 0,
    "positive and finite": lambda x: (x > 0) & np.isfinite(x),
    "a finite number >= 0": lambda x: (x >= 0) & np.isfinite(x),
}


def check_range(name: str, value: Any, allowed: Range) -> None:
    """Refuses numbers outside a range, as far as they are known.

    Args:
        name: What the message calls it.
        value: A number, or an array of them. What jax traces is not known. Arrays on another device than a CPU are not fetched.
        allowed: What it must be.

    Raises:
        ValueError: If it is not a real number, or outside its range.
    """
    if isinstance(value, jax.core.Tracer):
        return
    if isinstance(value, jax.Array) and not (value.is_fully_addressable and all(d.platform == "cpu" for d in value.devices())):
        return
    array = np.asarray(value)
    is_real = array.dtype == bool or jnp.issubdtype(array.dtype, jnp.integer) or jnp.issubdtype(array.dtype, jnp.floating)
    if not is_real or not np.all(_HOLDS[allowed](array)):
        raise ValueError(f"{name} must be {allowed}; got {value!r}")


def wide_dtype(x: Any) -> Any:
    """Returns the dtype in which an array is added up, float32 at least; under jax's strict dtype promotion, too."""
    dtype = jnp.result_type(x)
    return dtype if jnp.issubdtype(dtype, jnp.inexact) and jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)
