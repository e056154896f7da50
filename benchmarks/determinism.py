r"""What the same seed gives elsewhere: in another process, on fewer threads, under other versions of Python and jax.

    python benchmarks/determinism.py --pythons=PYTHON,PYTHON

Trains a dense network under SAST on simulated digits, each time in a process of its own, and compares the final weights with
those of the first. `--pythons` are further interpreters that have the package's dependencies. Writes
`benchmarks/results/determinism.json` and `.md`, and the table into `docs/results/reliability.md`.
"""

import json
import os
import subprocess
import sys
import tempfile

import numpy as np
from publish import ROOT, Parser, publish

EPOCHS = (1, 8)

CHILD = """
import json, sys
import numpy as np
import jax
import sast_jax
from sast_jax.config import load_configs
from sast_jax.training.run import environment
weights, accuracy = [], []
for epochs in map(int, sys.argv[2:]):
    workdir = f"{sys.argv[1]}/{epochs}"
    fields = ["network.kind=mlp", "network.features=64", "dataset.num_time_steps=5", f"num_epochs={epochs}"]
    (config,) = load_configs("configs/digits.py:sast", fields).values()
    accuracy.append(sast_jax.train_and_evaluate(config, workdir)["hard_accuracy"])
    leaves = jax.device_get(jax.tree.leaves(sast_jax.load_run(workdir).params))
    weights.append(np.concatenate([leaf.ravel() for leaf in leaves]))
np.save(f"{sys.argv[1]}/weights.npy", weights)
print(json.dumps({"environment": environment(), "python": sys.version.split()[0], "hard_accuracy": accuracy}))
"""


def train(workdir, epochs, python=sys.executable, *, one_thread=False):
    """Trains in a process of its own, and returns its weights, a row per number of epochs, and what it says of itself."""
    command = ["taskset", "--cpu-list", "0"] * one_thread + [python, "-c", CHILD, str(workdir), *map(str, epochs)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return np.load(f"{workdir}/weights.npy"), json.loads(done.stdout.splitlines()[-1])


def main():
    """Trains everywhere, and writes the table."""
    parser = Parser(__doc__)
    parser.add_argument("--pythons", default="", help="paths, separated by commas")
    args = parser.parse_args()
    epochs = EPOCHS[:1] if args.small else EPOCHS
    places = {"same again": {}, "one thread": {"one_thread": True}}
    places |= {path: {"python": path} for path in args.pythons.split(",") if path}
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        expected, reference = train(f"{folder}/first", epochs)
        for index, (place, options) in enumerate(places.items()):
            weights, said = train(f"{folder}/{index}", epochs, **options)
            name = f"Python {said['python']}, jax {said['environment']['jax']}" if "python" in options else place
            rows[name] = said | {
                "equal": [bool((a == b).all()) for a, b in zip(weights, expected, strict=True)],
                "relative_difference": (np.linalg.norm(weights - expected, axis=1) / np.linalg.norm(expected, axis=1)).tolist(),
                "hard_points": 100 * (said["hard_accuracy"][-1] - reference["hard_accuracy"][-1]),
            }
    versions = f"Python {reference['python']} and jax {reference['environment']['jax']}"
    header = [f"weights after {number} epoch{'s' * (number > 1)}" for number in epochs]
    lines = [
        f"| compared with {versions} | {' | '.join(header)} | hard-spike accuracy then, points |",
        "|---" * (2 + len(epochs)) + "|",
    ]
    for name, row in rows.items():
        cells = ["equal" if equal else f"{d:.1e}" for equal, d in zip(row["equal"], row["relative_difference"], strict=True)]
        lines.append(f"| {name} | {' | '.join(cells)} | {row['hard_points']:+.1f} |")
    lines.append(
        f"\nDifference of all weights, relative to their norm; {reference['environment']['num_cores']} CPU cores otherwise."
    )
    publish("determinism", {"reference": reference, "places": rows}, "\n".join(lines) + "\n", args.output)


if __name__ == "__main__":
    main()
