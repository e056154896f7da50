"""Time of a train step by order of work and by gradient, all compared in one run.

    python benchmarks/train_step.py

The candidates take turns, so that a busy machine slows all of them alike; a row's ratio is the median, over the rounds, of
its time over that of the default. Each core of a CPU is a device for the convolutional network, one device has all for the
dense one, as in training by the command, but where a row says otherwise.
Writes `benchmarks/results/train_step.json` and `.md`, and the table into `docs/results/speed.md`.
"""

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import jax
import numpy as np
import optax
from jax import lax
from publish import publish
from turns import begin, compare, describe, show, take_turns

from sast_jax import SpikingConvNet, SpikingMLP, sam
from sast_jax.data import BATCH_SPECS, Batch
from sast_jax.devices import WHOLE, make_mesh, place, split_cpu
from sast_jax.training import init_state, make_train_step


def plain_convolution(images, kernel):
    """The same convolution with the gradient that jax derives."""
    return lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


CONV = {
    "step-major, rolled loop, canonical gradient": (SpikingConvNet(10, order="step_major", unroll=1), True, 0.0),
    "step-major, unrolled by 3, canonical gradient": (SpikingConvNet(10, order="step_major", unroll=3), True, 0.0),
    "step-major, unrolled, canonical gradient": (SpikingConvNet(10, order="step_major", unroll=None), True, 0.0),
    "step-major, unrolled, derived gradient": (SpikingConvNet(10, order="step_major", unroll=None), False, 0.0),
    "step-major, rolled loop, derived gradient": (SpikingConvNet(10, order="step_major", unroll=1), False, 0.0),
    "layer-major": (SpikingConvNet(10, order="layer_major", unroll=1), True, 0.0),
    "default, SAM with an independent batch": (SpikingConvNet(10), True, 0.3),
}
DENSE = {
    "layer-major": (SpikingMLP(10, order="layer_major", unroll=1), True, 0.0),
    "layer-major, unrolled": (SpikingMLP(10, order="layer_major", unroll=None), True, 0.0),
    "step-major, rolled loop": (SpikingMLP(10, order="step_major", unroll=1), True, 0.0),
    "step-major, unrolled": (SpikingMLP(10, order="step_major", unroll=None), True, 0.0),
    "default, SAM with an independent batch": (SpikingMLP(10), True, 0.3),
}
WORKLOADS = {
    "conv 34x34x2 - 12 - 32, T 10, batch 32": (CONV, True, 10, 32),
    "dense 2312 - 512 - 10, T 25, batch 128": (DENSE, False, 25, 128),
}
SMALL = {
    "conv 34x34x2 - 2, T 3, batch 4": (
        {name: (network.clone(features=(2,)), *rest) for name, (network, *rest) in CONV.items()}, True, 3, 4
    ),
    "dense 2312 - 8 - 10, T 3, batch 4": (
        {name: (network.clone(features=(8,)), *rest) for name, (network, *rest) in DENSE.items()}, False, 3, 4
    ),
}  # fmt: skip


class Program:
    """A train step with the state and the batches it runs on, to be compiled before it runs."""

    def __init__(self, step, state, batches):
        """Traces the step."""
        self._lowered = step.lower(state, *batches)
        self._state, self._batches = state, jax.device_put(batches)

    def compile(self):
        """Compiles the step and takes one, and notes how long it takes to compile and how many bytes it needs."""
        start = time.perf_counter()
        self._step = self._lowered.compile()
        self.compile_seconds = time.perf_counter() - start
        memory = self._step.memory_analysis()  # Of each of the devices.
        num_devices = len(jax.tree.leaves(self._state)[0].sharding.device_set)
        self.num_bytes = num_devices * (memory.argument_size_in_bytes + memory.temp_size_in_bytes)
        jax.block_until_ready(self.run())  # Cores as devices have one program under way at a time.
        return self

    def run(self):
        """Takes one step."""
        self._state, _ = self._step(self._state, *self._batches)
        return self._state


def compile_all(programs):
    """Compiles programs, side by side where the cores have nothing else to do, and returns them."""
    with ThreadPoolExecutor(1 if jax.default_backend() == "cpu" else None) as pool:
        return dict(zip(programs, pool.map(Program.compile, programs.values()), strict=True))


def make_program(network, canonical, rho, num_time_steps, batch_size, is_split=False, mode="surrogate"):
    """Returns the program of a candidate."""
    mesh = make_mesh(batch_size) if is_split else None
    rng = np.random.default_rng(0)
    shape = (num_time_steps, batch_size, 34, 34, 2)

    def draw():
        labels = rng.integers(0, 10, batch_size).astype(np.int32)
        return Batch((rng.random(shape) < 0.15).astype(np.uint8), labels, np.ones(batch_size, bool))

    batches = (draw(), draw()) if rho else (draw(),)
    tx = optax.chain(sam(rho), optax.adam(1e-3)) if rho else optax.adam(1e-3)
    convolution = mock.patch("sast_jax.convolution.convolution", plain_convolution)
    with contextlib.nullcontext() if canonical else convolution:
        state = place(init_state(network, tx, np.zeros(shape)[:, :1], seed=0), mesh, WHOLE)
        step = make_train_step(network, tx, mode, mesh=mesh)
        return Program(step, state, [place(batch, mesh, BATCH_SPECS) for batch in batches])


def measure(candidates, is_split, num_time_steps, batch_size, rounds):
    """Returns a row per candidate; the first one is what the others are compared with."""
    other = "default, one device for all cores" if is_split else "default, a device per core"
    sizes = num_time_steps, batch_size
    programs = {name: make_program(*each, *sizes, is_split) for name, each in candidates.items()}
    programs[other] = make_program(*next(iter(candidates.values())), *sizes, not is_split)
    compiled = compile_all(programs)
    seconds = take_turns({name: candidate.run for name, candidate in compiled.items()}, rounds)
    reference = next(iter(seconds.values()))
    return {
        name: compare(values, reference) | {"compile_seconds": round(compiled[name].compile_seconds, 2)}
        for name, values in seconds.items()
    }


def markdown(tables, environment):
    """One table per workload."""
    lines = []
    for workload, rows in tables.items():
        lines += [f"| {workload} | median, ms (quartiles) | ratio | compile, s |", "|---|---|---|---|"]
        lines += [f"| {name} | {show(row, 1)} | {row['compile_seconds']:.1f} |" for name, row in rows.items()]
        lines.append("")
    lines.append(describe(environment))
    return "\n".join(lines) + "\n"


def main():
    """Measures, then prints and writes the tables."""
    split_cpu()
    args, environment = begin(__doc__)
    workloads = SMALL if args.small else WORKLOADS
    tables = {workload: measure(*arguments, environment["rounds"]) for workload, arguments in workloads.items()}
    publish("train_step", {"environment": environment, "workloads": tables}, markdown(tables, environment), args.output)


if __name__ == "__main__":
    main()
