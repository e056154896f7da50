"""Memory of a train step against the length of the recordings, with and without `network.time_chunk`.

    python benchmarks/memory_over_time.py

Each length has a process of its own, which compiles the step and takes it once. Two measures: what the compiled step asks for
beside its arguments, and the peak of the process. The chunk is the square root of the number of steps. Writes
`benchmarks/results/memory_over_time.json`, `.md` and `.png`, and the table into `docs/results/speed.md`.
"""

import argparse
import json
import math
import subprocess
import sys

import jax
import numpy as np
import optax
from publish import Parser, publish

from sast_jax import SpikingConvNet, sam
from sast_jax.data import Batch
from sast_jax.training import init_state, make_train_step

LENGTHS, BATCH_SIZE = (10, 25, 50, 100, 200, 500), 8


def child(num_time_steps, time_chunk):
    """Takes a SAST step and prints what it needs, in bytes."""
    network, tx = SpikingConvNet(10, time_chunk=time_chunk), optax.chain(sam(0.1), optax.adam(1e-3))
    rng = np.random.default_rng(0)
    frames = (rng.random((num_time_steps, BATCH_SIZE, 34, 34, 2), np.float32) < 0.15).astype(np.uint8)
    batch = Batch(frames, np.zeros(BATCH_SIZE, np.int32), np.ones(BATCH_SIZE, bool))
    state = init_state(network, tx, frames[:, :1], seed=0)
    step = make_train_step(network, tx, "surrogate").lower(state, batch, batch).compile()
    jax.block_until_ready(step(state, batch, batch))
    with open("/proc/self/status") as file:
        peak = next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    print(json.dumps({"temporary_bytes": step.memory_analysis().temp_size_in_bytes, "peak_bytes": peak}))


def plot(rows, path):
    """Memory against length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5.6, 3.8), layout="constrained")
    for chunked, color, label in ((False, "#8d99ae", "all kept"), (True, "#d1495b", "in chunks of √T steps")):
        own = [row for row in rows if bool(row["time_chunk"]) == chunked]
        for key, style, what in (("peak_bytes", "o-", "process, peak"), ("temporary_bytes", "o:", "step, temporary")):
            lengths, values = zip(*((row["num_time_steps"], row[key] / 1e6) for row in own), strict=True)
            axes.plot(lengths, values, style, color=color, label=f"{label}: {what}")
    axes.set(xlabel="time steps T", ylabel="memory, MB", xscale="log", yscale="log")
    axes.set_xticks(lengths, lengths)
    axes.minorticks_off()
    axes.grid(color="#e9ecef")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=160)


def main():
    """Measures, then prints and writes the table and the figure."""
    parser = Parser(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(**args.child)
        return
    rows = []
    for num_time_steps in (4, 9) if args.small else args.lengths:
        for time_chunk in (0, math.isqrt(num_time_steps)):
            settings = {"num_time_steps": num_time_steps, "time_chunk": time_chunk}
            command = [sys.executable, __file__, "--child", json.dumps(settings)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rows.append(settings | json.loads(done.stdout))
            print(rows[-1], flush=True)
    lines = ["| time steps T | chunk | step, temporary, MB: all kept | in chunks | process, peak, MB: all kept | in chunks |"]
    lines += ["|---" * 6 + "|"]
    for kept, chunked in zip(rows[::2], rows[1::2], strict=True):
        numbers = [row[key] / 1e6 for key in ("temporary_bytes", "peak_bytes") for row in (kept, chunked)]
        cells = " | ".join(f"{number:,.0f}" for number in numbers)
        lines.append(f"| {kept['num_time_steps']} | {chunked['time_chunk']} | {cells} |")
    device = jax.devices()[0].device_kind
    text = (
        f"A SAST step of the network conv 34x34x2 - 12 - 32 with both batches of {BATCH_SIZE} recordings, float32, "
        f"jax {jax.__version__} on {device}. Temporary: what the compiled step asks for beside weights and frames. The process "
        "includes Python, jax, compilation and frames."
    )
    results = {"jax": jax.__version__, "device": device, "rows": rows}
    publish("memory_over_time", results, "\n".join(lines) + f"\n\n{text}\n", args.output)
    plot(rows, args.output / "memory_over_time.png")


if __name__ == "__main__":
    main()
