"""Accuracy, gap and time of training with products in bfloat16 beside float32, seed by seed.

    python benchmarks/precision.py --config=configs/digits.py --workdir=runs/precision --config.num_epochs=10

Weights, potentials and the optimizer are float32 in both. Finished runs are not repeated. Writes
`benchmarks/results/precision_<config>.json` and `.md`, and the table into `docs/results/speed.md`.
"""

import numpy as np
from publish import publish
from transfer_gap import METHODS, caption, cell, describe, make_parser, parse, train

from sast_jax.networks import PRECISIONS


def markdown(results):
    """A row per training and precision; differences and ratios are within a seed."""
    lines = [
        "| training | products | surrogate accuracy, % | hard-spike accuracy, % | transfer gap, points | epoch time |",
        "|---|---|---|---|---|---|",
    ]
    for key, row in results["methods"].items():
        variant, precision = key.split()
        seconds = [results["methods"][name]["epoch_seconds"]["values"] for name in (key, f"{variant} {PRECISIONS[0]}")]
        cells = " | ".join(cell(row, each) for each in ("surrogate", "hard", "gap"))
        lines.append(f"| {METHODS[variant]} | {precision} | {cells} | {np.median(np.divide(*seconds)):.2f}x |")
    config = results["config"]
    text = f"{caption(results)} {config['num_epochs']} epochs, radius {config['sam']['rho']:g}; times are relative to float32."
    return "\n".join(lines) + f"\n\n{text}\n"


def main():
    """Trains and writes the table."""
    args, overrides = parse(make_parser(__doc__))
    runs = {}
    for seed in args.seeds:
        for variant in ("baseline", "sast"):
            for precision in PRECISIONS:
                found = train(args, overrides, variant, seed, **{"network.precision": precision})
                runs.setdefault(f"{variant} {precision}", []).append(found)
    results = describe(args, overrides, runs, example="sast float32")
    publish(f"precision_{results['name']}", results, markdown(results), args.output)


if __name__ == "__main__":
    main()
