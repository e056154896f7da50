r"""What predicts the transfer gap: quantities of the smooth network alone, ranked against the gap of finished runs.

    python benchmarks/gap_predictors.py runs/transfer_gap_digits/*/
    python benchmarks/gap_predictors.py runs/transfer_gap_nmnist/*/ --config.dataset.root=FOLDER

The folders are runs on one data set. Predictors are measured on its validation part, the gap (of accuracy and of loss) is that of
`results.json`, on the test part. Spearman's rank correlation, over all runs and over those trained on smooth spikes. Writes
`benchmarks/results/gap_predictors_<data set>.json`, `.md` and `.png`.
"""

import functools
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from publish import Parser, publish
from scipy.stats import spearmanr

from sast_jax import load_run, spike_fn
from sast_jax.config import apply_overrides
from sast_jax.data import take_batch
from sast_jax.errors import refuse
from sast_jax.theory.network import certify_agreement, run_layers
from sast_jax.theory.training import hessian_extremes
from sast_jax.training.build import load_data

NUM_RECORDINGS = 40
NEAR = 0.25  # A potential is near the threshold if it is this share of it away at most.
RHO = 0.2

PREDICTORS = {
    "near_threshold": f"share of potentials within {NEAR:g} of the threshold",
    "swap_error": "mean distance of smooth spikes from hard ones",
    "leak_current": "current caused by resting spikes (root mean square)",
    "curvature": "sharpness: largest eigenvalue of the Hessian",
    "loss_rise": f"sharpness: rise of the loss at radius {RHO:g}",
    "gradient_norm": "norm of the gradient",
    "certificate": "certificate: median log of lead over its largest change",
    "lipschitz": "log of the product of weight norms, as in the Lipschitz bound",
    "lead": "median lead of the smooth logits over the runner-up",
    "validation_gap": "for comparison: the gap itself, on the validation part",
}
TARGETS = {"transfer_gap": "gap of accuracy", "loss_gap": "gap of loss"}
GROUPS = {"all": lambda row: True, "surrogate": lambda row: row["mode"] == "surrogate"}


@functools.cache
def make_loss(network):
    """The mean cross-entropy in surrogate mode; one function per network, so that it is compiled once."""

    def loss_fn(params, frames, labels):
        logits = network.apply({"params": params}, frames).logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return loss_fn


@functools.partial(jax.jit, static_argnums=0)
def measure_forward(network, params, frames, labels):
    """All predictors but curvature."""
    states = run_layers(network, params, frames)
    distances = [jnp.abs(state.potential - network.threshold) for state in states]
    errors = [jnp.minimum(state.spikes, 1 - state.spikes) for state in states]
    current = network.bind({"params": params}).current
    rest = [jnp.full((1, *s.spikes.shape[2:]), network_spike(network, 0.0)) for s in states]
    leaks = [current(index, x) - current(index, 0 * x) for index, x in enumerate(rest, 1)]
    value, gradient = jax.value_and_grad(make_loss(network))(params, frames, labels)
    norm = optax.tree.norm(gradient)
    perturbed = jax.tree.map(lambda w, g: w + RHO * g / norm, params, gradient)
    logits = jnp.sort(network.apply({"params": params}, frames).logits, axis=-1)
    rows = [jnp.sum(jnp.abs(layer["kernel"]), axis=tuple(range(layer["kernel"].ndim - 1))) for layer in params.values()]
    return {
        "near_threshold": jnp.mean(jnp.stack([jnp.mean(d < NEAR * network.threshold) for d in distances])),
        "swap_error": jnp.mean(jnp.stack([jnp.mean(e) for e in errors])),
        "leak_current": jnp.sqrt(jnp.mean(jnp.stack([jnp.mean(jnp.square(leak)) for leak in leaks]))),
        "loss_rise": make_loss(network)(perturbed, frames, labels) - value,
        "gradient_norm": norm,
        "certificate": jnp.median(jnp.log10(certify_agreement(network, params, frames).ratio)),
        "lipschitz": sum(jnp.log10(jnp.max(row)) for row in rows),
        "lead": jnp.median(logits[:, -1] - logits[:, -2]),
    }


def network_spike(network, potential):
    """The smooth spike of a potential."""
    return spike_fn("surrogate", network.family, network.slope)(jnp.asarray(potential - network.threshold))


def measure(run, recordings):
    """Every predictor of a run."""
    batch = take_batch(recordings, np.arange(min(NUM_RECORDINGS, len(recordings.labels))))
    frames, labels = jnp.asarray(batch.frames, jnp.float32), jnp.asarray(batch.labels)
    values = {key: float(value) for key, value in measure_forward(run.network, run.params, frames, labels).items()}
    network = run.network.clone(time_loop="scan")  # Kernels have no second derivative.
    extremes = hessian_extremes(make_loss(network), run.params, frames, labels, tolerance=2e-2)
    return values | {
        "curvature": max(map(abs, extremes)),
        "validation_gap": run.results["validation"]["transfer_gap"],
    }


