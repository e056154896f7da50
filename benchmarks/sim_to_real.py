r"""Trained on simulated recordings alone, tested on real ones: N-MNIST, baseline, SAST and straight-through.

    python benchmarks/sim_to_real.py --config=configs/nmnist.py --workdir=runs/sim_to_real --images=FOLDER --root=FOLDER \
        --image-range=1000,60000 --seeds=0,1,2

Training recordings are simulated from MNIST's training images from 1000 on, by the recorder that `calibration.py` fitted to the
counts of the real ones, in one epoch. Recording k of N-MNIST shows
training image k - 1: the 900 real ones are of the images before 1000. They are all test; no choice was made by their accuracies
here. Finished runs are not repeated. Writes `benchmarks/results/sim_to_real.json` and `.md`.
"""

import itertools

import numpy as np
from publish import publish
from transfer_gap import METHODS, cell, describe, make_parser, numbers, parse, run_name, summary, train, train_ahead

from sast_jax import load_run
from sast_jax.data import Recordings, load_dataset
from sast_jax.evaluation.outputs import BATCH_SIZE
from sast_jax.evaluation.transfer import evaluate_transfer, make_eval_step

FIRST_FREE_IMAGE = 1000


def real_recordings(config, root):
    """All real recordings, of both parts of the folder."""
    same = {key: config[key] for key in ("num_time_steps", "binary", "downsample")}
    splits = load_dataset("nmnist", **same, num_validation=0, root=root)
    parts = splits.train, splits.test
    return Recordings(*(np.concatenate([getattr(part, field) for part in parts]) for field in ("frames", "labels", "ids")))


def markdown(results):
    """The results as a table."""
    titles = METHODS | {"sast": f"{METHODS['sast']}, rho {results['rho']:g}"}
    heads = ("surrogate, simulated", "hard, simulated", "surrogate, real", "hard, real", "gap, real")
    lines = [f"| training | {' | '.join(heads)} |", f"|---{'|---' * len(heads)}|"]
    for name, title in titles.items():
        simulated, real = results["methods"][name], results["real"][name]
        cells = [
            cell(simulated, "surrogate"),
            cell(simulated, "hard"),
            *(cell(real, key) for key in ("surrogate", "hard", "gap")),
        ]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    first, end = results["image_range"]
    data, environment = results["data"], results["environment"]
    seconds = results["methods"]["baseline"]["seconds"]["mean"]
    text = (
        f"Accuracies in %, gap in points; mean ± standard error over seeds {', '.join(map(str, results['seeds']))}, listed below "
        f"it. One epoch over {data['num_train']} recordings simulated from MNIST training images {first} to {end - 1}, "
        f"{results['num_steps']} steps; simulated test: {data['num_test']} recordings of MNIST's test images; real test: "
        f"{results['num_real']} N-MNIST recordings, of the training images before {FIRST_FREE_IMAGE}. A baseline run: "
        f"{seconds:.0f} s on {environment['num_cores']} of the {environment['device'].upper()} cores, not alone on the machine."
    )
    return "\n".join(lines) + f"\n\n{text}\n"


def main():
    """Trains, evaluates, and writes the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--images", required=True, help="folder of MNIST's files")
    parser.add_argument("--root", default="", help="folder of N-MNIST recordings; $SAST_JAX_DATA/NMNIST if not given")
    parser.add_argument("--image-range", type=numbers, default=(FIRST_FREE_IMAGE, 60_000))
    parser.add_argument("--rho", type=float, default=0.2, help="radius of SAST; the default is that of configs/nmnist.py")
    parser.add_argument("--processes", type=int, default=1, help="runs trained side by side, each on its share of the cores")
    args, overrides = parse(parser)
    if args.image_range[0] < FIRST_FREE_IMAGE:
        parser.error(f"--image-range: images before {FIRST_FREE_IMAGE} are those of the real recordings; got {args.image_range}")

    overrides = [
        "dataset.name=digits",
        f"dataset.images={args.images}",
        f"dataset.image_range={','.join(map(str, args.image_range))}",
        "dataset.num_validation=0",
        "num_epochs=1",
        *overrides,
    ]
    jobs = [
        (method, seed, {"sam.rho": args.rho} if method == "sast" else {})
        for seed, method in itertools.product(args.seeds, METHODS)
    ]
    train_ahead(args, overrides, jobs)
    runs, tested = {}, {}
    for method, seed, fields in jobs:
        result = train(args, overrides, method, seed, **fields)
        runs.setdefault(method, []).append(result)
        run = load_run(args.workdir / run_name(method, seed, **fields))
        real = real_recordings(result["config"]["dataset"], args.root)
        transfer = evaluate_transfer(make_eval_step(run.network), run.params, real, BATCH_SIZE)
        tested.setdefault(method, []).append({**result, **transfer})
    results = {
        **describe(args, [text for text in overrides if not text.startswith("dataset.images")], runs),
        "rho": args.rho,
        "image_range": args.image_range,
        "num_steps": run.step,
        "num_real": len(real.labels),
        "real": {method: {key: summary(each)[key] for key in ("surrogate", "hard", "gap")} for method, each in tested.items()},
    }
    results["config"]["dataset"]["images"] = ""
    publish("sim_to_real", results, markdown(results), args.output)


if __name__ == "__main__":
    main()
