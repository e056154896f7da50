r"""What of SAST's effect remains when fewer or smaller perturbation batches are paid for.

    python benchmarks/cheaper_sast.py --config=configs/digits.py --workdir=runs/transfer_gap_digits --rho=0.2 \
        --schedules=quarter_batch,every_4,last_quarter
    python benchmarks/cheaper_sast.py --config=configs/nmnist.py --workdir=runs/transfer_gap_nmnist --rho=0.2 \
        --schedules=quarter_batch,every_4,last_quarter --config.dataset.root=FOLDER

Baseline and SAST are those of `transfer_gap.py`, found there if the folder is the same; `--rho` is the radius of all. Writes
`benchmarks/results/cheaper_sast_<config>.json` and `.md`, and the table into the README.
"""

from publish import publish
from transfer_gap import caption, describe, make_parser, parse, table, train

SCHEDULES = {
    "quarter_batch": ("perturbation batch of 8 instead of 32", {"sam.perturbation_batch_size": 8}),
    "every_4": ("every 4th step", {"sam.every_steps": 4}),
    "last_quarter": ("last quarter of the steps", {"sam.start": 0.75}),
    "last_half_half_batch": ("last half, batch of 16", {"sam.start": 0.5, "sam.perturbation_batch_size": 16}),
    "every_2_quarter_batch": ("every 2nd step, batch of 8", {"sam.every_steps": 2, "sam.perturbation_batch_size": 8}),
}


def main():
    """Trains, and writes the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--rho", type=float, required=True)
    parser.add_argument("--schedules", default=",".join(SCHEDULES), help="names, separated by commas; all by default")
    args, overrides = parse(parser)

    names = args.schedules.split(",")
    fields = {"baseline": {}, "sast": {"sam.rho": args.rho}}
    fields |= {name: {"sam.rho": args.rho, **SCHEDULES[name][1]} for name in names}
    titles = {"baseline": "baseline, no SAM", "sast": "SAST, every step, batch of 32"}
    titles |= {name: SCHEDULES[name][0] for name in names}
    runs = {}
    for seed in args.seeds:
        for method, own in fields.items():
            variant = "baseline" if method == "baseline" else "sast"
            runs.setdefault(method, []).append(train(args, overrides, variant, seed, **own))
    results = {"rho": args.rho, **describe(args, overrides, runs)}
    text = f"Radius {args.rho:g} throughout. {caption(results)} Training time includes compilation and validation."
    rows = table(results["methods"], titles, ("seconds", "training time"))
    publish(f"cheaper_sast_{results['name']}", results, f"{rows}\n{text}\n")


if __name__ == "__main__":
    main()
