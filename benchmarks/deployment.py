r"""What deployment costs: where the gap arises, what calibration removes, few bits, operations, corrupted recordings.

    python benchmarks/deployment.py --config=configs/digits.py --workdir=runs/transfer_gap_digits --rho=0.2
    python benchmarks/deployment.py --config=configs/nmnist.py --workdir=runs/transfer_gap_nmnist --rho=0.2 \
        --config.dataset.root=FOLDER

The runs are those of `transfer_gap.py`, found there if the folder is the same, and trained if they are not; `--rho` is SAST's
radius. All suites of `sast-jax evaluate` are taken from a run's `evaluation.json`, or measured. Calibration is decided on the
validation part. Writes `benchmarks/results/deployment_<config>.json` and `.md`, and `deployment_summary_<config>`.
"""

import numpy as np
from publish import publish
from transfer_gap import METHODS, describe, make_parser, parse, run_name, train

from sast_jax.evaluation.suites import SUITES, evaluate_run, parse_suites
from sast_jax.training.records import EVALUATION, read_record

CALIBRATIONS = {
    "none": "none: the swap alone",
    "threshold_layer": "thresholds, one a layer, to the surrogate's mean output",
    "threshold_channel": "thresholds, one a channel, likewise",
    "gain_layer": "gains, one a layer, likewise",
    "gain_channel": "gains, one a channel, likewise",
    "search_layer": "threshold and gain of each layer, by search",
    "gradient_channel": "threshold and gain of each channel, by gradient",
    "chosen": "of the first five, the one of the lowest validation loss",
}


def evaluate(args, overrides, name):
    """Returns the evaluation of a run."""
    workdir = args.workdir / name
    missing = [suite for suite in args.suites if suite not in (read_record(workdir / EVALUATION) or {})]
    root = [text for text in overrides if text.startswith("dataset.root=")]
    if missing:
        evaluate_run(workdir, missing, root, lambda text: print(f"{name}: {text}", flush=True))
    evaluation = read_record(workdir / EVALUATION)
    if "calibration" in args.suites:
        methods = evaluation["calibration"]["methods"]
        methods["chosen"] = methods[evaluation["calibration"]["chosen"]]
    return {suite: evaluation[suite] for suite in args.suites}


def spread(values, scale=100.0, digits=1):
    """Mean and standard error, in percent if nothing else is said."""
    values = scale * np.asarray(values, float)
    error = f" ± {np.std(values, ddof=1) / np.sqrt(len(values)):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{error}"


def rows_of(header, rows):
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def each(runs, *path):
    """The values of all seeds behind keys, or what a function makes of an evaluation."""
    values = []
    for run in runs:
        for key in path:
            run = key(run) if callable(key) else run[key]
        values.append(run)
    return values


def layer_swap(evaluations, titles):
    """Accuracy by which layers are in hard mode."""
    first = next(iter(evaluations.values()))[0]["transfer"]["layer_swap"]
    orders = [(order, i) for order in ("prefix", "single") for i in range(len(first[order]))]
    seen, kept = set(), []
    for order, i in orders:
        names = tuple(first[order][i]["hard"])
        if names not in seen:
            seen.add(names)
            kept.append((order, i, " + ".join(names) or "none"))
    header = ["training", *(f"hard: {names}" for _, _, names in kept), "decisions alike"]
    rows = [
        [
            titles[method],
            *(spread(each(runs, "transfer", "layer_swap", order, i, "accuracy")) for order, i, _ in kept),
            spread(each(runs, "transfer", "agreement", "decisions")),
        ]
        for method, runs in evaluations.items()
    ]
    return rows_of(header, rows)


def calibration(evaluations, titles):
    """Hard-spike accuracy by calibration, and what it removes of the baseline's gap."""
    baseline = evaluations["baseline"]
    surrogate = np.mean(each(baseline, "calibration", "surrogate", "accuracy"))
    swapped = np.mean(each(baseline, "calibration", "methods", "none", "accuracy"))

    def removed(name):
        accuracy = np.mean(each(baseline, "calibration", "methods", name, "accuracy"))
        return f"{100 * (accuracy - swapped) / (surrogate - swapped):.0f} %" if surrogate > swapped else "-"

    def cells(*path):
        return [spread(each(runs, "calibration", *path)) for runs in evaluations.values()]

    rows = [[title, *cells("methods", name, "accuracy"), removed(name)] for name, title in CALIBRATIONS.items()]
    smooth = ["(smooth spikes)", *cells("surrogate", "accuracy"), ""]
    accuracy = rows_of(["calibration of the hard network", *titles.values(), "baseline's gap removed"], [smooth, *rows])
    rows = [
        [f"{what}, {title}", *cells(*path, key)]
        for what, path in (
            ("smooth", ("surrogate",)),
            ("hard", ("methods", "none")),
            ("hard, calibrated", ("methods", "chosen")),
        )
        for title, key in (("as it is", "ece"), ("with temperature", "scaled_ece"))
    ]
    confidence = rows_of(["expected calibration error, %", *titles.values()], rows)
    return f"{accuracy}\n{confidence}"


def configuration(index):
    """A path to a configuration; -1 is the network in floats."""
    return ("quantization", "float") if index < 0 else ("quantization", "configurations", index)


def num_operations(counted):
    """Effective operations, accumulations and multiplications together."""
    return counted["effective_acs"] + counted["effective_macs"]


