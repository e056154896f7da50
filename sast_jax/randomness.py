"""Keys of all that is random."""

from typing import Any

import jax

IMPLEMENTATION = "threefry2x32"
"""Of keys, whatever `jax_default_prng_impl` says: a run draws the same numbers wherever it is gone on with."""


def make_key(seed: int | jax.Array | Any) -> jax.Array:
    """Returns the key of a seed, a non-negative integer below 2^32."""
    return jax.random.key(seed, impl=IMPLEMENTATION)
