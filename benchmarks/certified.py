r"""What it costs to keep every layer contracting, by each of the ways there are.

    python benchmarks/certified.py --config=configs/digits.py --workdir=runs/certified --rho=0.2 --seeds=0,1,2 \
        --config.network.kind=mlp --config.network.features=128,64

A network with steep surrogates does not contract. It does with the largest slope, or the largest decay, whose contraction
factor is `1 - margin` over all reals, or with its currents capped at every step (`certified.margin`). Each is trained with and
without SAM; what is trained already in the folder is not repeated. Writes `benchmarks/results/certified_<config>.json` and
`.md`, and the table into `docs/results/theory.md`.
"""

import math
from pathlib import Path

from axes import show
from publish import publish
from scipy.optimize import brentq
from transfer_gap import load, make_parser, parse, summary, train

from sast_jax.theory.neuron import contraction_factor


def settings(network, steep, margin):
    """The rows: their names and the config fields they set; numbers are rounded down to three digits."""
    neuron = {key: network[key] for key in ("decay", "threshold", "reset", "family", "slope")}

    def excess(slope):
        return float(contraction_factor(**neuron | {"slope": slope})) - (1 - margin)

    slope = math.floor(1e3 * brentq(excess, network.slope, steep)) / 1e3
    decay = math.floor(1e3 * (1 - margin) / float(contraction_factor(**neuron | {"slope": steep, "decay": 1.0}))) / 1e3
    return {
        f"slope {network.slope:g}, as configured": {},
        f"slope {steep:g}, free": {"network.slope": steep},
        f"slope {slope:g}, the largest that contracts": {"network.slope": slope},
        f"slope {steep:g}, decay {decay:g}, the largest that contracts": {"network.slope": steep, "network.decay": decay},
        f"slope {steep:g}, currents capped": {"network.slope": steep, "certified.margin": margin},
    }


def main():
    """Trains, and writes the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--rho", type=float, required=True)
    parser.add_argument("--slope", type=float, default=10.0, help="of the network that does not contract")
    parser.add_argument("--margin", type=float, default=0.05)
    args, overrides = parse(parser)

    rows = {}
    for name, fields in settings(load(args, overrides, "baseline").network, args.slope, args.margin).items():
        network = load(args, overrides, "baseline", **fields).network
        neuron = {key: network[key] for key in ("decay", "threshold", "reset", "family", "slope")}
        rows[name] = {"fields": fields, "contraction_factor": float(contraction_factor(**neuron)), "runs": {}}
    for seed in args.seeds:
        for row in rows.values():
            for variant, own in {"baseline": {}, "sast": {"sam.rho": args.rho}}.items():
                row["runs"].setdefault(variant, []).append(train(args, overrides, variant, seed, **own, **row["fields"]))
    one = next(iter(rows.values()))["runs"]["sast"][0]
    results = {
        "name": Path(args.config).stem,
        "rho": args.rho,
        "margin": args.margin,
        "overrides": [text for text in overrides if not text.startswith("dataset.root")],
        "seeds": args.seeds,
        "data": {key: one[key] for key in ("num_train", "num_validation", "num_test")},
        "environment": one["environment"],
        "rows": {
            name: {
                "fields": row["fields"],
                "contraction_factor": row["contraction_factor"],
                **{variant: summary(runs) for variant, runs in row["runs"].items()},
            }
            for name, row in rows.items()
        },
    }
    publish(f"certified_{results['name']}", results, markdown(results), args.output)


def markdown(results):
    """A row per setting, with the contraction factor over all reals and over what the capped currents can reach."""
    columns = [(variant, key) for variant in ("baseline", "sast") for key in ("surrogate", "hard", "gap")]
    lines = [
        "| neurons | contraction factor | surrogate, % | hard, % | gap, points | SAST: surrogate, % | hard, % | gap, points |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in results["rows"].items():
        factor = f"{row['contraction_factor']:.2f}"
        if "certified.margin" in row["fields"]:
            factor = f"{1 - row['fields']['certified.margin']:.2f} where currents reach, {factor} elsewhere"
        lines.append(f"| {name} | {factor} | " + " | ".join(show(row[variant], key) for variant, key in columns) + " |")
    data, seeds = results["data"], ", ".join(map(str, results["seeds"]))
    fields = ", ".join(results["overrides"]) or "no other field"
    text = (
        f"Test accuracy, mean ± standard error over seeds {seeds}; {data['num_train']} training and {data['num_test']} test "
        f"recordings; {results['name']}.py with {fields} and what the rows say. SAST has radius {results['rho']:g} throughout."
    )
    return "\n".join(lines) + f"\n\n{text}\n"


if __name__ == "__main__":
    main()
