"""Train and SAST steps on a device per core by the settings of the C library's allocator, all compared in one run.

    python benchmarks/allocator.py

Settings hold for a process, so each has one of its own; all are started first and take turns then, one step that is not timed and
one that is. A row's ratio is the median, over the rounds, of its time over that of the first setting. Writes
`benchmarks/results/allocator.json` and `.md`, and the table into `docs/results/speed.md`.
"""

import os
import subprocess
import sys
import time

import jax
import numpy as np
import optax
from publish import publish
from turns import begin, compare, describe, show

from sast_jax import SpikingConvNet, sam
from sast_jax.allocator import expect_array, keep_freed_memory
from sast_jax.data import BATCH_SPECS, Batch
from sast_jax.devices import WHOLE, make_mesh, place, split_cpu
from sast_jax.training import init_state, make_train_step

WORKLOADS = {
    "conv 8x8x2 - 12 - 32, kernel 3, T 8, batch 32": (SpikingConvNet(10, kernel_size=3), 8, 8, 32),
    "conv 34x34x2 - 8 - 16, T 10, batch 32": (SpikingConvNet(10, features=(8, 16)), 34, 10, 32),
    "conv 34x34x2 - 12 - 32, T 10, batch 32": (SpikingConvNet(10), 34, 10, 32),
    "conv 64x64x2 - 16 - 32, T 25, batch 16": (SpikingConvNet(10, features=(16, 32)), 64, 25, 16),
    "conv 34x34x2 - 12 - 32, T 100, batch 32": (SpikingConvNet(10), 34, 100, 32),
}
SMALL = {"conv 8x8x2 - 2, kernel 3, T 2, batch 4": (SpikingConvNet(10, features=(2,), kernel_size=3), 8, 2, 4)}
KEPT, SHARED, SYSTEM = "freed memory kept", "kept, one arena for all threads", "the system's"
STEPS = {"train": "train step", "sast": "SAST step"}


def make_steps(workload):
    """Returns functions that take a step and wait for it, by kind."""
    network, size, num_time_steps, batch_size = (WORKLOADS | SMALL)[workload]
    rng, mesh = np.random.default_rng(0), make_mesh(batch_size)
    frames = (rng.random((num_time_steps, batch_size, size, size, 2)) < 0.15).astype(np.uint8)
    batch = Batch(frames, rng.integers(0, 10, batch_size).astype(np.int32), np.ones(batch_size, bool))
    batch = place(batch, mesh, BATCH_SPECS)

    def make(kind):
        tx = optax.chain(sam(0.1), optax.adam(1e-3)) if kind == "sast" else optax.adam(1e-3)
        state = place(init_state(network, tx, frames[:, :1], seed=0), mesh, WHOLE)
        train_step = make_train_step(network, tx, "surrogate", mesh=mesh)

        def step():
            nonlocal state
            state, metrics = train_step(state, batch, batch if kind == "sast" else None)
            jax.block_until_ready((state, metrics))

        return step

    return {kind: make(kind) for kind in STEPS}


def work(setting, workload):
    """What a process does: for each line, a kind of step, it answers with the seconds that one took."""
    if setting != SYSTEM:
        keep_freed_memory()
    if setting == SHARED:
        expect_array(2**40)
    split_cpu()
    steps = make_steps(workload)
    for line in sys.stdin:
        step = steps[line.strip()]
        step()  # Other processes had the caches.
        start = time.perf_counter()
        step()
        print(time.perf_counter() - start, flush=True)


def ask(process, kind):
    """Returns the seconds of a step."""
    print(kind, file=process.stdin, flush=True)
    return float(process.stdout.readline())


def measure(workload, rounds, environment):
    """Returns a row per setting, by kind."""
    processes = {
        setting: subprocess.Popen(
            [sys.executable, __file__, setting, workload],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for setting in (KEPT, SHARED, SYSTEM)
    }
    kinds = {}
    for kind in STEPS:
        for process in processes.values():
            ask(process, kind)
        seconds = [{setting: ask(process, kind) for setting, process in processes.items()} for _ in range(rounds)]
        columns = {setting: np.array([each[setting] for each in seconds]) for setting in processes}
        kinds[kind] = {setting: compare(column, columns[KEPT]) for setting, column in columns.items()}
    for process in processes.values():
        process.communicate()
    return kinds


def markdown(tables, environment):
    """One table."""
    header = "".join(f" {title}, ms (quartiles) | ratio |" for title in STEPS.values())
    lines = [f"| | |{header}", "|---|---|" + "---|---|" * len(STEPS)]
    for workload, kinds in tables.items():
        for setting in (KEPT, SHARED, SYSTEM):
            lines.append(f"| {workload} | {setting} | {' | '.join(show(kinds[kind][setting], 1) for kind in STEPS)} |")
    return "\n".join([*lines, "", describe(environment)]) + "\n"


def main():
    """Measures, then prints and writes the table."""
    before = dict(os.environ)  # `begin` also says to XLA how to allocate, and processes would have that from this one.
    args, environment = begin(__doc__)
    tables = {name: measure(name, environment["rounds"], before) for name in (SMALL if args.small else WORKLOADS)}
    publish("allocator", {"environment": environment, "workloads": tables}, markdown(tables, environment), args.output)


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    if len(sys.argv) == 3 and sys.argv[1] in (KEPT, SHARED, SYSTEM):
        work(*sys.argv[1:])
    else:
        main()
