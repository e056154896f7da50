"""How long it takes until a command does its work: imports, and the first train step with and without compiled programs at hand.

    python benchmarks/startup.py

Each measurement is a process of its own, and the kinds take turns. Writes `benchmarks/results/startup.json` and `.md`, and the
table into `docs/results.md`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from publish import publish

from sast_jax.training.run import environment

IMPORTS = {
    "`import jax, flax.linen`": "import jax, flax.linen",
    "`import sast_jax`": "import sast_jax",
    "`import sast_jax`, and all its names": "import sast_jax.public",
}
TRAIN = "sast-jax train, one epoch on digits"


def run(*arguments, **variables):
    """Runs Python and returns the seconds it took."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], env={**os.environ, **variables}, check=True, capture_output=True)
    return time.perf_counter() - start


def train(folder, name, cache):
    """Returns the seconds of a short training, and those until its first step."""
    fields = ("num_epochs=1", "batch_size=32")
    command = ["-m", "sast_jax", "train", "--config=configs/digits.py:sast", f"--workdir={folder / name}"]
    seconds = run(*command, *(f"--config.{field}" for field in fields), SAST_JAX_CACHE=str(folder / "cache"), **cache)
    return seconds, json.loads((folder / name / "results.json").read_text())["first_step_seconds"]


def main():
    """Measures, then prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--trainings", type=int, default=3)
    args = parser.parse_args()
    settings = {"rounds": args.rounds, "trainings": args.trainings, "load": os.getloadavg()[0], "environment": environment()}
    seconds = {name: [] for name in IMPORTS}
    for _ in range(args.rounds + 1):
        for name, code in IMPORTS.items():
            seconds[name].append(run("-c", code))
    seconds = {name: values[1:] for name, values in seconds.items()}  # The first round fills the file cache.
    first, without, kept = {}, {"JAX_ENABLE_COMPILATION_CACHE": "false"}, {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train(folder, "fill", kept)
        for number in range(args.trainings):
            for title, cache in (("compiled anew", without), ("programs at hand", kept)):
                total, until_first = train(folder, f"{title}{number}", cache)
                seconds.setdefault(f"{TRAIN}, {title}", []).append(total)
                first.setdefault(f"{TRAIN}, {title}", []).append(until_first)
    lines = ["| command | median, s | ratio | of it training, to its first step, s |", "|---|---|---|---|"]
    rows = {}
    for title, values in seconds.items():
        reference = seconds[f"{TRAIN}, compiled anew" if title.startswith(TRAIN) else next(iter(IMPORTS))]
        rows[title] = {"seconds": values, "ratio": float(np.median(np.divide(values, reference)))}
        rows[title]["first_step_seconds"] = first.get(title)
        until_first = f"{np.median(first[title]):.2f}" if title in first else ""
        lines.append(f"| {title} | {np.median(values):.2f} | {rows[title]['ratio']:.2f} | {until_first} |")
    lines.append(
        f"\nRatios are medians of pairs of the same round ({args.rounds} of imports, {args.trainings} of trainings), to the "
        f"first import and to the first training. {settings['environment']['num_cores']} cores, load {settings['load']:.1f} at "
        "the start."
    )
    publish("startup", {**settings, "commands": rows}, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
