"""Time of one convolution and of its weight gradient, as jax has them and as sast_jax has them.

    python benchmarks/convolution.py

Both take turns. A ratio is the median, over the rounds, of a time over that of `jax.lax.conv_general_dilated`, or of the gradient
that jax derives from it, in the same round. Results are compared first. Writes `benchmarks/results/convolution.json` and `.md`,
and the table into `docs/results.md`.
"""

import functools

import jax
import numpy as np
from jax import lax
from publish import publish
from turns import begin, compare, describe, show, take_turns

from sast_jax.convolution import convolution

LAYERS = {
    "34x34, 2 to 16 channels, batch 32": (32, 34, 2, 16),
    "17x17, 16 to 32 channels, batch 32": (32, 17, 16, 32),
    "64x64, 2 to 16 channels, batch 16": (16, 64, 2, 16),
    "32x32, 16 to 32 channels, batch 16": (16, 32, 16, 32),
}
KERNEL_SIZE = 5


def plain(images, kernel):
    """The convolution of jax."""
    return lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


WAYS = {"jax.lax": plain, "sast_jax": convolution}


def measure(batch_size, size, channels, features, rounds):
    """Returns a row for each way."""
    rng = np.random.default_rng(0)
    images = jax.device_put((rng.random((batch_size, size, size, channels)) < 0.15).astype(np.float32))
    kernel = jax.device_put(rng.normal(size=(KERNEL_SIZE, KERNEL_SIZE, channels, features)).astype(np.float32))
    cotangent = jax.device_put(rng.normal(size=(batch_size, size, size, features)).astype(np.float32))

    def weight_gradient(way, images, kernel, cotangent):
        return jax.vjp(lambda kernel: way(images, kernel), kernel)[1](cotangent)[0]

    functions = {(name, "forward"): functools.partial(jax.jit(way), images, kernel) for name, way in WAYS.items()}
    functions |= {
        (name, "gradient"): functools.partial(jax.jit(functools.partial(weight_gradient, way)), images, kernel, cotangent)
        for name, way in WAYS.items()
    }
    for (_, kind), function in functions.items():
        expected = functions["jax.lax", kind]()
        np.testing.assert_allclose(function(), expected, atol=1e-5 * float(abs(expected).max()))
    seconds = take_turns(functions, rounds)
    return {
        name: {kind: compare(seconds[name, kind], seconds["jax.lax", kind]) for kind in ("forward", "gradient")} for name in WAYS
    }


def markdown(tables, environment):
    """One table for all layers."""
    lines = ["| layer | | forward, ms (quartiles) | ratio | weight gradient, ms (quartiles) | ratio |", "|---" * 6 + "|"]
    for layer, rows in tables.items():
        lines += [f"| {layer} | {name} | {show(row['forward'], 2)} | {show(row['gradient'], 2)} |" for name, row in rows.items()]
    return "\n".join([*lines, "", f"Kernels {KERNEL_SIZE} x {KERNEL_SIZE}, float32. {describe(environment)}"]) + "\n"


def main():
    """Measures, then prints and writes the table."""
    environment = begin(__doc__)
    tables = {title: measure(*layer, environment["rounds"]) for title, layer in LAYERS.items()}
    publish("convolution", {"environment": environment, "layers": tables}, markdown(tables, environment))


if __name__ == "__main__":
    main()
