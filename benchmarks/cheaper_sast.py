r"""What of SAST's effect remains when less is paid for the perturbation.

    python benchmarks/cheaper_sast.py --config=configs/digits.py --workdir=runs/cheaper_digits --rho=0.2 \
        --schedules=quarter_batch,eighth_batch,every_4,warm_start,warm_start_plain --config.network.slope=1.5
    python benchmarks/cheaper_sast.py --config=configs/nmnist.py --workdir=runs/transfer_gap_nmnist --rho=0.2 \
        --config.dataset.root=FOLDER

Baseline and SAST are those of `transfer_gap.py`, found there if the folder is the same; `--rho` is the radius of all. Costs are
measured apart from the trainings: the schedules take turns, each with a run of eight steps, and a cost is the median, over
the rounds, of its time over that of the baseline. Writes `benchmarks/results/cheaper_sast_<config>.json` and `.md`, and the
table into its page.
"""

import time
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
from publish import publish
from transfer_gap import caption, describe, load, make_parser, parse, table, train

from sast_jax.data import take_batch
from sast_jax.training import init_state, make_train_step
from sast_jax.training.build import load_data, make_network, make_optimizer, sam_schedule

WARM = "from the trained baseline, "

SCHEDULES = {
    "half_batch": ("batch of 16", {"sam.perturbation_batch_size": 16}),
    "quarter_batch": ("batch of 8", {"sam.perturbation_batch_size": 8}),
    "eighth_batch": ("batch of 4", {"sam.perturbation_batch_size": 4}),
    "every_4": ("every 4th step", {"sam.every_steps": 4}),
    "every_2_half_batch": ("every 2nd step, batch of 16", {"sam.every_steps": 2, "sam.perturbation_batch_size": 16}),
    "every_2_quarter_batch": ("every 2nd step, batch of 8", {"sam.every_steps": 2, "sam.perturbation_batch_size": 8}),
    "last_quarter": ("last quarter of the steps", {"sam.start": 0.75}),
    "warm_start": (f"{WARM}an eighth of its epochs", {"num_epochs": Fraction(1, 8)}),
    "warm_start_plain": (f"{WARM}a quarter of its epochs without SAM", {"num_epochs": Fraction(1, 4), "sam.rho": 0.0}),
}
"""Title and fields by name; `num_epochs` is a share of the baseline's, whose weights such a schedule begins with."""

NUM_STEPS = 8  # Of a timed run: every schedule has its share of perturbed steps in them.
NUM_ROUNDS = 12


class Timed:
    """Runs of a few steps by the schedule of a config, their batches drawn beforehand."""

    def __init__(self, config):
        """Compiles what the steps need."""
        splits = load_data(config)
        network, tx = make_network(config, splits.num_classes), make_optimizer(config, NUM_STEPS)
        size = config.sam.perturbation_batch_size or config.batch_size
        self.perturbs = sam_schedule(config, NUM_STEPS)
        self.descent, self.perturbation = (take_batch(splits.train, np.arange(n)) for n in (config.batch_size, size))
        self.initial = init_state(network, tx, self.descent.frames, seed=0)
        self.step = make_train_step(network, tx, config.mode)
        self.run()

    def run(self):
        """Returns the seconds of a run."""
        state = jax.block_until_ready(jax.tree.map(jnp.copy, self.initial))
        start = time.perf_counter()
        for step in range(NUM_STEPS):
            state, _ = self.step(state, self.descent, self.perturbation if self.perturbs(step) else None)
        jax.block_until_ready(state)
        return time.perf_counter() - start


def measure_costs(configs):
    """Returns, by name, the times of all rounds over those of the baseline."""
    timed = {name: Timed(config) for name, config in configs.items()}
    rounds = [{name: each.run() for name, each in timed.items()} for _ in range(NUM_ROUNDS)]
    return {name: [round(each[name] / each["baseline"], 4) for each in rounds] for name in timed}


def markdown(results):
    """The results as a table, with what its numbers are."""
    titles = {"baseline": "baseline, no SAM", "sast": "SAST, every step, batch of 32"}
    titles |= {name: title for name, (title, _) in SCHEDULES.items()}
    ratios = {name: float(np.median(each)) for name, each in results["cost_ratios"].items()}
    settings = "".join(f" Set: {text}." for text in results["overrides"])
    text = (
        f"Radius {results['rho']:g} throughout.{settings} {caption(results)} Time: {NUM_STEPS} steps by each schedule in turn, "
        f"median of {NUM_ROUNDS} rounds; a warm start's includes the baseline's training, and its epochs are rounded."
    )
    return f"{table(results['methods'], titles, ('time', ratios))}\n{text}\n"


def main():
    """Trains, and writes the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--rho", type=float, required=True)
    parser.add_argument("--schedules", default=",".join(SCHEDULES), help="names, separated by commas; all by default")
    args, overrides = parse(parser)

    num_epochs = load(args, overrides, "baseline").num_epochs
    fields = {"baseline": {}, "sast": {"sam.rho": args.rho}}
    fields |= {name: {"sam.rho": args.rho, **SCHEDULES[name][1]} for name in args.schedules.split(",")}
    shares = {name: own["num_epochs"] for name, own in fields.items() if "num_epochs" in own}
    fields |= {name: {**fields[name], "num_epochs": max(1, round(num_epochs * share))} for name, share in shares.items()}
    shares = {name: fields[name]["num_epochs"] / num_epochs for name in shares}
    variants = {name: "baseline" if name == "baseline" else "sast" for name in fields}

    costs = measure_costs({name: load(args, overrides, variants[name], **own) for name, own in fields.items()})
    costs |= {name: [1 + share * ratio for ratio in costs[name]] for name, share in shares.items()}
    runs = {}
    for seed in args.seeds:
        for name, own in fields.items():
            warm = {"warm_start": str(args.workdir / f"baseline-seed{seed}")} if name in shares else {}
            runs.setdefault(name, []).append(train(args, overrides, variants[name], seed, **own, **warm))
    results = {"rho": args.rho, **describe(args, overrides, runs), "cost_ratios": costs}
    publish(f"cheaper_sast_{results['name']}", results, markdown(results), args.output)


if __name__ == "__main__":
    main()