def quantization(evaluations, titles):
    """Accuracy, operations and memory by number of bits."""
    one = evaluations["baseline"][0]["quantization"]
    names = [
        "float32",
        *(f"INT{c['weight_bits']} per {c['granularity']}, decay as {c['decay_form']}" for c in one["configurations"]),
    ]
    rows = []
    for index, name in enumerate(names, -1):
        path = configuration(index)
        row = one["float"] if index < 0 else one["configurations"][index]
        cells = [
            f"{spread(each(runs, *path, 'accuracy'))} <br><sub>"
            f"{spread(each(runs, *path, 'synops', num_operations), 1e-3, 0)} k</sub>"
            for runs in evaluations.values()
        ]
        rows.append([name, *cells, f"{row['memory']['weights'] / 1024:.1f}", f"{row['memory']['total'] / 1024:.1f}"])
    equal = all(
        c["reference"]["equal"] for runs in evaluations.values() for run in runs for c in run["quantization"]["configurations"]
    )
    table = rows_of(["weights", *titles.values(), "weights, KiB", "with potentials, KiB"], rows)
    return f"{table}\nEvery configuration of every run equals the NumPy reference bit for bit: {'yes' if equal else 'NO'}.\n"


def synops(evaluations, titles):
    """Operations per recording, in thousands."""
    keys = {"effective_acs": "effective ACs", "effective_macs": "effective MACs", "event_acs": "ACs by events", "dense": "dense"}
    rows = [
        [
            titles[method],
            *(spread(each(runs, "synops", key), 1e-3, 0) for key in keys),
            spread(each(runs, "synops", "activation_sparsity")),
        ]
        for method, runs in evaluations.items()
    ]
    return rows_of(["training", *(f"{title}, thousands" for title in keys.values()), "activation sparsity, %"], rows)


def robustness(evaluations, titles):
    """Area under accuracy over severity, in both modes."""
    kinds = evaluations["baseline"][0]["robustness"]["area"]
    header = ["corruption", *(f"{title}, {mode}" for title in titles.values() for mode in ("smooth", "hard"))]
    rows = [
        [
            kind,
            *(
                spread(each(runs, "robustness", "area", kind, mode))
                for runs in evaluations.values()
                for mode in ("surrogate", "hard")
            ),
        ]
        for kind in kinds
    ]
    return rows_of(header, rows)


def summarize(evaluations, titles):
    """The summary: a row a training, a column for each thing that was evaluated."""
    one = evaluations["baseline"][0]
    columns = {
        "smooth, %": ("transfer", "surrogate_accuracy"),
        "hard, %": ("transfer", "hard_accuracy"),
        "hard, calibrated, %": ("calibration", "methods", "chosen", "accuracy"),
    }
    for index, row in enumerate(one["quantization"]["configurations"] if "quantization" in one else ()):
        if (row["granularity"], row["decay_form"]) == ("channel", "fraction"):
            columns[f"INT{row['weight_bits']}, %"] = (*configuration(index), "accuracy")
    columns["corrupted, %"] = ("robustness", "area", "mean", "hard")
    columns["operations, thousands"] = ("synops", num_operations)
    columns = {title: path for title, path in columns.items() if path[0] in one}
    scales = {("synops", num_operations): (1e-3, 0)}
    rows = [
        [titles[method], *(spread(each(runs, *path), *scales.get(path, ())) for path in columns.values())]
        for method, runs in evaluations.items()
    ]
    return rows_of(["training", *columns], rows)


def main():
    """Evaluates, and writes the tables."""
    parser = make_parser(__doc__)
    parser.add_argument("--rho", type=float, required=True)
    parser.add_argument("--suites", type=parse_suites, default=list(SUITES), help="names, separated by commas; all by default")
    args, overrides = parse(parser)

    fields = {method: {"sam.rho": args.rho} if method == "sast" else {} for method in METHODS}
    runs, evaluations = {}, {}
    for seed in args.seeds:
        for method, own in fields.items():
            runs.setdefault(method, []).append(train(args, overrides, method, seed, **own))
            evaluations.setdefault(method, []).append(evaluate(args, overrides, run_name(method, seed, **own)))
    titles = METHODS | {"sast": f"SAST, rho {args.rho:g}"}
    results = {"rho": args.rho, **describe(args, overrides, runs), "evaluations": evaluations}
    data, seeds = results["data"], ", ".join(map(str, args.seeds))
    text = (
        f"Mean ± standard error over seeds {seeds}; {data['num_train']} training, {data['num_validation']} validation and "
        f"{data['num_test']} test recordings."
    )
    sections = {
        "transfer": ("Where the gap arises: test accuracy, %, by the layers that are in hard mode", layer_swap),
        "calibration": ("Calibration of the hard network with frozen weights: test accuracy, %", calibration),
        "quantization": ("Integer inference: test accuracy, %, below it thousands of effective operations", quantization),
        "synops": ("Synaptic operations of the hard network per recording, as NeuroBench counts them", synops),
        "robustness": ("Corrupted test recordings: mean accuracy, %, over severities 0 to 5", robustness),
    }
    page = "".join(f"\n### {sections[suite][0]}\n\n{sections[suite][1](evaluations, titles)}" for suite in args.suites)
    notes = {
        "calibration": "Calibrated: thresholds and gains without labels, by the method of the lowest validation loss.",
        "quantization": "Integers: hard network as trained, potentials of 16 bits, one scale per channel.",
        "synops": "Operations per recording: NeuroBench's effective ACs and MACs.",
        "robustness": "Corrupted: hard spikes, mean over 8 kinds and severities 0 to 5.",
    }
    summary = " ".join([text, *(note for suite, note in notes.items() if suite in args.suites)])
    publish(f"deployment_{results['name']}", results, f"{text}\n{page}", args.output)
    summary = f"{summarize(evaluations, titles)}\n{summary}\n"
    publish(f"deployment_summary_{results['name']}", {"rho": args.rho}, summary, args.output)


if __name__ == "__main__":
    main()
