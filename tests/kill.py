r"""Kills commands at random moments, restarts them, and checks that nothing is lost and nothing half-written is read.

    python -m tests.kill --kills=40

A kill (SIGKILL, which no program can handle) comes after a random time, or at a random file operation: an audit hook counts
every file or folder that Python opens for writing, makes, renames or removes, and dies right before one of them. After each
kill the case's check reads what is there. A command that ends is compared with one that was never killed. Writes
`benchmarks/results/kill.json` and `.md`, and the table into `docs/results/reliability.md`.
"""

import argparse
import atexit
import hashlib
import itertools
import json
import os
import random
import shutil
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
        after: Name of the case that has ended in the folder before this one begins; empty: none.
    """

    arguments: Callable[[Path, Path], list[str]]
    check: Callable[[Path], int]
    digest: Callable[[Path], str]
    after: str = ""


_FIELDS = "dataset.num_time_steps=3 dataset.num_validation=10 network.kind=mlp network.features=8 batch_size=10"
_SMALL = [f"--config.{field}" for field in _FIELDS.split()]
_STUDY = """
import runpy

from sast_jax.experiments import Study

_whole = runpy.run_path("{root}/configs/study_nmnist.py")
get_config = _whole["get_config"]


def get_study():
    names = ("baseline", "sast", "sast_calibrated")
    methods = _whole["get_study"]().methods
    methods = {{name: methods[name]._replace(controls=("baseline",) * (name != "baseline")) for name in names}}
    return Study(methods, seeds=(0, 1), selection_seeds=(100,))
"""


def train(folder, recordings):
    """Arguments of a training run of 30 epochs with a checkpoint after each; its cache is in the folder too."""
    fields = "num_epochs=30 checkpoint_every_epochs=1 evaluate_every_epochs=5"
    overrides = [f"--config.dataset.root={recordings}", *_SMALL, *(f"--config.{field}" for field in fields.split())]
    return ["train", f"--config={ROOT}/configs/nmnist.py:sast", f"--workdir={folder / 'run'}", *overrides]


def sweep(folder, recordings):
    """Arguments of a study of two methods and a calibration, one of which selects its radius."""
    config = recordings.parent / "study.py"  # Not in the folder, whose files the killed process writes.
    config.write_text(_STUDY.format(root=ROOT))
    fields = "num_epochs=2 optimizer.learning_rate=0.01 evaluate_every_epochs=1 checkpoint_every_epochs=1"
    overrides = [f"--config.dataset.root={recordings}", *_SMALL, *(f"--config.{field}" for field in fields.split())]
    return ["sweep", f"--config={config}", f"--workdir={folder / 'study'}", *overrides]


def prepare(folder, recordings):
    """Arguments that fill the cache."""
    return ["data", "prepare", f"--config={ROOT}/configs/nmnist.py", f"--config.dataset.root={recordings}", *_SMALL[:2]]


def export(folder, recordings):
    """Arguments that write a graph."""
    return ["export", f"--workdir={folder / 'run'}", f"--output={folder / 'net.nir'}"]


def report(folder, recordings):
    """Arguments that write a page."""
    return ["report", f"--workdir={folder / 'run'}"]


def check_files(folder):
    """Reads every file that has a name of its own, and returns how many there are."""
    import nir
    from PIL import Image

    from sast_jax.data.cache import _load

    whole = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    for path in whole:
        if path.suffix == ".json":
            json.loads(path.read_text())
        if path.suffix == ".npz":
            assert _load(path) is not None, f"{path} is damaged"
        if path.suffix == ".nir":
            nir.read(path)
        if path.suffix == ".html":
            assert path.read_text().endswith("</html>\n"), f"{path} is damaged"
        if path.suffix == ".png":
            with Image.open(path) as image:
                image.load()
    return len(whole)


def check_named(*suffixes):
    """Returns the check of a command whose progress is the number of its finished files of these kinds."""

    def check(folder):
        check_files(folder)
        return sum(1 for suffix in suffixes for _ in folder.rglob(f"*{suffix}"))

    return check


def check_train(folder):
    """Reads every file of a run, and returns the step of the last checkpoint."""
    from sast_jax import load_run
    from sast_jax.errors import UserError

    check_files(folder)
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
    digest.update(_without_times(run.results))
    return digest.hexdigest()


def _without_times(results):
    def strip(value):
        if isinstance(value, dict):
            return {key: strip(each) for key, each in value.items() if "seconds" not in key and "time_ratio" not in key}
        return [strip(each) for each in value] if isinstance(value, list) else value

    return json.dumps(strip(results), sort_keys=True).encode()


def digest_sweep(folder):
    """Hash of the study's results but for times; its page is there."""
    assert (folder / "study" / "results.md").exists()
    return hashlib.sha256(_without_times(json.loads((folder / "study" / "results.json").read_text()))).hexdigest()


