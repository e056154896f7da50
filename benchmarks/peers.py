"""Speed and memory of sast_jax beside other libraries of spiking networks and a plain PyTorch loop, all in one run.

    pip install -e ".[peers]" && python benchmarks/peers.py

All of it runs on the CPU, or with `PEERS_DEVICE=gpu` in the environment on a GPU. Without a GPU, name PyTorch's wheel for CPUs in
the same `pip install`, or a package that asks for torchvision replaces it. Each library runs in a process of its own
(`peer_networks.py`), on as many threads as there are cores and with the same settings of the allocator. The processes take turns
and wait for each other: first each warms up, then in each round a process takes one step that is not timed and some that are.
What other programs take of the processors is measured in each round, and rounds with foreign load are left out where enough are
quiet. Logits and gradients are compared with those of sast_jax before anything is timed. Libraries that are missing get a row
that says so. Writes `benchmarks/results/peers_cpu_FAMILY_MODEL.json` and `.md`, the numbers of the processor, and a line per
network and processor into `docs/results/speed.md`; on a GPU `peers_gpu.json` and `.md`. On a CPU, a run of some libraries or
networks only prints.
"""

import importlib.metadata
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
from peer_networks import CORES, LIBRARIES, MACHINE, ON_GPU, OWN_WAYS, SMALL, WORKLOADS
from publish import Parser, processor, publish

KINDS = {"train": "train step, ms", "sast": "SAST step, ms", "infer": "inference, ms"}
QUIET = 0.1
"""Processors that other programs may take in a round that counts as quiet."""

