"""Ten thousand steps with an evaluation and a checkpoint every hundred: memory, compilations and speed over time.

    python benchmarks/soak.py

A small dense network on simulated digits under SAST, so that what grows is not hidden by what is large. After each epoch the
memory of the process, the processor time since the last epoch, and the programs compiled so far are noted. Writes
`benchmarks/results/soak.json`, `.md` and `.png`, and the table into its page.
"""

import os
import tempfile
import time
from unittest import mock

import jax
import numpy as np
from publish import RESULTS, ROOT, publish

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
    "num_epochs": 97,
    "evaluate_every_epochs": 1,
    "checkpoint_every_epochs": 1,
}


def memory():
    """Megabytes of this process that are in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def watch():
    """Trains, and returns a row per epoch: step, megabytes, processor seconds of the epoch, programs compiled so far."""
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

    (config,) = load_configs(f"{ROOT}/configs/digits.py:sast", [f"{key}={value}" for key, value in FIELDS.items()]).values()
    with tempfile.TemporaryDirectory() as workdir, mock.patch.object(Progress, "report", report):
        train_and_evaluate(config, workdir)
    return rows


def summarize(rows):
    """What must stay flat: medians of the first twenty epochs after the first, and of the last twenty."""
    step, megabytes, seconds, compiled = np.array(rows).T
    half = len(rows) // 2
    return {
        "num_steps": int(step[-1]),
        "num_checkpoints": len(rows),
        "megabytes": [round(float(np.median(part)), 1) for part in (megabytes[1:21], megabytes[-20:])],
        "megabytes_per_1000_steps": round(1000 * float(np.polyfit(step[half:], megabytes[half:], 1)[0]), 3),
        "processor_seconds_per_epoch": [round(float(np.median(part)), 4) for part in (seconds[1:21], seconds[-20:])],
        "compiled_in_first_epoch": int(compiled[0]),
        "compiled_later": int(compiled[-1] - compiled[0]),
    }


def plot(rows, path):
    """Memory and time over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    step, megabytes, seconds, _ = np.array(rows).T
    figure, axes = plt.subplots(2, 1, figsize=(7, 4.2), sharex=True, layout="constrained")
    for axis, values, label in zip(axes, (megabytes, seconds), ("memory, MB", "processor time\nof an epoch, s"), strict=True):
        axis.plot(step[1:], values[1:], linewidth=1.2)
        axis.set_ylim(0, 1.15 * values[1:].max())
        axis.set_ylabel(label)
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].set_xlabel("optimizer step")
    figure.savefig(path, dpi=150)


def main():
    """Trains, and writes the table and the figure."""
    keep_freed_memory()
    split_cpu()
    rows = watch()
    result = summarize(rows)
    plot(rows, RESULTS / "soak.png")
    title = f"{result['num_steps']:,} steps, {result['num_checkpoints']} evaluations and checkpoints"
    table = f"""| {title} | epochs 2 to 21 | last 20 epochs |
|---|---|---|
| memory of the process, MB | {result["megabytes"][0]:.0f} | {result["megabytes"][1]:.0f} |
| processor time of an epoch, s | {" | ".join(f"{each:.3f}" for each in result["processor_seconds_per_epoch"])} |

Programs compiled in the first epoch: {result["compiled_in_first_epoch"]}; later: {result["compiled_later"]}. \
Memory grows by {result["megabytes_per_1000_steps"]:.2f} MB per 1,000 steps over the second half.
"""
    publish("soak", {"environment": environment(), "fields": FIELDS, **result, "epochs": rows}, table)


if __name__ == "__main__":
    main()
