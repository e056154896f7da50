"""Speed and memory of sast_jax beside other libraries of spiking networks and a plain PyTorch loop, all in one run.

    pip install -e ".[peers]" && python benchmarks/peers.py

Without a GPU, name PyTorch's wheel for CPUs in the same `pip install`, or a package that asks for torchvision replaces it. Each
library runs in a process of its own (`peer_networks.py`), on as many threads as there are cores and with the same settings of
the allocator. The processes take turns and wait for each other; in each round a process takes one step that is not timed and
some that are. What other programs take of the processors is measured in each round, and rounds with foreign load are left out
where enough are quiet. Logits and gradients are compared with those of sast_jax before anything is timed. Libraries that are
missing get a row that says so. Writes `benchmarks/results/peers.json` and `.md`, and the table into `docs/results.md`.
"""

import argparse
import importlib.metadata
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from peer_networks import CORES, LIBRARIES, MACHINE, OWN_WAYS, WORKLOADS
from publish import publish

KINDS = {"train": "train step, ms", "sast": "SAST step, ms", "infer": "inference, ms"}
QUIET = 0.1
"""Processors that other programs may take in a round that counts as quiet."""

PACKAGES = ("jax", "torch", "spikingjelly", "snntorch", "norse", "slax", "spyx")


class Child:
    """A process that runs one library on one workload."""

    def __init__(self, library, workload=""):
        """Starts it and waits until its program is built."""
        script = Path(__file__).with_name("peer_networks.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script), library, workload],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.error = None
        self._read()

    def _read(self):
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": "the process died"}
        if isinstance(answer, dict):
            self.error = answer["error"]
            return None
        return answer

    def ask(self, *command):
        """Returns the answer to a command, or `None` if the library failed; then `error` says why."""
        if self.error:
            return None
        print(*command, file=self.process.stdin, flush=True)
        return self._read()

    def seconds(self):
        """Processor time that it has used, of all its threads and children."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")

    def close(self):
        """Ends it."""
        self.process.stdin.close()
        self.process.wait()


def busy_seconds():
    """Processor time of the whole machine."""
    user, nice, system, _, _, *interrupts = map(int, Path("/proc/stat").read_text().splitlines()[0].split()[1:9])
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


class ForeignLoad:
    """The mean number of processors that other programs use while it is entered."""

    def __init__(self, ours):
        """Takes the processes that are not foreign."""
        self.ours = ours

    def _read(self):
        own = sum(child.seconds() for child in self.ours) + time.process_time()
        return np.array([time.perf_counter(), busy_seconds() - own])

    def __enter__(self):
        """Begins."""
        self.start = self._read()
        return self

    def __exit__(self, *error):
        """Ends; `value` is the result."""
        elapsed, foreign = self._read() - self.start
        self.value = max(0.0, float(foreign / elapsed))


def quartiles(values, scale=1.0):
    """Rounded to what can be told apart."""
    return [float(f"{scale * q:.4g}") for q in np.quantile(values, (0.25, 0.5, 0.75))]


def compile_all(children, folder):
    """Compiles what is to be timed, one process at a time; returns a row of seconds, memory and outputs for each."""
    rows = {name: {"compile_seconds": {}} for name in children}
    for name, child in children.items():
        for kind in ("infer", "train", "sast"):
            if kind == "sast" and name.startswith("norse"):
                continue
            path = f"{folder}/{kind}.npz"
            seconds = child.ask("compile", kind, path)
            if child.error:
                rows[name] = {"error": child.error}
                break
            rows[name]["compile_seconds"][kind] = round(seconds, 2)
            with np.load(path) as arrays:
                rows[name].setdefault("outputs", {})[kind] = np.concatenate([arrays[key].ravel() for key in arrays.files])
            if kind == "train":
                rows[name]["memory_megabytes"] = round(child.ask("memory", kind, "-") / 1e6)
        print(f"  {name}: {rows[name].get('error') or rows[name]['compile_seconds']}", flush=True)
    return rows


def measure(workload, libraries, rounds, steps):
    """Returns a row per library, and the rounds with what was seen of the load."""
    present = [name for name in libraries if importlib.util.find_spec(LIBRARIES[name][1])]
    rows = {name: {"error": "not installed"} for name in libraries}
    children = {name: Child(name, workload) for name in present}
    with tempfile.TemporaryDirectory() as folder:
        rows |= compile_all(children, folder)
    if rows["sast_jax"].get("error"):
        raise SystemExit(f"sast_jax, to which all are compared: {rows['sast_jax']['error']}")
    reference = rows["sast_jax"]["outputs"]
    for row in rows.values():
        row["difference"] = {
            kind: float(f"{np.linalg.norm(value - reference[kind]) / np.linalg.norm(reference[kind]):.2g}")
            for kind, value in row.pop("outputs", {}).items()
        }
    working = {name: child for name, child in children.items() if not child.error}
    machine = Child("floor")
    ours = [*children.values(), machine]
    turns = [(machine, kind) for kind in MACHINE]
    turns += [(child, kind) for name, child in working.items() for kind in KINDS if kind in rows[name]["compile_seconds"]]
    names = {id(child): name for name, child in [*working.items(), ("floor", machine)]}
    for child, kind in turns[: len(MACHINE)]:
        child.ask("compile", kind, "-")
    found = []
    for number in range(rounds):
        one = {"load_average": os.getloadavg()[0], "seconds": {}}
        with ForeignLoad(ours) as foreign:
            for child, kind in turns:
                one["seconds"].setdefault(names[id(child)], {})[kind] = child.ask("run", kind, steps)
        one["foreign_load"] = round(foreign.value, 3)
        found.append(one)
        print(f"  round {number + 1}: load {one['load_average']:.1f}, of others {one['foreign_load']:.2f}", flush=True)
    for child in ours:
        child.close()

    quiet = [one for one in found if one["foreign_load"] <= QUIET]
    counted = quiet if 2 * len(quiet) >= rounds else found
    times = {
        (name, kind): np.array([one["seconds"][name][kind] for one in counted])
        for name, kinds in found[0]["seconds"].items()
        for kind in kinds
    }
    for name, kind in itertools.product(working, KINDS):
        if (name, kind) in times:
            row = rows[name].setdefault(kind, {})
            row["milliseconds"] = quartiles(times[name, kind], 1e3)
            row["ratio"] = quartiles(times[name, kind] / times["sast_jax", kind])[1]
    peaks = {kind: work / float(np.median(times["floor", kind])) for kind, work in MACHINE.items()}
    floor = {"gigaflops": round(peaks["matmul"] / 1e9, 1), "gigabytes_per_second": round(peaks["copy"] / 1e9, 2)}
    for kind in KINDS:
        operations, num_bytes = WORKLOADS[workload].cost(kind)
        compute, memory = operations / peaks["matmul"], num_bytes / peaks["copy"]
        floor[kind] = {"milliseconds": round(1e3 * max(compute, memory), 3), "of": "products" if compute > memory else "memory"}
    return {"rows": rows, "floor": floor, "rounds": found, "quiet_rounds": len(quiet), "counted_rounds": len(counted)}


def cell(row, kind):
    """Median, quartiles and ratio."""
    if kind not in row:
        return ""
    low, median, high = row[kind]["milliseconds"]
    return f"{median:.4g} ({low:.4g} - {high:.4g}), {row[kind]['ratio']:.2f}x"


def markdown(tables, environment):
    """One table per workload."""
    lines = []
    for workload, table in tables.items():
        lines += [f"| {workload} | {' | '.join(KINDS.values())} | compile, s | memory, MB | difference |"]
        lines += ["|---" * 7 + "|"]
        for name, row in table["rows"].items():
            if "error" in row:
                lines.append(f"| {name} | {row['error']} | | | | | |")
                continue
            total = sum(row["compile_seconds"].values())
            difference = " / ".join(
                f"{row['difference'][kind]:.0e}" for kind in ("infer", "train", "sast") if kind in row["difference"]
            )
            cells = [cell(row, kind) for kind in KINDS]
            lines.append(f"| {name} | {' | '.join(cells)} | {total:.1f} | {row['memory_megabytes']} | {difference} |")
        floors = [f"{table['floor'][kind]['milliseconds']:.3g} ({table['floor'][kind]['of']})" for kind in KINDS]
        lines += [
            f"| *floor* | {' | '.join(floors)} | | | |",
            "",
            f"Rounds: {len(table['rounds'])}, quiet {table['quiet_rounds']}, counted {table['counted_rounds']}. Machine: "
            f"{table['floor']['gigaflops']:.0f} GFLOP/s in a product of matrices, "
            f"{table['floor']['gigabytes_per_second']:.1f} GB/s in a copy.",
            "",
        ]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    own = "; ".join(f"{name}: {text}" for name, text in OWN_WAYS.items())
    lines.append(
        f"Median over rounds (quartiles), and ratio to sast_jax within a round. float32, {environment['cores']} "
        f"{environment['device']} cores, {environment['steps']} steps a round. Compile: first calls of all three. Memory: peak "
        "of the process in a train step. Difference from sast_jax before training: logits / gradient of a train step / of a SAST "
        f"step, relative. {own}. Floor: the larger of products at the machine's measured rate and memory traffic (frames once, "
        f"potentials there and back, weights) at the measured bandwidth. A round is quiet if other programs took less than "
        f"{QUIET} processors. {versions}."
    )
    return "\n".join(lines) + "\n"


def main():
    """Measures, then prints and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=3, help="timed in a round")
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=list(LIBRARIES))
    parser.add_argument("--workloads", type=int, nargs="+", choices=range(len(WORKLOADS)), default=range(len(WORKLOADS)))
    args = parser.parse_args()
    versions = {}
    for package in PACKAGES:
        if importlib.util.find_spec(package):
            versions[package] = importlib.metadata.version(package)
    device = next(
        (line.partition(": ")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ""
    )
    environment = {"device": device, "cores": CORES, "rounds": args.rounds, "steps": args.steps, "versions": versions}
    tables = {}
    for number in args.workloads:
        workload = list(WORKLOADS)[number]
        print(workload, flush=True)
        libraries = ["sast_jax", *(name for name in args.libraries if name != "sast_jax")]
        tables[workload] = measure(workload, libraries, args.rounds, args.steps)
    publish("peers", {"environment": environment, "workloads": tables}, markdown(tables, environment))


if __name__ == "__main__":
    main()
