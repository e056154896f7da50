r"""The convergence theorem at work: SGD with SAM on a small surrogate-forward network, against its bound.

    python benchmarks/convergence.py

Independent batches, drawn anew at each step as the theorem assumes, with the learning rate and radius of its rate K^(-1/2);
the same with one batch for both gradients, which the theorem does not cover; and independent batches with a constant radius,
whose bound has a floor. Smoothness and variance are measured at weights and perturbed weights along the runs, which are repeated
with a larger smoothness until no measurement exceeds it. Writes `benchmarks/results/convergence.json`, `.md` and `.png`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from publish import Parser, publish

from sast_jax import SpikingMLP
from sast_jax.theory.training import convergence_bound

NUM_SAMPLES, NUM_SEEDS, BATCH_SIZE, RHO = 48, 24, 4, 0.3
STEPS = (16, 64, 256, 1024, 4096)
NUM_STOPS = 4  # Times in a run at which smoothness and variance are measured.
NUM_MEASURED = 2  # Seeds in which they are.
VARIANTS = {
    "independent": "independent batches",
    "same": "the same batch for both",
    "constant": "independent, constant radius",
}


def make_problem():
    """A network of 51 weights and 48 recordings whose labels follow a random network's decisions, one in eight at random."""
    rng = np.random.default_rng(0)
    network = SpikingMLP(num_classes=3, features=(4,), slope=2.0, init_gain=1.0, time_loop="scan")
    frames = jnp.asarray(rng.integers(0, 2, (5, NUM_SAMPLES, 2, 2, 2)), jnp.float32)
    teacher = network.init(jax.random.key(1), frames)["params"]
    labels = np.asarray(network.apply({"params": jax.tree.map(lambda w: 3 * w, teacher)}, frames).logits.argmax(-1))
    labels = jnp.asarray(np.where(rng.random(NUM_SAMPLES) < 1 / 8, rng.integers(0, 3, NUM_SAMPLES), labels))
    start, unravel = ravel_pytree(network.init(jax.random.key(0), frames)["params"])

    def loss(w, indices):
        logits = network.apply({"params": unravel(w)}, frames[:, indices]).logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[indices]).mean()

    return loss, start


LOSS, START = make_problem()
EVERYTHING = jnp.arange(NUM_SAMPLES)
GRADIENT = jax.grad(LOSS)


def perturb(w, batch, rho):
    """Weights a step of length rho up the loss of a batch."""
    g = GRADIENT(w, batch)
    return w + rho * g / jnp.maximum(jnp.linalg.norm(g), 1e-30)


@functools.partial(jax.jit, static_argnames="same")
def run(carry, num_steps, first, learning_rate, rho, same):
    """Takes steps in all seeds at once; the carry is the weights and the sum of squared gradient norms of each."""

    def step(count, carry, key):
        w, total = carry
        total += jnp.sum(jnp.square(GRADIENT(w, EVERYTHING)))
        descent, perturbation = jax.random.randint(jax.random.fold_in(key, count), (2, BATCH_SIZE), 0, NUM_SAMPLES)
        return w - learning_rate * GRADIENT(perturb(w, descent if same else perturbation, rho), descent), total

    keys = jax.vmap(jax.random.key)(jnp.arange(NUM_SEEDS))

    def steps(count, carry):
        return jax.vmap(lambda *x: step(count, x[:2], x[2]))(*carry, keys)

    return jax.lax.fori_loop(first, first + num_steps, steps, carry)


@jax.jit
def measure(points):
    """Largest curvature and largest variance of a sample's gradient at some weights."""

    def each(w):
        gradients = jax.vmap(lambda i: GRADIENT(w, i[None]))(EVERYTHING)
        variance = jnp.mean(jnp.sum(jnp.square(gradients - gradients.mean(0)), axis=1))
        return jnp.max(jnp.abs(jnp.linalg.eigvalsh(jax.hessian(LOSS)(w, EVERYTHING)))), variance

    curvature, variance = jax.lax.map(each, points, batch_size=8)
    return curvature.max(), variance.max()


def settings(variant, num_steps, smoothness):
    """Learning rate and radius."""
    return 1 / (smoothness * num_steps**0.5), RHO if variant == "constant" else RHO * num_steps**-0.25


def run_all(smoothness, steps):
    """Mean squared gradient norms by variant and seed, and what was measured on the way."""
    norms, measured = {}, []
    for variant in VARIANTS:
        for num_steps in steps:
            learning_rate, rho = settings(variant, num_steps, smoothness)
            carry = jnp.tile(START, (NUM_SEEDS, 1)), jnp.zeros(NUM_SEEDS)
            for stop in range(NUM_STOPS):
                few = carry[0][:NUM_MEASURED]
                measured.append(measure(jnp.concatenate([few, jax.vmap(lambda w, rho=rho: perturb(w, EVERYTHING, rho))(few)])))
                size = num_steps // NUM_STOPS
                carry = run(carry, size, stop * size, learning_rate, rho, variant == "same")
            norms.setdefault(variant, []).append(np.asarray(carry[1]) / num_steps)
    return norms, *np.max(np.asarray(measured), axis=0)