def digest_files(pattern):
    """Returns the digest of a command whose files of this pattern are the outcome."""

    def digest(folder):
        paths = sorted(folder.rglob(pattern))
        assert paths
        content = b"".join(path.read_bytes() for path in paths)
        return hashlib.sha256(content.replace(str(folder).encode(), b"")).hexdigest()  # A page names its folder.

    return digest


CASES = {
    "train": Case(train, check_train, digest_train),
    "sweep": Case(sweep, check_named("results.json"), digest_sweep),
    "data prepare": Case(prepare, check_named(".npz"), digest_files("*.npz")),
    "export": Case(export, check_named(".nir"), digest_files("*.nir"), after="train"),
    "report": Case(report, check_named(".html"), digest_files("*.html"), after="train"),
}
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
    with folder.with_suffix(".log").open("w") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)


def survive(case, num_kills, workdir, *, seed=0, progress=lambda text: None):
    """Kills a command `num_kills` times, and returns what was seen.

    Raises:
        AssertionError: If something is half-written, a checkpoint is lost, or the outcome differs.
    """
    from tests.conftest import write_small_nmnist

    rng = random.Random(seed)
    recordings, compiled, origin = write_small_nmnist(workdir / "recordings"), workdir / "compiled", workdir / "origin"
    origin.mkdir()
    if case.after:
        assert start(CASES[case.after], origin, recordings, compiled).wait() == 0, origin.with_suffix(".log").read_text()
    for name in ("first", "reference"):  # The first one compiles.
        shutil.copytree(origin, workdir / name)
        begin = time.monotonic()
        assert start(case, workdir / name, recordings, compiled).wait() == 0, (workdir / f"{name}.log").read_text()
    seconds = time.monotonic() - begin
    operations = int((workdir / "reference.operations").read_text())
    expected = case.digest(workdir / "reference")
    seen = {"kills": {"after a time": 0, "at a file operation": 0}, "finished": 0, "done_at_kill": []}
    kinds = itertools.cycle(seen["kills"])
    while sum(seen["kills"].values()) < num_kills:
        folder, reached, status = workdir / f"run{seen['finished']}", 0, None
        shutil.copytree(origin, folder)
        while status != 0:
            kind = next(kinds)
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
                seen["done_at_kill"].append(reached)
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
    parser.add_argument("--kills", type=int, default=40, help="per command")
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
    heads = (
        "`sast-jax`",
        "killed after a random time",
        "killed at a random file operation",
        "went to their end, equal to an uninterrupted one",
    )
    lines = [f"| {' | '.join(heads)} |", "|---|---|---|---|"]
    for name, seen in results.items():
        kills = seen["kills"]
        lines.append(f"| {name} | {kills['after a time']} | {kills['at a file operation']} | {seen['finished']} |")
    lines.append(
        "\nAfter each kill every file that has its final name was read and found whole, and no checkpoint had been lost; every "
        "command ended in the weights, results, cache, graph or page of one that was never killed. Kills fall from the start of "
        "Python to the last of a command's file operations, of which there are "
        + ", ".join(f"{seen['file_operations']} in {name}" for name, seen in results.items())
        + "."
    )
    publish("kill", {"seed": args.seed, "environment": environment(), "cases": results}, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