WARM_UP = 2.0
"""Seconds of steps before the first round, for each kind of step. Heaps still grow in the first of them."""

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
            # Else torch.compile would take what it has kept of earlier runs.
            env=os.environ
            | {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
            | ({"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if ON_GPU else {"JAX_PLATFORMS": "cpu"}),
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


def compile_one(child, has_smooth, folder):
    """Compiles what is to be timed of one library; returns its row of seconds, memory and outputs."""
    row = {"compile_seconds": {}, "outputs": {}}
    for kind in ("infer", "train", "sast")[: 2 + has_smooth]:
        path = f"{folder}/{id(child)}-{kind}.npz"
        seconds = child.ask("compile", kind, path)
        if child.error:
            return {"error": child.error}
        row["compile_seconds"][kind] = round(seconds, 2)
        with np.load(path) as arrays:
            row["outputs"][kind] = np.concatenate([arrays[key].ravel() for key in arrays.files])
        if kind == "train":
            row["memory_megabytes"] = round((child.ask("memory", kind, "-") or 0) / 1e6)
    return row


def prepare(workload, libraries, pool):
    """Returns the processes of all libraries, and a row for each; on a CPU they compile one at a time."""
    present = [name for name in libraries if importlib.util.find_spec(LIBRARIES[name][1])]
    children = dict(zip(present, pool.map(lambda name: Child(name, workload), present), strict=True))
    with tempfile.TemporaryDirectory() as folder:
        compiled = pool.map(lambda name: compile_one(children[name], not name.startswith("norse"), folder), present)
        rows = {name: {"error": "not installed"} for name in libraries} | dict(zip(present, compiled, strict=True))
    for name, row in rows.items():
        print(f"  {name}: {row.get('error') or row['compile_seconds']}", flush=True)
    if "error" in rows["sast_jax"]:
        raise SystemExit(f"sast_jax, to which all are compared: {rows['sast_jax']['error']}")
    reference = rows["sast_jax"]["outputs"]
    for row in rows.values():
        row["difference"] = {
            kind: float(f"{np.linalg.norm(value - reference[kind]) / np.linalg.norm(reference[kind]):.2g}")
            for kind, value in row.pop("outputs", {}).items()
        }
    return children, rows


def measure(workload, children, rows, rounds, steps, warm_up):
    """Times what is prepared; returns the rows, and the rounds with what was seen of the load."""
    machine = Child("floor")
    ours = [*children.values(), machine]
    for kind in MACHINE:
        machine.ask("compile", kind, "-")
    kinds = {name: [kind for kind in KINDS if kind in row.get("compile_seconds", ())] for name, row in rows.items()}
    for child, own in [(machine, MACHINE), *((child, kinds[name]) for name, child in children.items())]:
        for kind in own:  # In the first steps after compilation a heap still grows.
            child.ask("warm_up", kind, warm_up)
    rows |= {name: {"error": child.error} for name, child in children.items() if child.error}
    working = {name: child for name, child in children.items() if not child.error}
    turns = [(machine, kind) for kind in MACHINE] + [(child, kind) for name, child in working.items() for kind in kinds[name]]
    names = {id(child): name for name, child in [*working.items(), ("floor", machine)]}
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
            row["ratio"] = quartiles(times[name, kind] / times["sast_jax", kind])
    peaks = {kind: work / float(np.median(times["floor", kind])) for kind, work in MACHINE.items()}
    floor = {"gigaflops": round(peaks["matmul"] / 1e9, 1), "gigabytes_per_second": round(peaks["copy"] / 1e9, 2)}
    for kind in KINDS:
        operations, num_bytes = (WORKLOADS | SMALL)[workload].cost(kind)
        compute, memory = operations / peaks["matmul"], num_bytes / peaks["copy"]
        floor[kind] = {"milliseconds": round(1e3 * max(compute, memory), 3), "of": "products" if compute > memory else "memory"}
    return {"rows": rows, "floor": floor, "rounds": found, "quiet_rounds": len(quiet), "counted_rounds": len(counted)}


def cell(row, kind):
    """Median, quartiles and ratio."""
    if kind not in row:
        return ""
    low, median, high = row[kind]["milliseconds"]
    return f"{median:.4g} ({low:.4g} - {high:.4g}), {row[kind]['ratio'][1]:.2f}x"


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
    if ON_GPU:
        where, compiling = f"float32 with products in TF32, one {environment['device']}", ", side by side"
        memory = "of the GPU until then, of one process"
    else:
        where, compiling, memory = f"float32, {environment['cores']} {environment['device']} cores", "", "of the process"
    own = "; ".join(f"{name}: {text}" for name, text in OWN_WAYS.items())
    lines.append(
        f"Median over rounds (quartiles), and ratio to sast_jax within a round. {where}, {environment['steps']} steps a round. "
        f"Compile: first calls of all three{compiling}. Memory: peak {memory}, in a train step. Difference from sast_jax before "
        f"training: logits / gradient of a train step / of a SAST step, relative. {own}. Floor: the larger of products at the "
        "machine's measured rate and memory traffic (frames once, potentials there and back, weights) at the measured bandwidth. "
        f"A round is quiet if other programs took less than {QUIET} processors. {versions}."
    )
    return "\n".join(lines) + "\n"


def summary(results):
    """One line per processor and network: the fastest other library in each kind of step, and how near the floor sast_jax is."""
    heads = "fastest other library, train steps | SAST steps | inference | share of the floor, %: train / SAST / inference"
    lines = [f"| processor | network | {heads} |", "|---" * 6 + "|"]
    for one in results:
        for workload, table in one["workloads"].items():
            rows = {name: row for name, row in table["rows"].items() if name != "sast_jax"}
            cells, reached = [], []
            for kind in KINDS:
                own = table["rows"]["sast_jax"][kind]["milliseconds"][1]
                reached.append(f"{100 * table['floor'][kind]['milliseconds'] / own:.0f}")
                ratios = {name: row[kind]["ratio"] for name, row in rows.items() if kind in row}
                if not ratios:
                    cells.append("none measured")
                    continue
                nearest = min(ratios, key=lambda name: ratios[name][1])
                low, ratio, high = ratios[nearest]
                cells.append(f"{nearest.removeprefix('plain PyTorch, ')} {ratio:.2f} ({low:.2f} - {high:.2f})")
            lines.append(f"| {one['environment']['device']} | {workload} | {' | '.join(cells)} | {' / '.join(reached)} |")
    return "\n".join(lines) + "\n"


def device_name():
    """Of the GPU, or the processor."""
    if ON_GPU:
        return subprocess.check_output(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], text=True).splitlines()[0]
    return processor()


def main():
    """Measures, then prints and writes the tables."""
    parser = Parser(__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=3, help="timed in a round")
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=list(LIBRARIES))
    parser.add_argument("--workloads", type=int, nargs="+", choices=range(len(WORKLOADS)), default=range(len(WORKLOADS)))
    args = parser.parse_args()
    versions = {}
    for package in PACKAGES:
        if importlib.util.find_spec(package):
            versions[package] = importlib.metadata.version(package)
    rounds, warm_up = (2, 0.0) if args.small else (args.rounds, WARM_UP)
    environment = {"device": device_name(), "cores": CORES, "rounds": rounds, "steps": args.steps, "versions": versions}
    libraries = ["sast_jax", *(name for name in args.libraries if name != "sast_jax")]
    workloads = list(SMALL) if args.small else [list(WORKLOADS)[number] for number in args.workloads]
    tables = {}
    # A CPU is left to one at a time; beside a GPU there are cores enough, and compiling would take most of the time.
    with ThreadPoolExecutor(CORES if ON_GPU else 1) as libraries_pool, ThreadPoolExecutor() as workloads_pool:
        prepared = {name: workloads_pool.submit(prepare, name, libraries, libraries_pool) for name in workloads if ON_GPU}
        for name in workloads:
            children, rows = prepared[name].result() if ON_GPU else prepare(name, libraries, libraries_pool)
            print(name, flush=True)
            wait(prepared.values())
            tables[name] = measure(name, children, rows, rounds, args.steps, warm_up)
            if ON_GPU:  # Time may be over before all is measured.
                results = {"environment": environment, "workloads": tables}
                publish("peers_gpu", results, markdown(tables, environment), args.output)
    if ON_GPU:
        return
    one = {"environment": environment, "workloads": tables}
    if args.small or ({*libraries} == {*LIBRARIES} and {*workloads} == {*WORKLOADS}):
        number = "_".join(re.findall(r"\d+", device_name().rpartition("(")[2]))
        publish(f"peers_cpu_{number}", one, markdown(tables, environment), args.output)
        results = [json.loads(file.read_text()) for file in sorted(args.output.glob("peers_cpu_*.json"))]
        devices = [one["environment"]["device"] for one in results]
        publish("peers", {"tables": devices}, summary(results), args.output)
    else:
        print(markdown(tables, environment), summary([one]), sep="\n")


if __name__ == "__main__":
    main()
