"""What is timed elsewhere here on a CPU, on a GPU, in one command.

    python benchmarks/gpu.py

Train steps and inference by order of work, time loop and precision, many runs at once, and the time until the first step of a
run. The programs of a network are compiled side by side and then take turns of some steps each, which are waited for together, as
in training. After each network it writes `benchmarks/results/gpu.json` and `.md`. What the memory is too small for, or the time,
is listed as missing. `--small` tries it out on tiny networks.
"""

import contextlib
import functools
import tempfile
import time
from pathlib import Path
from unittest import mock

import jax
import many_runs
import numpy as np
from publish import Parser, publish
from train_step import Program, compile_all, make_program
from turns import compare, show, take_turns

from sast_jax import SpikingConvNet, SpikingMLP, convolution
from sast_jax.config import load_configs
from sast_jax.training import train_and_evaluate
from sast_jax.training.run import environment

ROUNDS, STEPS = 9, 10
"""Turns, and steps in each."""

LIMIT = 400
"""Seconds after which no other network is begun, so that all take less than 8 minutes if the last one takes less than 80 s."""

WAYS = {
    "kernels": {"time_loop": "pallas"},
    "scan, unrolled": {"time_loop": "scan", "order": "layer_major", "unroll": None},
    "scan, loop, step-major": {"time_loop": "scan", "order": "step_major", "unroll": 1},
    "kernels, bfloat16": {"time_loop": "pallas", "precision": "bfloat16"},
}
DEFAULT, *_, ON_CPU = [way for way, choice in WAYS.items() if "precision" not in choice]
"""What the others are compared with, and what convolutional networks take on a CPU."""

PAIRS = f"{DEFAULT}, pixels in pairs, derived gradient"
WORKLOADS = {
    "conv 34x34x2 - 16 - 32, T 10, batch 32": (SpikingConvNet, (16, 32), 10, 32),
    "conv 34x34x2 - 16 - 32, T 10, batch 512": (SpikingConvNet, (16, 32), 10, 512),
    "dense 2312 - 512 - 10, T 25, batch 128": (SpikingMLP, (512,), 25, 128),
    "dense 2312 - 512 - 10, T 25, batch 2048": (SpikingMLP, (512,), 25, 2048),
}
SMALL = {"conv, tiny": (SpikingConvNet, (2,), 3, 4), "dense, tiny": (SpikingMLP, (8,), 3, 4)}


class Inference(Program):
    """Hard-spike inference."""

    def __init__(self, network, num_time_steps, batch_size):
        """Traces it."""
        frames = (np.random.default_rng(0).random((num_time_steps, batch_size, 34, 34, 2)) < 0.15).astype(np.uint8)
        params = jax.jit(network.init)(jax.random.key(0), frames[:, :1])["params"]
        apply = jax.jit(lambda params, frames: network.apply({"params": params}, frames, "hard").logits)
        super().__init__(apply, params, (frames,))

    def run(self):
        """Takes one step."""
        return self._step(self._state, *self._batches)


def make_programs(network, features, *sizes):
    """Returns the traced programs of a workload by kind of step and way; not all, as they take seconds each to compile."""
    programs = {}
    for way, choice in WAYS.items():
        net = network(10, features=features, **choice)
        programs["train step", way] = make_program(net, True, 0.0, *sizes, mode="straight_through")
        if way in (DEFAULT, ON_CPU):
            programs["SAST step", way] = make_program(net, True, 0.3, *sizes)
        if "precision" not in choice:
            programs["inference", way] = Inference(net, *sizes)
    if network is SpikingConvNet:
        with mock.patch("sast_jax.convolution.convolution", convolve_in_pairs):
            net = network(10, features=features, **WAYS[DEFAULT])
            programs["train step", PAIRS] = make_program(net, True, 0.0, *sizes, mode="straight_through")
            programs["inference", PAIRS] = Inference(net, *sizes)
    return programs


