"""Time of one convolution and of its gradients on one core, as jax, sast_jax and PyTorch have them.

    python benchmarks/convolution.py

All take turns on a single core, as each device of a split CPU has one. A ratio is the median, over the rounds, of a time over
that of `jax.lax.conv_general_dilated`, or of the gradient that jax derives from it, in the same round. Results are compared
first. PyTorch has a row where it is installed. Writes `benchmarks/results/convolution.json` and `.md`, and the table into
`docs/results/speed.md`.
"""

import functools
import importlib.util
import os

import jax
import numpy as np
from jax import lax
from publish import publish
from turns import begin, compare, describe, show, take_turns

from sast_jax.convolution import convolution

LAYERS = {
    "34x34, 2 to 8 channels, batch 16": (16, 34, 2, 8),
    "34x34, 2 to 16 channels, batch 16": (16, 34, 2, 16),
    "17x17, 16 to 32 channels, batch 16": (16, 17, 16, 32),
    "64x64, 2 to 16 channels, batch 8": (8, 64, 2, 16),
    "32x32, 16 to 32 channels, batch 8": (8, 32, 16, 32),
}
SMALL = {"6x6, 2 to 3 channels, batch 2": (2, 6, 2, 3), "6x6, 12 to 4 channels, batch 2": (2, 6, 12, 4)}
KERNEL_SIZE = 5
KINDS = ("forward", "weight gradient", "image gradient")


def plain(images, kernel):
    """The convolution of jax."""
    return lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def jax_functions(way, images, kernel, cotangent):
    """Each kind of work as a function without arguments."""

    def weight_gradient(images, kernel, cotangent):
        return jax.vjp(lambda kernel: way(images, kernel), kernel)[1](cotangent)[0]

    def image_gradient(images, kernel, cotangent):
        return jax.vjp(lambda images: way(images, kernel), images)[1](cotangent)[0]

    functions = (lambda images, kernel, cotangent: way(images, kernel)), weight_gradient, image_gradient
    return [functools.partial(jax.jit(function), images, kernel, cotangent) for function in functions]


def torch_functions(images, kernel, cotangent):
    """The same in PyTorch, channels last, on one thread; results come in jax's layouts as views."""
    import torch

    torch.set_num_threads(1)
    images, cotangent = (
        torch.tensor(np.asarray(each)).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
        for each in (images, cotangent)
    )
    kernel = torch.tensor(np.asarray(kernel)).permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last)
    padding = KERNEL_SIZE // 2

    def gradient(index):
        mask = [number == index for number in range(3)]
        backward = torch.ops.aten.convolution_backward
        return backward(cotangent, images, kernel, None, [1, 1], [padding] * 2, [1, 1], False, [0, 0], 1, mask)[index]

    return [
        lambda: torch.nn.functional.conv2d(images, kernel, padding=padding).permute(0, 2, 3, 1),
        lambda: gradient(1).permute(2, 3, 1, 0),
        lambda: gradient(0).permute(0, 2, 3, 1),
    ]


def measure(batch_size, size, channels, features, rounds):
    """Returns a row for each way."""
    rng = np.random.default_rng(0)
    images = jax.device_put((rng.random((batch_size, size, size, channels)) < 0.15).astype(np.float32))
    kernel = jax.device_put(rng.normal(size=(KERNEL_SIZE, KERNEL_SIZE, channels, features)).astype(np.float32))
    cotangent = jax.device_put(rng.normal(size=(batch_size, size, size, features)).astype(np.float32))

    ways = {
        name: jax_functions(way, images, kernel, cotangent) for name, way in {"jax.lax": plain, "sast_jax": convolution}.items()
    }
    if importlib.util.find_spec("torch"):
        ways["PyTorch"] = torch_functions(images, kernel, cotangent)
    functions = {(name, kind): function for name, way in ways.items() for kind, function in zip(KINDS, way, strict=True)}
    for (_, kind), function in functions.items():
        expected = np.asarray(functions["jax.lax", kind]())
        np.testing.assert_allclose(np.asarray(function()), expected, atol=1e-5 * abs(expected).max())
    seconds = take_turns(functions, rounds)
    return {name: {kind: compare(seconds[name, kind], seconds["jax.lax", kind]) for kind in KINDS} for name in ways}


def markdown(tables, environment):
    """One table for all layers."""
    head = "".join(f" {kind}, ms (quartiles) | ratio |" for kind in KINDS)
    lines = [f"| layer | |{head}", "|---" * (2 + 2 * len(KINDS)) + "|"]
    for layer, rows in tables.items():
        lines += [
            f"| {layer} | {name} | " + " | ".join(show(row[kind], 2) for kind in KINDS) + " |" for name, row in rows.items()
        ]
    return "\n".join([*lines, "", f"Kernels {KERNEL_SIZE} x {KERNEL_SIZE}, float32. {describe(environment)}"]) + "\n"


def main():
    """Measures, then prints and writes the table."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])  # Before jax makes its threads.
    args, environment = begin(__doc__)
    layers = SMALL if args.small else LAYERS
    tables = {title: measure(*layer, environment["rounds"]) for title, layer in layers.items()}
    publish("convolution", {"environment": environment, "layers": tables}, markdown(tables, environment), args.output)


if __name__ == "__main__":
    main()
