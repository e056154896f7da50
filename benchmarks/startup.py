"""What a command costs before it does its work: imports, and compilation with and without compiled programs at hand.

    python benchmarks/startup.py

Each measurement is a process of its own, and the kinds take turns. Writes `benchmarks/results/startup.json` and `.md`, and the
table into `docs/results/speed.md`.
"""

import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from publish import Parser, processor, publish

IMPORTS = {
    "`import jax, flax.linen`": "import jax, flax.linen",
    "`import sast_jax`": "import sast_jax",
    "`import sast_jax`, and all its names": "import sast_jax.public",
}
COMPILED, AT_HAND = (f"`sast-jax train`, one epoch on digits, {how}" for how in ("compiled anew", "programs at hand"))


def run(*arguments, **variables):
    """Runs Python and returns the seconds of processor time it took, which other processes change less than the clock's."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], env={**os.environ, **variables}, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def train(folder, name, cache, small=()):
    """Returns the seconds of a training of one epoch."""
    options = ("--config=configs/digits.py:sast", "--config.num_epochs=1", f"--workdir={folder / name}", *small)
    return run("-m", "sast_jax", "train", *options, SAST_JAX_CACHE=str(folder / "cache"), **cache)


def main():
    """Measures, then prints and writes the table."""
    parser = Parser(__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--trainings", type=int, default=3)
    args = parser.parse_args()
    num_rounds, num_trainings = (1, 1) if args.small else (args.rounds, args.trainings)
    settings = {"rounds": num_rounds, "trainings": num_trainings, "load": os.getloadavg()[0], "processor": processor()}
    seconds = {name: [] for name in IMPORTS}
    for _ in range(num_rounds + 1):
        for name, code in IMPORTS.items():
            seconds[name].append(run("-c", code))
    seconds = {name: values[1:] for name, values in seconds.items()}  # The first round fills the file cache.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small = ("--config.dataset.num_time_steps=3", "--config.network.features=4") if args.small else ()
        train(folder, "fill", {}, small)
        for number in range(num_trainings):
            for title, cache in ((COMPILED, {"JAX_ENABLE_COMPILATION_CACHE": "false"}), (AT_HAND, {})):
                seconds.setdefault(title, []).append(train(folder, f"{number}-{len(cache)}", cache, small))
    publish("startup", {**settings, "seconds": seconds}, markdown(seconds, settings), args.output)


def markdown(seconds, settings):
    """One table: each command against the first of its kind."""
    lines = ["| command | processor time, s | ratio |", "|---|---|---|"]
    for title, values in seconds.items():
        reference = seconds[next(iter(IMPORTS)) if title in IMPORTS else COMPILED]
        lines.append(f"| {title} | {np.median(values):.1f} | {np.median(np.divide(values, reference)):.2f}x |")
    machine = f"{len(os.sched_getaffinity(0))} {settings['processor']} cores"
    lines.append(
        f"\nMedians over {settings['rounds']} rounds of imports and {settings['trainings']} of trainings; ratios, of the same "
        f"round, to the first import and to the first training. {machine}, load {settings['load']:.1f} at the start."
    )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
