"""Forty thousand steps with an evaluation every hundred, with and without checkpoints: memory, compilations, speed over time.

    python benchmarks/soak.py

A small dense network on simulated digits under SAST, so that what grows is not hidden by what is large, trained twice, each time
in a process of its own: with a checkpoint every epoch, and with a single one at the end. After each epoch the memory of the
process, the processor time since the last epoch, and the programs compiled so far are noted. Writes
`benchmarks/results/soak.json`, `.md` and `.png`, and the table into its page.
"""

import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from unittest import mock

import jax
import numpy as np
from publish import ROOT, Parser, publish

from sast_jax.allocator import keep_freed_memory
from sast_jax.config import load_configs
from sast_jax.devices import split_cpu
from sast_jax.training import train_and_evaluate
from sast_jax.training.progress import Progress
from sast_jax.training.run import environment

FIELDS = {
    "network.kind": "mlp",
    "network.features": 16,
    "dataset.num_time_steps": 5,
    "batch_size": 12,  # 104 steps an epoch.
    "num_epochs": 400,
    "evaluate_every_epochs": 1,
}
CHECKPOINTS = {"a checkpoint every epoch": 1, "one checkpoint, at the end": FIELDS["num_epochs"]}


def memory():
    """Megabytes of this process that are in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def watch(fields):
    """Trains, and returns a row per epoch: step, megabytes, processor seconds of the epoch, programs compiled so far."""
    keep_freed_memory()
    split_cpu()
    rows, compiled = [], []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    before = time.process_time()

    def report(self, epoch, step, metrics):
        nonlocal before
        now = time.process_time()
        rows.append((step, memory(), now - before, len(compiled)))
        before = now

    (config,) = load_configs(f"{ROOT}/configs/digits.py:sast", [f"{key}={value}" for key, value in fields.items()]).values()
    with tempfile.TemporaryDirectory() as workdir, mock.patch.object(Progress, "report", report):
        train_and_evaluate(config, workdir)
    return rows


def summarize(rows):
    """Medians of epochs 2 to 21 and of the last twenty, growth of memory over the second half, programs compiled."""
    step, megabytes, seconds, compiled = np.array(rows).T
    half = len(rows) // 2
    return {
        "num_steps": int(step[-1]),
        "megabytes": [round(float(np.median(part)), 1) for part in (megabytes[1:21], megabytes[-20:])],
        "kilobytes_per_epoch": round(1000 * float(np.polyfit(np.arange(half, len(rows)), megabytes[half:], 1)[0]), 1),
        "processor_seconds_per_epoch": [round(float(np.median(part)), 4) for part in (seconds[1:21], seconds[-20:])],
        "compiled_in_first_epoch": int(compiled[0]),
        "compiled_later": int(compiled[-1] - compiled[0]),
    }


def plot(results, path):
    """Memory and time over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 1, figsize=(7, 4.2), sharex=True, layout="constrained")
    for column, (axis, label) in enumerate(zip(axes, ("memory, MB", "processor time\nof an epoch, s"), strict=True), 1):
        for name, result in results.items():
            rows = np.array(result["epochs"])[1:]
            axis.plot(rows[:, 0], rows[:, column], linewidth=1.2, label=name)
        axis.set_ylim(0, 1.15 * axis.dataLim.ymax)
        axis.set_ylabel(label)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    axes[1].set_xlabel("optimizer step")
    figure.savefig(path, dpi=150)


def main():
    """Trains, and writes the table and the figure."""
    args = Parser(__doc__).parse_args()
    fields, results = FIELDS | ({"num_epochs": 4} if args.small else {}), {}
    for name, every in CHECKPOINTS.items():
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            rows = process.submit(watch, fields | {"checkpoint_every_epochs": min(every, fields["num_epochs"])}).result()
        results[name] = summarize(rows) | {"epochs": rows}
    plot(results, args.output / "soak.png")
    first = next(iter(results.values()))
    title = f"{first['num_steps']:,} steps, {fields['num_epochs']} evaluations"
    lines = [
        f"| {title} | memory, MB, epochs 2 to 21 | last 20 epochs | growth in the second half, kB an epoch "
        "| processor time of an epoch, s, epochs 2 to 21 | last 20 epochs | programs compiled in the first epoch | later |",
        "|---" * 8 + "|",
    ]
    for name, result in results.items():
        memories = " | ".join(f"{each:.0f}" for each in result["megabytes"])
        seconds = " | ".join(f"{each:.3f}" for each in result["processor_seconds_per_epoch"])
        lines.append(
            f"| {name} | {memories} | {result['kilobytes_per_epoch']:.0f} | {seconds} | {result['compiled_in_first_epoch']} "
            f"| {result['compiled_later']} |"
        )
    results = {"environment": environment(), "fields": fields, "runs": results}
    publish("soak", results, "\n".join(lines) + "\n", args.output)


if __name__ == "__main__":
    main()
