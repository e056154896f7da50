r"""What the swap to hard spikes costs: baseline, SAST and straight-through training over several seeds.

    python benchmarks/transfer_gap.py --config=configs/digits.py --workdir=runs/transfer_gap_digits \
        --rhos=0.1,0.2,0.4,0.8 --seeds=0,1,2
    python benchmarks/transfer_gap.py --config=configs/nmnist.py --workdir=runs/transfer_gap_nmnist \
        --rhos=0.1,0.2,0.4 --seeds=0,1,2 --config.dataset.root=FOLDER

First the radius: SAST is trained with each of `--rhos` and each of `--selection-seeds`, and the radius of the highest mean
hard-spike accuracy on the validation part is taken (the smaller one of equals). Then all three are trained with `--seeds`,
which are others, and evaluated on the test part. Finished runs are not repeated, so the command can be stopped and started
again. Writes `benchmarks/results/transfer_gap_<config>.json`, `.md` and `.png`, and the table into its page.
"""

import json
from pathlib import Path

import numpy as np
from publish import Parser, publish

from sast_jax.allocator import keep_freed_memory
from sast_jax.config import load_configs
from sast_jax.devices import split_cpu
from sast_jax.experiments.statistics import summarize
from sast_jax.training import train_and_evaluate
from sast_jax.training.processes import Workers

METHODS = {
    "baseline": "surrogate-forward, no SAM",
    "sast": "SAST, independent batch",
    "straight_through": "straight-through, no SAM",
}

PAPER = {
    "nmnist": "For reference, the papers report for their own network on N-MNIST (not measured here): hard-spike accuracy "
    "65.7 % to 94.7 %, gap 30.3 to 2.5 points, epoch time 2.08x."
}

SMALL = ("network.features=4,4", "dataset.num_time_steps=3", "dataset.downsample=2", "num_epochs=1")
"""What `--small` sets of the config."""


def numbers(text):
    """Parses `1,2,3`: one number at least."""
    found = tuple(json.loads(f"[{text}]"))
    if not found:
        raise ValueError
    return found


def make_parser(description):
    """The arguments that all tables of runs share; `--config.section.key=value` may follow."""
    parser = Parser(description)
    parser.add_argument("--config", required=True, help="config file with the variants baseline, sast and straight_through")
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument("--seeds", type=numbers, default=(0, 1, 2))
    return parser


def parse(parser):
    """Returns the arguments and the overrides of the config."""
    keep_freed_memory()
    split_cpu()
    args, rest = parser.parse_known_args()
    return args, [*(SMALL if args.small else ()), *(text.removeprefix("--config.") for text in rest)]


def load(args, overrides, variant, **fields):
    """Returns the config of a variant with `fields`."""
    (config,) = load_configs(
        f"{args.config}:{variant}", [*overrides, *(f"{key}={value}" for key, value in fields.items())]
    ).values()
    return config


def train(args, overrides, variant, seed, **fields):
    """Trains a variant, or finds it trained, and returns its results."""
    name = run_name(variant, seed, **fields)
    return train_and_evaluate(load(args, overrides, variant, seed=seed, **fields), args.workdir / name, title=name)


def train_ahead(args, overrides, jobs):
    """Trains runs, given by variant, seed and fields, side by side if `--processes` says so; `train` then finds them trained."""
    if args.processes > 1:
        names = [run_name(variant, seed, **fields) for variant, seed, fields in jobs]
        configs = [load(args, overrides, variant, seed=seed, **fields) for variant, seed, fields in jobs]
        with Workers(args.processes) as workers:
            workers.train(configs, [args.workdir / name for name in names], titles=names, report=lambda i, _: print(names[i]))


def run_name(variant, seed, **fields):
    """Returns the name of a run's folder."""
    words = (f"{key.rpartition('.')[2]}{Path(value).name if key == 'warm_start' else value}" for key, value in fields.items())
    return "-".join([variant, f"seed{seed}", *words])


def describe(args, overrides, runs, example="sast"):
    """What any table of runs by method needs to be understood and made again; the config is that of an example."""
    one = runs[example][0]
    return {
        "name": Path(args.config).stem,
        "overrides": [text for text in overrides if not text.startswith("dataset.root")],
        "seeds": args.seeds,
        "data": {key: one[key] for key in ("num_train", "num_validation", "num_test")},
        "environment": one["environment"],
        "methods": {method: summary(each) for method, each in runs.items()},
        "config": {**one["config"], "dataset": {**one["config"]["dataset"], "root": ""}},
    }


def select_rho(args, overrides):
    """Returns the mean validation accuracies by radius and the radius of the highest hard-spike accuracy."""
    rows = {}
    for rho in args.rhos:
        runs = [train(args, overrides, "sast", seed, **{"sam.rho": rho})["validation"] for seed in args.selection_seeds]
        rows[rho] = {key: float(np.mean([run[key] for run in runs])) for key in ("surrogate_accuracy", "hard_accuracy")}
    return rows, max(rows, key=lambda rho: (round(rows[rho]["hard_accuracy"], 6), -rho))


def summary(runs):
    """Means, standard errors and the values of all seeds, of accuracies in percent and costs."""
    values = {
        "surrogate": [100 * run["surrogate_accuracy"] for run in runs],
        "hard": [100 * run["hard_accuracy"] for run in runs],
        "gap": [100 * run["transfer_gap"] for run in runs],
        "gradient_evaluations": [
            run["num_gradient_evaluations"] + run.get("warm_start_cost", {}).get("num_gradient_evaluations", 0) for run in runs
        ],
        "epoch_seconds": [run["median_epoch_seconds"] for run in runs],
        "seconds": [run["wall_time_seconds"] for run in runs],
    }
    return {key: summarize([round(float(value), 4) for value in each]) for key, each in values.items()}