def main():
    """Measures until consistent, then writes table and figure."""
    args = Parser(__doc__).parse_args()
    steps = STEPS[:2] if args.small else STEPS
    smoothness, _ = (1.5 * float(value) for value in measure(START[None]))
    while True:
        norms, curvature, variance = run_all(smoothness, steps)
        print(f"smoothness {smoothness:.3g}, largest curvature measured {curvature:.3g}, variance {variance:.3g}", flush=True)
        if curvature <= smoothness:
            break
        smoothness = 1.1 * float(curvature)
    rows = {}
    for variant in VARIANTS:
        bounds = []
        for num_steps in steps:
            learning_rate, rho = settings(variant, num_steps, smoothness)
            bound = convergence_bound(
                num_steps,
                loss_gap=float(LOSS(START, EVERYTHING)),  # A cross-entropy is not negative.
                smoothness=smoothness,
                variance=float(variance),
                batch_size=BATCH_SIZE,
                learning_rate=learning_rate,
                rho=rho,
            )
            bounds.append(float(bound))
        means = [float(each.mean()) for each in norms[variant]]
        errors = [float(each.std(ddof=1) / np.sqrt(NUM_SEEDS)) for each in norms[variant]]
        slopes = [float(np.polyfit(np.log(steps), np.log(values), 1)[0]) for values in (means, bounds)]
        rows[variant] = {"mean": means, "standard_error": errors, "bound": bounds, "slope": slopes[0], "bound_slope": slopes[1]}
    results = {
        "num_steps": steps,
        "num_seeds": NUM_SEEDS,
        "batch_size": BATCH_SIZE,
        "rho": RHO,
        "num_weights": int(START.size),
        "num_samples": NUM_SAMPLES,
        "smoothness": smoothness,
        "largest_curvature_measured": float(curvature),
        "variance": float(variance),
        "loss_at_start": float(LOSS(START, EVERYTHING)),
        "variants": rows,
    }
    publish("convergence", results, markdown(results), args.output)
    draw(results, args.output / "convergence.png")


def markdown(results):
    """Measured over bound, by number of steps."""
    lines = ["| steps K | " + " | ".join(VARIANTS.values()) + " |", "|---" * (1 + len(VARIANTS)) + "|"]
    for i, num_steps in enumerate(results["num_steps"]):
        cells = [
            f"{row['mean'][i]:.2e} ± {row['standard_error'][i]:.0e} of {row['bound'][i]:.2e}"
            for row in results["variants"].values()
        ]
        lines.append(f"| {num_steps} | " + " | ".join(cells) + " |")
    slopes = [f"{row['slope']:.2f} of {row['bound_slope']:.2f}" for row in results["variants"].values()]
    lines.append("| fitted power of K | " + " | ".join(slopes) + " |")
    text = (
        f"Squared gradient norm, mean over steps, ± standard error of {results['num_seeds']} seeds, *of* the bound of theorem 8, "
        f"which does not cover the column in the middle. A network of {results['num_weights']} weights, {results['num_samples']} "
        f"recordings, batches of {results['batch_size']}; learning rate 1 / (L √K), radius {results['rho']} K^(-1/4) or fixed; "
        f"L = {results['smoothness']:.3g} (largest curvature measured: {results['largest_curvature_measured']:.3g}), "
        f"σ² = {results['variance']:.3g} (largest measured), F(w₀) = {results['loss_at_start']:.3g}, F* ≥ 0."
    )
    return "\n".join(lines) + f"\n\n{text}\n"


def draw(results, path):
    """Measured means and bounds against the number of steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    colors = {"independent": "#d1495b", "same": "#8d99ae", "constant": "#2a6f97"}
    for variant, row in results["variants"].items():
        label = f"{VARIANTS[variant]}: power {row['slope']:.2f}"
        style = {"fmt": "o-", "markersize": 4, "linewidth": 1.4, "color": colors[variant], "label": label}
        axes.errorbar(results["num_steps"], row["mean"], row["standard_error"], **style)
        if variant != "same":
            style = {"color": colors[variant], "linewidth": 1, "label": f"bound: power {row['bound_slope']:.2f}"}
            axes.plot(results["num_steps"], row["bound"], "--", **style)
    axes.set(xscale="log", yscale="log", xlabel="steps K", ylabel="mean squared gradient norm")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e9ecef")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=160)


if __name__ == "__main__":
    main()