def correlate(rows):
    """Spearman's correlation and its p-value, by group, target and predictor; `None` where a predictor does not vary."""
    table = {}
    for group, belongs in GROUPS.items():
        chosen = [row for row in rows if belongs(row)]
        for target in TARGETS:
            for predictor in PREDICTORS:
                values = [row[predictor] for row in chosen]
                result = spearmanr(values, [row[target] for row in chosen]) if len(set(values)) > 1 else None
                table.setdefault(group, {}).setdefault(target, {})[predictor] = (
                    None if result is None else {"correlation": float(result.statistic), "p": float(result.pvalue)}
                )
    return table


def main():
    """Measures, then writes table and figure."""
    parser = Parser(__doc__)
    parser.add_argument("workdirs", nargs="+", type=Path, metavar="DIR")
    args, rest = parser.parse_known_args()
    rows, splits = [], None
    for workdir in args.workdirs:
        if not (workdir / "results.json").exists():
            print(f"{workdir}: not finished, left out")
            continue
        run = load_run(workdir)
        config = run.config.copy_and_resolve_references().unlock()
        refuse(apply_overrides(config, [text.removeprefix("--config.") for text in rest]))
        splits = splits or load_data(config)
        results = run.results
        rows.append(
            {
                "run": workdir.resolve().name,
                "mode": config.mode,
                "rho": config.sam.rho,
                "seed": config.seed,
                "transfer_gap": results["transfer_gap"],
                "loss_gap": results["hard_loss"] - results["surrogate_loss"],
                **measure(run, splits.validation),
            }
        )
        print({key: round(value, 4) if isinstance(value, float) else value for key, value in rows[-1].items()}, flush=True)
    if not rows:
        parser.error("none of the runs is finished")
    results = {
        "data": config.dataset.name,
        "num_recordings": min(NUM_RECORDINGS, len(splits.validation.labels)),
        "num_test": len(splits.test.labels),
        "resting_spike": float(network_spike(run.network, 0.0)),
        "runs": rows,
        "correlations": correlate(rows),
    }
    name = f"gap_predictors_{results['data']}"
    publish(name, results, markdown(results), args.output)
    draw(results, args.output / f"{name}.png")


def markdown(results):
    """A row per predictor, the strongest on the gap of accuracy of runs trained on smooth spikes first."""
    groups = {group: sum(map(belongs, results["runs"])) for group, belongs in GROUPS.items()}
    titles = {"all": "all", "surrogate": "trained on smooth spikes"}
    columns = [(group, target) for group in ("surrogate", "all") for target in TARGETS]
    header = [f"{TARGETS[target]}, {titles[group]} ({groups[group]})" for group, target in columns]

    def cell(value):
        return "-" if value is None else f"{value['correlation']:+.2f}{'*' if value['p'] < 0.05 / len(PREDICTORS) else ''}"

    def strength(predictor):
        value = results["correlations"]["surrogate"]["transfer_gap"][predictor]
        return -abs(value["correlation"]) if value else 0

    lines = ["| predictor | " + " | ".join(header) + " |", "|---" * (1 + len(columns)) + "|"]
    for predictor in sorted(PREDICTORS, key=strength):
        cells = [cell(results["correlations"][group][target][predictor]) for group, target in columns]
        lines.append(f"| {PREDICTORS[predictor]} | " + " | ".join(cells) + " |")
    gap = [100 * row["transfer_gap"] for row in results["runs"] if row["mode"] == "surrogate"]
    text = (
        f"Spearman's rank correlation with the gap on {results['num_test']} test recordings; predictors on "
        f"{results['num_recordings']} validation recordings. Asterisk: p below 0.05 / {len(PREDICTORS)}, as if runs were "
        f"independent. The runs: {', '.join(row['run'] for row in results['runs'])}. They share data and network and differ in "
        f"mode, radius, schedule and seed; gaps of those trained on smooth spikes are {min(gap):.1f} to {max(gap):.1f} points, "
        f"each with a standard error of about {100 * np.sqrt(0.1 / results['num_test']):.1f} points from the test part alone. "
        f"The resting spike, {results['resting_spike']:.3g}, is the same in all and cannot tell them apart."
    )
    return "\n".join(lines) + f"\n\n{text}\n"


def draw(results, path):
    """The gap of accuracy against each predictor."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(2, 5, figsize=(12, 5), layout="constrained", sharey=True)
    kinds = {
        "surrogate-forward": ("#8d99ae", lambda row: row["mode"] == "surrogate" and not row["rho"]),
        "SAST, any radius and schedule": ("#d1495b", lambda row: row["mode"] == "surrogate" and row["rho"]),
        "straight-through": ("#2a6f97", lambda row: row["mode"] != "surrogate"),
    }
    for axes, (predictor, title) in zip(grid.ravel(), PREDICTORS.items(), strict=True):
        for label, (color, belongs) in kinds.items():
            chosen = [row for row in results["runs"] if belongs(row)]
            x, y = [row[predictor] for row in chosen], [100 * row["transfer_gap"] for row in chosen]
            axes.scatter(x, y, s=18, color=color, alpha=0.8, label=label)
        axes.set_xlabel(textwrap.fill(title, 34), fontsize=8)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("transfer gap, points", fontsize=8)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path, dpi=140)


if __name__ == "__main__":
    main()
