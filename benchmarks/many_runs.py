"""Time of a train step of many runs trained as one program, against as many steps of a single run.

    python benchmarks/many_runs.py

Devices are those that the command takes, the cores of a CPU among them: runs that are trained together share them run by run, a
single one of a convolutional network by its samples.

The programs take turns, so that a busy machine slows all of them alike; a ratio is the median, over the rounds, of a program's
time per run over that of the single run. Writes `benchmarks/results/many_runs.json` and `.md`, and the table into
`docs/results/speed.md`.
"""

import os

import jax
import numpy as np
from publish import Parser, processor, publish
from train_step import Program, compile_all
from turns import take_turns

from sast_jax.allocator import keep_freed_memory
from sast_jax.config import load_configs
from sast_jax.data import BATCH_SPECS, Batch, sensor_size
from sast_jax.devices import WHOLE, make_mesh, memory_bytes, place, split_cpu
from sast_jax.training.build import build_train_step, make_network, make_optimizer
from sast_jax.training.run import environment
from sast_jax.training.state import make_init
from sast_jax.training.together import MEMORY_SHARE, build_train_step_together, spread_runs, stack

WORKLOADS = {
    "conv 34x34x2 - 8 - 16, kernel 3, T 10, batch 32": (),
    "conv 34x34x2 - 12 - 32, kernel 5, T 10, batch 32": ("network.features=12,32", "network.kernel_size=5"),
    "dense 2312 - 64 - 10, T 10, batch 32": ("network.kind=mlp", "network.features=64"),
    "dense 2312 - 512 - 10, T 10, batch 32": ("network.kind=mlp", "network.features=512"),
}
SMALL = ("network.features=2", "batch_size=4", "dataset.num_time_steps=3")
NUM_STEPS = 1000


def draw(config, number, seed):
    """Returns random frames and labels for the batches of some runs."""
    rng = np.random.default_rng(seed)
    size = number * config.batch_size
    frames = rng.random((config.dataset.num_time_steps, size, *sensor_size(config.dataset.name), 2)) < 0.15
    return Batch(frames.astype(np.uint8), rng.integers(0, 10, size).astype(np.int32), np.ones(size, bool))


def make_program(overrides, number):
    """Returns the compiled train step of some runs of SAST with different seeds and radii."""
    radii = np.geomspace(0.05, 0.4, number)
    configs = [
        load_configs("configs/digits.py:sast", [*overrides, f"seed={seed}", f"sam.rho={rho}"])[""]
        for seed, rho in enumerate(radii)
    ]
    config, network = configs[0], make_network(configs[0], 10)
    batches = draw(config, number, 0), draw(config, number, 1)
    init = make_init(network, make_optimizer(config, NUM_STEPS), batches[0].frames[:, :1])
    states = [init(jax.random.key(each.seed), None) for each in configs]
    if number > 1:
        mesh = make_mesh(number)
        state, step = spread_runs(stack(states), mesh), build_train_step_together(configs, network, NUM_STEPS, mesh)
        step = jax.jit(step, donate_argnums=0)
    else:
        mesh = make_mesh(config.batch_size) if config.network.kind == "conv" else None
        state, step = place(states[0], mesh, WHOLE), build_train_step(config, network, NUM_STEPS, mesh)
    return Program(step, state, [place(batch, mesh, BATCH_SPECS) for batch in batches])


def total_memory():
    """Bytes of all devices; the cores of a CPU share one memory."""
    return (memory_bytes() or 0) * (1 if jax.default_backend() == "cpu" else len(jax.devices()))


def measure(overrides, numbers, rounds):
    """Returns a row per number of runs; the first one is what the others are compared with."""
    programs = compile_all({number: make_program(overrides, number) for number in numbers})
    seconds = take_turns({number: program.run for number, program in programs.items()}, rounds)
    seconds = {number: values / number for number, values in seconds.items()}
    single = seconds[numbers[0]]
    return [
        {
            "runs": number,
            "milliseconds_per_run": 1e3 * float(np.median(seconds[number])),
            "ratio": float(np.median(seconds[number] / single)),
            "compile_seconds": program.compile_seconds,
            "bytes": program.num_bytes,
            "fitting": int(MEMORY_SHARE * total_memory() / (program.num_bytes / number)),
        }
        for number, program in programs.items()
    ]


def markdown(tables, settings):
    """One table for all workloads."""
    lines = ["| network | runs | time per run | memory, MiB |", "|---|---|---|---|"]
    for workload, rows in tables.items():
        for row in rows:
            lines.append(f"| {workload} | {row['runs']} | {row['ratio']:.2f}x | {row['bytes'] / 2**20:.0f} |")
    fitting = ", ".join(str(rows[-1]["fitting"]) for rows in tables.values())
    lines.append(
        f"\nSAST with an independent batch; median over {settings['rounds']} rounds of the time over that of a single run in the "
        f"same round. {settings['environment']['num_cores']} {settings['processor']} cores, "
        f"load {settings['load']:.1f} at the start. By the compiler's own account {fitting} runs would fit in "
        f"{MEMORY_SHARE:.0%} of the memory."
    )
    return "\n".join(lines) + "\n"


def main():
    """Measures, then prints and writes the table."""
    parser = Parser(__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--runs", default="1,2,4,8", help="numbers of runs; the first one is the reference")
    args = parser.parse_args()
    keep_freed_memory()
    split_cpu()
    numbers = [1, 2] if args.small else [int(number) for number in args.runs.split(",")]
    rounds, small = (2, SMALL) if args.small else (args.rounds, ())
    settings = {"rounds": rounds, "load": os.getloadavg()[0], "processor": processor(), "environment": environment()}
    tables = {}
    for name, overrides in WORKLOADS.items():
        tables[name] = measure((*overrides, *small), numbers, rounds)
        print(name, tables[name], flush=True)
    publish("many_runs", {**settings, "workloads": tables}, markdown(tables, settings), args.output)


if __name__ == "__main__":
    main()
