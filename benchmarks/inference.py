"""Time of hard-spike inference and of an evaluation, on a device per core and on one for all, all compared in one run.

    python benchmarks/inference.py

The candidates take turns, so that a busy machine slows all of them alike; a row's ratio is the median, over the rounds, of its
time over that of the first row of its kind. Writes `benchmarks/results/inference.json` and `.md`, and the table into
`docs/results/speed.md`.
"""

import functools
from unittest import mock

import jax
import numpy as np
from publish import publish
from turns import begin, compare, describe, show, take_turns

from sast_jax import SpikingConvNet
from sast_jax.data import BATCH_SPECS, Batch
from sast_jax.devices import WHOLE, make_mesh, place, split_cpu
from sast_jax.evaluation.transfer import make_eval_step

WORKLOADS = {
    "conv 34x34x2 - 12 - 32, T 10, batch 32": (SpikingConvNet(10), 34, 10, 32),
    "conv 34x34x2 - 16 - 32, T 50, batch 16": (SpikingConvNet(10, features=(16, 32)), 34, 50, 16),
    "conv 64x64x2 - 16 - 32, T 25, batch 16": (SpikingConvNet(10, features=(16, 32)), 64, 25, 16),
}
SMALL = {"conv 8x8x2 - 2 - 3, T 2, batch 4": (SpikingConvNet(10, features=(2, 3)), 8, 2, 4)}


def make_candidates(network, size, num_time_steps, batch_size):
    """Returns the functions to be timed, by kind and name; each is compiled."""
    rng, mesh = np.random.default_rng(0), make_mesh(batch_size)
    frames = (rng.random((num_time_steps, batch_size, size, size, 2)) < 0.15).astype(np.uint8)
    batch = Batch(frames, rng.integers(0, 10, batch_size).astype(np.int32), np.ones(batch_size, bool))
    params = network.init(jax.random.key(0), frames[:, :1].astype(np.float32))["params"]

    def infer(devices):
        def logits(params, frames):
            return network.apply({"params": params}, frames, "hard").logits

        operands = place(params, devices, WHOLE), place(frames, devices, BATCH_SPECS.frames)
        return functools.partial(jax.jit(logits).lower(*operands).compile(), *operands)

    def evaluate(devices):
        step = functools.partial(make_eval_step(network, devices), place(params, devices, WHOLE), batch)
        jax.block_until_ready(step())
        return step

    with mock.patch("sast_jax.networks.to_pool", lambda x: x):
        on_own_threads = infer(mesh)
    return {
        "inference": {
            "default, a device per core": infer(mesh),
            "a device per core, on threads of its own": on_own_threads,
            "one device for all cores": infer(None),
        },
        "evaluation in both modes": {"default, a device per core": evaluate(mesh), "one device for all cores": evaluate(None)},
    }


def measure(workload, rounds):
    """Returns a row per candidate, by kind."""
    candidates = make_candidates(*workload)
    functions = {(kind, name): function for kind, group in candidates.items() for name, function in group.items()}
    take_turns(functions, 1)
    seconds = take_turns(functions, rounds)
    return {
        kind: {name: compare(seconds[kind, name], seconds[kind, next(iter(group))]) for name in group}
        for kind, group in candidates.items()
    }


def markdown(tables, environment):
    """One table."""
    lines = ["| | | median, ms (quartiles) | ratio |", "|---|---|---|---|"]
    for workload, kinds in tables.items():
        for kind, rows in kinds.items():
            lines += [f"| {workload}, {kind} | {name} | {show(row, 1)} |" for name, row in rows.items()]
    return "\n".join([*lines, "", describe(environment)]) + "\n"


def main():
    """Measures, then prints and writes the table."""
    split_cpu()
    args, environment = begin(__doc__)
    workloads = SMALL if args.small else WORKLOADS
    tables = {name: measure(workload, environment["rounds"]) for name, workload in workloads.items()}
    publish("inference", {"environment": environment, "workloads": tables}, markdown(tables, environment), args.output)


if __name__ == "__main__":
    main()