def cell(row, key):
    """Mean, standard error and the values of all seeds."""
    error = row[key]["standard_error"]
    seeds = ", ".join(f"{value:.1f}" for value in row[key]["values"])
    return f"{row[key]['mean']:.1f}{'' if error is None else f' ± {error:.1f}'} <br><sub>{seeds}</sub>"


def table(methods, titles, time):
    """Rows of results by method, costs relative to the baseline; `time` is the heading and the ratios by method."""
    heading, ratios = time
    lines = [
        f"| training | surrogate accuracy, % | hard-spike accuracy, % | transfer gap, points | gradients | {heading} |",
        "|---|---|---|---|---|---|",
    ]
    baseline = methods["baseline"]
    for name, row in methods.items():
        gradients = row["gradient_evaluations"]["mean"] / baseline["gradient_evaluations"]["mean"]
        cells = " | ".join(cell(row, each) for each in ("surrogate", "hard", "gap"))
        lines.append(f"| {titles[name]} | {cells} | {gradients:.3g}x | {ratios[name]:.2f}x |")
    return "\n".join(lines) + "\n"


def caption(results):
    """What the numbers of a table are."""
    data, environment = results["data"], results["environment"]
    seeds, (baseline, *_) = ", ".join(map(str, results["seeds"])), results["methods"].values()
    machine = f"{environment['num_cores']} {environment['device'].upper()} core{'s' * (environment['num_cores'] > 1)}"
    return (
        f"Mean ± standard error over seeds {seeds}, listed below it; {data['num_train']} training, {data['num_validation']} "
        f"validation and {data['num_test']} test recordings. A baseline run: {baseline['seconds']['mean']:.0f} s on {machine}."
    )


def markdown(results):
    """The results as a table."""
    titles = METHODS | {"sast": f"{METHODS['sast']}, rho {results['rho']:g}"}
    radius = (
        f"Radius chosen on the validation part with seeds {', '.join(map(str, results['selection_seeds']))} from "
        f"{', '.join(f'{float(rho):g}' for rho in results['selection'])}."
    )
    times = "Times are median ratios to the baseline of the same seed."
    text = " ".join(filter(None, [caption(results), times, radius, PAPER.get(results["name"])]))
    seconds = {name: row["epoch_seconds"]["values"] for name, row in results["methods"].items()}
    ratios = {name: float(np.median(np.divide(each, seconds["baseline"]))) for name, each in seconds.items()}
    return table(results["methods"], titles, ("epoch time", ratios)) + f"\n{text}\n"


def draw(results, path):
    """Both accuracies of every seed, joined per run, by training method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    colors = {"surrogate": "#8d99ae", "hard": "#d1495b"}
    for i, row in enumerate(results["methods"].values()):
        pairs = np.array([row["surrogate"]["values"], row["hard"]["values"]])
        axes.plot([i - 0.14, i + 0.14], pairs, color="#c8ccd4", linewidth=1, zorder=1)
        for offset, mode, values in ((-0.14, "surrogate", pairs[0]), (0.14, "hard", pairs[1])):
            axes.scatter(np.full(len(values), i + offset), values, s=22, color=colors[mode], alpha=0.55, linewidths=0, zorder=2)
            axes.plot([i + offset - 0.09, i + offset + 0.09], [values.mean()] * 2, color=colors[mode], linewidth=3, zorder=3)
            side = "right" if offset < 0 else "left"
            axes.annotate(
                f"{values.mean():.1f}", (i + 1.85 * offset, values.mean()), ha=side, va="center", fontsize=9, color=colors[mode]
            )
    axes.plot([], [], color=colors["surrogate"], linewidth=3, label="smooth spikes")
    axes.plot([], [], color=colors["hard"], linewidth=3, label="hard spikes, as deployed")
    titles = ["surrogate-forward", f"SAST, rho {results['rho']:g}", "straight-through"]
    axes.set_xticks(range(len(titles)), titles)
    axes.set_xlim(-0.6, len(titles) - 0.4)
    axes.set_ylabel("test accuracy, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e9ecef")
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    figure.savefig(path, dpi=160)


def main():
    """Selects, trains, and writes the table and the figure."""
    parser = make_parser(__doc__)
    parser.add_argument("--rhos", type=numbers, default=(0.1, 0.2, 0.4, 0.8))
    parser.add_argument("--selection-seeds", type=numbers, default=(100, 101))
    args, overrides = parse(parser)

    selection, rho = select_rho(args, overrides)
    runs = {}
    for seed in args.seeds:  # Methods take turns, so that a ratio of times compares neighbours.
        for method in METHODS:
            fields = {"sam.rho": rho} if method == "sast" else {}
            runs.setdefault(method, []).append(train(args, overrides, method, seed, **fields))
    results = {
        "selection": selection,
        "selection_seeds": args.selection_seeds,
        "rho": rho,
        **describe(args, overrides, runs),
    }
    name = f"transfer_gap_{results['name']}"
    publish(name, results, markdown(results), args.output)
    draw(results, args.output / f"{name}.png")


if __name__ == "__main__":
    main()
