r"""Kills commands at random moments, restarts them, and checks that nothing is lost and nothing half-written is read.

    python -m tests.kill --kills=100

A kill (SIGKILL, which no program can handle) comes after a random time, or at a random file operation: an audit hook counts
every file or folder that Python opens for writing, makes, renames or removes, and dies right before one of them. After each
kill the case's check reads what is there. A command that ends is compared with one that was never killed. Writes
`benchmarks/results/kill.json` and `.md`, and the table into the README.
"""

import argparse
import atexit
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Case(NamedTuple):
    """A command that must survive.

    Attributes:
        arguments: Of `sast-jax`, by the folder that all its files are in, and the folder of the recordings.
        check: Raises an `AssertionError` if something in the folder is half-written; returns how far the command has come.
        digest: What an uninterrupted and a restarted command must have in common, bit for bit.
    """

    arguments: Callable[[Path, Path], list[str]]
    check: Callable[[Path], int]
    digest: Callable[[Path], str]


def train(folder, recordings):
    """Arguments of a training run of 30 epochs with a checkpoint after each; its cache is in the folder too."""
    fields = "dataset.num_time_steps=3 dataset.num_validation=10 network.kind=mlp network.features=8 batch_size=10 num_epochs=30"
    overrides = [f"--config.{field}" for field in f"{fields} checkpoint_every_epochs=1 evaluate_every_epochs=5".split()]
    root = f"--config.dataset.root={recordings}"
    return ["train", f"--config={ROOT}/configs/nmnist.py:sast", f"--workdir={folder / 'run'}", root, *overrides]


def check_train(folder):
    """Reads every file of a run that has a name of its own, and returns the step of the last checkpoint."""
    from sast_jax import load_run
    from sast_jax.data.cache import _load
    from sast_jax.errors import UserError

    whole = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    for path in whole:
        if path.suffix == ".json":
            json.loads(path.read_text())
        if path.suffix == ".npz":
            assert _load(path) is not None, f"{path} is damaged"
    try:
        run = load_run(folder / "run")
    except UserError as error:
        if "has no checkpoint yet" not in str(error) and "is no run" not in str(error):
            raise
        return 0
    assert (run.results is None) or run.step == 90
    return run.step


def digest_train(folder):
    """Hash of the final weights and of the results but for times."""
    import jax

    from sast_jax import load_run

    run = load_run(folder / "run")
    digest = hashlib.sha256(b"".join(leaf.tobytes() for leaf in jax.device_get(jax.tree.leaves(run.params))))
    results = {key: value for key, value in run.results.items() if "seconds" not in key}
    digest.update(json.dumps(results, sort_keys=True).encode())
    return digest.hexdigest()


CASES = {"train": Case(train, check_train, digest_train)}
"""Commands by name."""

_CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink"}


def die_at(number, folder):
    """Makes this process die before its file operation `number` in a folder; 0: it leaves their number in `operations`."""
    count = 0

    def hook(event, arguments):
        nonlocal count
        if event not in _CHANGES or not str(arguments[0]).startswith(folder):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    if number == 0:
        atexit.register(lambda: Path(f"{folder}.operations").write_text(str(count)))


_CHILD = """
import sys
from tests.kill import die_at
die_at(int(sys.argv.pop(1)), sys.argv.pop(1))
from sast_jax.cli import entry_point
entry_point()
"""


def start(case, folder, recordings, compiled, *, operation=0):
    """Starts a command that dies at the given file operation; 0: at none."""
    environment = {
        **os.environ,
        "SAST_JAX_CACHE": str(folder / "cache"),
        "JAX_COMPILATION_CACHE_DIR": str(compiled),  # A restart takes two seconds instead of four.
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    command = [sys.executable, "-c", _CHILD, str(operation), str(folder), *case.arguments(folder, recordings)]
    log = folder.with_suffix(".log").open("w")
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)


def survive(case, num_kills, workdir, *, seed=0, progress=lambda text: None):
    """Kills a command `num_kills` times, and returns what was seen.

    Raises:
        AssertionError: If something is half-written, a checkpoint is lost, or the outcome differs.
    """
    from tests.conftest import write_small_nmnist

    rng = random.Random(seed)
    recordings, compiled = write_small_nmnist(workdir / "recordings"), workdir / "compiled"
    for name in ("first", "reference"):  # The first one compiles.
        begin = time.monotonic()
        assert start(case, workdir / name, recordings, compiled).wait() == 0, (workdir / f"{name}.log").read_text()
    seconds = time.monotonic() - begin
    operations = int((workdir / "reference.operations").read_text())
    expected = case.digest(workdir / "reference")
    seen = {"kills": {"after a time": 0, "at a file operation": 0}, "finished": 0, "steps_at_kill": []}
    while sum(seen["kills"].values()) < num_kills:
        folder, reached, status = workdir / f"run{seen['finished']}", 0, None
        while status != 0:
            kind = rng.choice(list(seen["kills"]))
            operation = rng.randint(1, operations) if kind == "at a file operation" else 0
            process = start(case, folder, recordings, compiled, operation=operation)
            try:
                status = process.wait(None if operation else rng.uniform(0, seconds))
            except subprocess.TimeoutExpired:
                process.kill()
                status = process.wait()
            assert status in (0, -signal.SIGKILL), folder.with_suffix(".log").read_text()
            before, reached = reached, case.check(folder)
            assert reached >= before, f"{folder}: came to {before}, then {reached}"
            if status != 0:
                seen["kills"][kind] += 1
                seen["steps_at_kill"].append(reached)
                progress(f"{sum(seen['kills'].values())} kills, last {kind} with {reached} done")
            if sum(seen["kills"].values()) >= num_kills and status != 0:  # Enough: let it end.
                assert start(case, folder, recordings, compiled).wait() == 0, folder.with_suffix(".log").read_text()
                status = 0
        seen["finished"] += 1
        assert case.digest(folder) == expected, f"{folder} differs from {workdir / 'reference'}"
    return seen | {"uninterrupted_seconds": seconds, "file_operations": operations}


def main():
    """Kills each command, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="per command")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from publish import publish

    from sast_jax.training.run import environment

    results = {}
    for name in args.cases.split(","):
        with tempfile.TemporaryDirectory() as workdir:
            results[name] = survive(CASES[name], args.kills, Path(workdir), seed=args.seed, progress=print)
    lines = ["| command | kills after a random time | kills at a random file operation | runs that finished, equal bit for bit |"]
    lines.append("|---|---|---|---|")
    for name, seen in results.items():
        kills = seen["kills"]
        lines.append(f"| {name} | {kills['after a time']} | {kills['at a file operation']} | {seen['finished']} |")
    lines.append(
        "\nNo file was ever read half-written, no checkpoint lost, and every run ended in the weights and results of one that "
        f"was never killed. Kills fall from the start of Python to the last of a run's {seen['file_operations']} file operations."
    )
    publish("kill", {"seed": args.seed, "environment": environment(), "cases": results}, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