def convolve_in_pairs(images, kernel):
    """What is done on a CPU."""
    few = kernel.shape[2] <= convolution.MAX_CHANNELS
    return convolution._convolve_few(images, kernel) if few else convolution._convolve(images, kernel, "SAME")


def measure(*workload, rounds=ROUNDS):
    """Returns a row per kind of step and way."""
    programs = compile_all(make_programs(*workload))

    def steps(program):
        for _ in range(STEPS):
            result = program.run()
        return result

    seconds = take_turns({key: functools.partial(steps, program) for key, program in programs.items()}, rounds)
    return {
        f"{kind} | {way}": compare(values / STEPS, seconds[kind, DEFAULT] / STEPS)
        | {"compile_seconds": programs[kind, way].compile_seconds, "bytes": programs[kind, way].num_bytes}
        for (kind, way), values in seconds.items()
    }


def first_step(fields):
    """Trains a run for an epoch and returns what it reports of its start."""
    with tempfile.TemporaryDirectory() as folder:
        results = train_and_evaluate(load_configs("configs/digits.py:sast", ["num_epochs=1", *fields])[""], Path(folder) / "run")
    return {key: results[key] for key in ("first_step_seconds", "wall_time_seconds", "num_devices")}


def markdown(results):
    """One table for the programs, one for many runs."""
    lines = ["| network | step | way | median, ms (quartiles) | ratio | memory, MB |", "|---|---|---|---|---|---|"]
    for workload, rows in results["workloads"].items():
        for name, row in rows.items():
            lines.append(f"| {workload} | {name} | {show(row, 3)} | {row['bytes'] / 1e6:.0f} |")
    lines += [
        "",
        "| SAST, runs at once | runs | time per run and step, ms | ratio | memory, MB | would fit |",
        "|---|---|---|---|---|---|",
    ]
    for workload, rows in results["many_runs"].items():
        for row in rows:
            cells = f"{row['milliseconds_per_run']:.3f} | {row['ratio']:.3f} | {row['bytes'] / 1e6:.0f} | {row['fitting']}"
            lines.append(f"| {workload} | {row['runs']} | {cells} |")
    environment, first = results["environment"], results["first_step"]["first_step_seconds"]
    lines.append(
        f"\nOne {environment['device']}, jax {environment['jax']}, float32 with products in TF32 but where it says bfloat16, "
        f"{ROUNDS} rounds of {STEPS} steps (many runs: of one). Train steps are straight-through, SAST steps smooth. Memory: "
        "arguments and temporary arrays by the compiler's account. "
        f"`configs/digits.py:sast` took {first:.1f} s until its first step was taken."
    )
    lines += [f"\nMissing: {workload}: {reason}." for workload, reason in results["missing"].items()]
    return "\n".join(lines) + "\n"


def main():
    """Measures, then prints and writes the tables."""
    args = Parser(__doc__).parse_args()
    start = time.monotonic()
    tiny, rounds = (many_runs.SMALL, 1) if args.small else ((), ROUNDS)
    results = {"environment": environment(), "first_step": first_step(tiny), "workloads": {}, "many_runs": {}, "missing": {}}

    def take(table, workload, function, *arguments):
        if time.monotonic() - start > LIMIT:
            results["missing"][workload] = "no time left"
        else:
            try:
                results[table][workload] = function(*arguments)
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                results["missing"][workload] = str(error).partition("\n")[0]
        results["seconds"] = time.monotonic() - start
        # A GPU may be gone before all is measured.
        publish("gpu", results, markdown(results), args.output)

    for workload, sizes in (SMALL if args.small else WORKLOADS).items():
        take("workloads", workload, functools.partial(measure, rounds=rounds), *sizes)
    numbers = (1, 2) if args.small else (1, 8, 64)
    for workload, overrides in list(many_runs.WORKLOADS.items())[::2]:
        take("many_runs", workload, many_runs.measure, (*overrides, *tiny), numbers, rounds)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
