"""Time of a train step by order of work and by gradient, all compared in one run.

    python benchmarks/train_step.py

The candidates take turns, so that a busy machine slows all of them alike; a row's ratio is the median, over the rounds, of
its time over that of the default. Writes `benchmarks/results/train_step.json` and `.md`, and the table into `docs/results.md`.
"""

import argparse
import contextlib
import itertools
import os
import time
from unittest import mock

import jax
import numpy as np
import optax
from jax import lax
from publish import publish

from sast_jax import SpikingConvNet, SpikingMLP, sam
from sast_jax.allocator import keep_freed_memory
from sast_jax.data import Batch
from sast_jax.training import init_state, make_train_step


def plain_convolution(images, kernel):
    """The convolution of `sast_jax.networks` with the gradient that jax derives."""
    return lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


CONV = {
    "step-major, rolled loop, canonical gradient": (SpikingConvNet(10, order="step_major", unroll=1), True, 0.0),
    "step-major, unrolled by 3, canonical gradient": (SpikingConvNet(10, order="step_major", unroll=3), True, 0.0),
    "step-major, unrolled, canonical gradient": (SpikingConvNet(10, order="step_major", unroll=None), True, 0.0),
    "step-major, unrolled, derived gradient": (SpikingConvNet(10, order="step_major", unroll=None), False, 0.0),
    "step-major, rolled loop, derived gradient": (SpikingConvNet(10, order="step_major", unroll=1), False, 0.0),
    "layer-major": (SpikingConvNet(10, order="layer_major"), True, 0.0),
    "default, SAM with an independent batch": (SpikingConvNet(10), True, 0.3),
}
DENSE = {
    "layer-major": (SpikingMLP(10), True, 0.0),
    "layer-major, unrolled": (SpikingMLP(10, unroll=None), True, 0.0),
    "step-major, rolled loop": (SpikingMLP(10, order="step_major"), True, 0.0),
    "step-major, unrolled": (SpikingMLP(10, order="step_major", unroll=None), True, 0.0),
    "default, SAM with an independent batch": (SpikingMLP(10), True, 0.3),
}
WORKLOADS = {
    "conv 34x34x2 - 12 - 32, T 10, batch 32": (CONV, 10, 32),
    "dense 2312 - 512 - 10, T 25, batch 128": (DENSE, 25, 128),
}


class Program:
    """A compiled train step with the state and the batches it runs on."""

    def __init__(self, step, state, batches):
        """Compiles the step, and notes how long that takes and how many bytes it needs."""
        start = time.perf_counter()
        self._step = step.lower(state, *batches).compile()
        self.compile_seconds = time.perf_counter() - start
        memory = self._step.memory_analysis()
        self.num_bytes = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        self._state, self._batches = state, jax.device_put(batches)
        self.run()

    def run(self):
        """Takes one step and returns its seconds."""
        start = time.perf_counter()
        self._state, _ = self._step(self._state, *self._batches)
        jax.block_until_ready(self._state)
        return time.perf_counter() - start


def make_program(network, canonical, rho, num_time_steps, batch_size):
    """Returns the program of a candidate."""
    rng = np.random.default_rng(0)
    shape = (num_time_steps, batch_size, 34, 34, 2)

    def draw():
        labels = rng.integers(0, 10, batch_size).astype(np.int32)
        return Batch((rng.random(shape) < 0.15).astype(np.uint8), labels, np.ones(batch_size, bool))

    batches = (draw(), draw()) if rho else (draw(),)
    tx = optax.chain(sam(rho), optax.adam(1e-3)) if rho else optax.adam(1e-3)
    convolution = mock.patch("sast_jax.networks.convolution", plain_convolution)
    with contextlib.nullcontext() if canonical else convolution:
        state = init_state(network, tx, np.zeros(shape)[:, :1], seed=0)
        return Program(make_train_step(network, tx, "surrogate"), state, batches)


def measure(candidates, num_time_steps, batch_size, rounds):
    """Returns a row per candidate; the first one is what the others are compared with."""
    compiled = {name: make_program(*candidate, num_time_steps, batch_size) for name, candidate in candidates.items()}
    seconds = {name: [] for name in compiled}
    for _, (name, candidate) in itertools.product(range(rounds), compiled.items()):
        seconds[name].append(candidate.run())
    reference = np.array(next(iter(seconds.values())))
    return {
        name: {
            "milliseconds": [round(1e3 * float(q), 2) for q in np.quantile(values, (0.25, 0.5, 0.75))],
            "ratio": round(float(np.median(np.array(values) / reference)), 3),
            "compile_seconds": round(compiled[name].compile_seconds, 2),
        }
        for name, values in seconds.items()
    }


def markdown(tables, environment):
    """One table per workload."""
    lines = []
    for workload, rows in tables.items():
        lines += [f"| {workload} | median, ms (quartiles) | ratio | compile, s |", "|---|---|---|---|"]
        for name, row in rows.items():
            low, median, high = row["milliseconds"]
            lines.append(
                f"| {name} | {median:.1f} ({low:.1f} - {high:.1f}) | {row['ratio']:.2f} | {row['compile_seconds']:.1f} |"
            )
        lines.append("")
    lines.append(
        "jax {jax} on {cores} {device} cores, {rounds} rounds, load {load_average:.1f} at the start.".format(**environment)
    )
    return "\n".join(lines) + "\n"


def main():
    """Measures, then prints and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    keep_freed_memory()
    environment = {
        "device": jax.devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "jax": jax.__version__,
        "rounds": rounds,
    }
    tables = {workload: measure(*arguments, rounds) for workload, arguments in WORKLOADS.items()}
    publish("train_step", {"environment": environment, "workloads": tables}, markdown(tables, environment))


if __name__ == "__main__":
    main()
