"""All that is timed elsewhere here on a CPU, on whatever accelerator jax finds, in one command of less than eight minutes.

    python benchmarks/gpu.py --output=RESULTS.json

Train, SAST and inference steps of both orders of work, many runs at once, and the time until the first step of a run. Rows are
written as they come, so that a command that is cut off leaves what it has. `--small` tries it out on tiny networks.
"""

import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path

import jax
import many_runs
import numpy as np
from train_step import make_program
from turns import take_turns

from sast_jax import SpikingConvNet, SpikingMLP
from sast_jax.allocator import keep_freed_memory
from sast_jax.config import load_configs
from sast_jax.files import write_json
from sast_jax.training import train_and_evaluate
from sast_jax.training.run import environment

BUDGET_SECONDS = 420
"""After that no further row is begun."""

ORDERS = (("layer_major", 1), ("step_major", 1), ("step_major", None))


def workloads(small):
    """Networks by name, each as a function of its order of work, with time steps and batch size."""
    if small:
        return {"conv, tiny": (lambda **order: SpikingConvNet(10, features=(2,), kernel_size=3, **order), 3, 4)}
    return {
        "conv 34x34x2 - 12 - 32, T 10, batch 32": (lambda **order: SpikingConvNet(10, **order), 10, 32),
        "conv 34x34x2 - 12 - 32, T 10, batch 512": (lambda **order: SpikingConvNet(10, **order), 10, 512),
        "dense 2312 - 512 - 10, T 25, batch 128": (lambda **order: SpikingMLP(10, **order), 25, 128),
        "dense 2312 - 512 - 10, T 25, batch 2048": (lambda **order: SpikingMLP(10, **order), 25, 2048),
    }


def quartiles(seconds):
    """In milliseconds."""
    return [1e3 * float(q) for q in np.quantile(seconds, (0.25, 0.5, 0.75))]


def time_step(network, rho, num_time_steps, batch_size, rounds):
    """Times a train step."""
    program = make_program(network, True, rho, num_time_steps, batch_size)
    (seconds,) = take_turns({"step": program.run}, rounds).values()
    return {"milliseconds": quartiles(seconds), "compile_seconds": program.compile_seconds, "bytes": program.num_bytes}


def time_inference(network, num_time_steps, batch_size, rounds):
    """Times hard-spike inference."""
    frames = (np.random.default_rng(0).random((num_time_steps, batch_size, 34, 34, 2)) < 0.15).astype(np.float32)
    params = jax.jit(network.init)(jax.random.key(0), frames[:, :1])["params"]
    apply = jax.jit(lambda params, frames: network.apply({"params": params}, frames, "hard").logits)
    frames = jax.device_put(frames)
    (seconds,) = take_turns({"inference": lambda: apply(params, frames)}, rounds + 1).values()
    return {"milliseconds": quartiles(seconds[1:]), "compile_seconds": seconds[0]}


def rows(small, rounds):
    """Yields names of rows, and the functions that measure them; what matters most comes first."""
    for workload, (make, num_time_steps, batch_size) in workloads(small).items():
        for order, unroll in ORDERS:
            network = make(order=order, unroll=unroll)
            name = f"{workload}, {order}, {'unrolled' if unroll is None else 'loop'}"
            for kind, rho in (("train", 0.0), ("SAST", 0.3)):
                yield f"{name}: {kind}", lambda n=network, r=rho, t=num_time_steps, b=batch_size: time_step(n, r, t, b, rounds)
            yield f"{name}: inference", lambda n=network, t=num_time_steps, b=batch_size: time_inference(n, t, b, rounds)
    numbers = (1, 2) if small else (1, 4, 16)
    tiny = ("network.features=2", "batch_size=4", "dataset.num_time_steps=3") if small else ()
    for workload, overrides in many_runs.WORKLOADS.items():
        yield f"many runs, {workload}", lambda o=overrides: many_runs.measure((*o, *tiny), numbers, rounds)


def first_step(small):
    """Trains a run for an epoch and returns what it reports of its start."""
    overrides = ["num_epochs=1", *(("network.features=2", "dataset.num_time_steps=3") if small else ())]
    with tempfile.TemporaryDirectory() as folder:
        results = train_and_evaluate(load_configs("configs/digits.py:sast", overrides)[""], Path(folder) / "run")
    return {key: results[key] for key in ("first_step_seconds", "wall_time_seconds", "num_devices")}


def main():
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    start = time.monotonic()
    keep_freed_memory()
    results = {"environment": environment(), "num_devices": len(jax.devices()), "rows": {}}
    own = [("first step of a run", lambda: first_step(args.small))]
    for name, measure in itertools.chain(own, rows(args.small, args.rounds)):
        try:
            results["rows"][name] = measure() if time.monotonic() - start < BUDGET_SECONDS else "left out: no time"
        except (MemoryError, RuntimeError) as error:  # Too large for this device, or not to be compiled for it: the next one may.
            results["rows"][name] = f"failed: {error}"[:300]
        results["seconds"] = time.monotonic() - start
        print(name, json.dumps(results["rows"][name]), flush=True)
        write_json(args.output, results)


if __name__ == "__main__":
    main()
