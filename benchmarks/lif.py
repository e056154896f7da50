"""Time of one layer of neurons by the way it is taken through time, all compared in one run.

    python benchmarks/lif.py

The ways take turns; a row's ratio is the median, over the rounds, of its time over that of `lif`. The floor is what
must be read and written - forward the currents and the spikes, with the gradient also the potentials there and back, the
spikes' cotangents and the currents' - over the bandwidth of a copy measured in the same rounds. The kernels of `lif_pallas` are
timed where there is a GPU or TPU; on a CPU they are interpreted. Writes `benchmarks/results/lif.json` and `.md`, and the table
into `docs/results/speed.md`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from publish import publish
from turns import begin, compare, describe, show, take_turns

from sast_jax import lif, lif_init, lif_step, spike_fn
from sast_jax.neurons import LIFState, remaining_potential
from sast_jax.pallas import lif_pallas

SHAPES = {"conv layer, 34x34x12": (10, 32, 34, 34, 12), "dense layer, 512": (25, 128, 512)}
SMALL = {"conv layer, 3x3x2": (10, 2, 3, 3, 2)}
NEURON = {"decay": 0.9, "threshold": 1.0, "reset": "zero", "spike_fn": spike_fn("surrogate")}


def _step(state, now):
    state = lif_step(state, now, **NEURON)
    return state, state.spikes


def all_kept(current):
    """The scan with states carried, of which all that the gradient needs is kept."""
    return jax.lax.scan(_step, lif_init(current[0]), current)[1]


def recomputed(current):
    """The scan with states carried, of which only they are kept for the gradient."""
    return jax.lax.scan(jax.checkpoint(_step), lif_init(current[0]), current)[1]


def recomputed_in_chunks(current):
    """The scan, of which the states between chunks are kept."""

    @jax.checkpoint
    def chunk(state, currents):
        spikes, state = lif(currents, initial_state=state, **NEURON)
        return state, spikes

    _, spikes = jax.lax.scan(chunk, lif_init(current[0]), current.reshape(-1, 5, *current.shape[1:]))
    return spikes.reshape(current.shape)


@jax.custom_vjp
def potentials_kept(current):
    """A gradient written by hand, from the potentials alone, as in the kernels."""
    return lif(current, **NEURON)[0]


def _potentials_kept_fwd(current):
    def step(state, now):
        state = lif_step(state, now, **NEURON)
        return state, (state.spikes, state.potential)

    return jax.lax.scan(step, lif_init(current[0]), current)[1]


def _potentials_kept_bwd(potentials, cotangents):
    spike, settings = NEURON["spike_fn"], {key: value for key, value in NEURON.items() if key != "spike_fn"}

    def step(carry, now):
        potential_cotangent, spikes_cotangent = carry
        potential, earlier, is_first, cotangent = now
        _, through_spikes = jax.vjp(lambda u: spike(u - NEURON["threshold"]), potential)
        potential_cotangent += through_spikes(spikes_cotangent + cotangent)[0]
        before = LIFState(earlier, jnp.where(is_first, 0.0, spike(earlier - NEURON["threshold"])))
        _, through_reset = jax.vjp(lambda state: remaining_potential(state, **settings), before)
        return tuple(through_reset(potential_cotangent)[0]), potential_cotangent

    earlier = jnp.concatenate([jnp.zeros_like(potentials[:1]), potentials[:-1]])
    inputs = potentials, earlier, jnp.arange(len(potentials)) == 0, cotangents
    return (jax.lax.scan(step, tuple(lif_init(potentials[0])), inputs, reverse=True)[1],)


potentials_kept.defvjp(_potentials_kept_fwd, _potentials_kept_bwd)

WAYS = {
    "lif": lambda current: lif(current, **NEURON)[0],
    "lif, unrolled by 5": lambda current: lif(current, unroll=5, **NEURON)[0],
    "lif, unrolled": lambda current: lif(current, unroll=len(current), **NEURON)[0],
    "lif, chunks of 5 steps recomputed": recomputed_in_chunks,
    "states carried, all kept": all_kept,
    "states carried, only they kept": recomputed,
    "potentials kept, gradient by hand": potentials_kept,
}
if jax.default_backend() != "cpu":
    WAYS["Pallas kernels"] = lambda current: lif_pallas(current, **NEURON)[0]


def measure(shape, rounds):
    """Returns a row per way, and the floors."""
    rng = np.random.default_rng(0)
    current, cotangent = (jax.device_put(rng.normal(0.3, 0.8, shape).astype(np.float32)) for _ in range(2))

    def with_gradient(way, current, cotangent):
        spikes, gradient = jax.vjp(way, current)
        return spikes, gradient(cotangent)

    functions = {("copy", "forward"): functools.partial(jax.jit(lambda x: x + 1), current)}
    functions |= {(name, "forward"): functools.partial(jax.jit(way), current) for name, way in WAYS.items()}
    backward = {
        (name, "gradient"): functools.partial(jax.jit(functools.partial(with_gradient, way)), current, cotangent)
        for name, way in WAYS.items()
    }
    expected = backward["states carried, all kept", "gradient"]()
    for function in backward.values():
        for a, b in zip(function(), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    for function in functions.values():
        function()
    seconds = take_turns(functions | backward, rounds)
    copied = np.median(seconds["copy", "forward"])  # Reads and writes an array once: 2 passes over it.
    rows = {name: {kind: compare(seconds[name, kind], seconds["lif", kind]) for kind in ("forward", "gradient")} for name in WAYS}
    # Passes: current in, spikes out; and potentials out and in, cotangents in and out.
    return rows, {"forward": round(1e3 * copied, 3), "gradient": round(3e3 * copied, 3)}


def markdown(tables, environment):
    """One table per shape."""
    lines = []
    for title, (rows, floor) in tables.items():
        lines += [f"| {title} | forward, ms (quartiles) | ratio | with gradient, ms (quartiles) | ratio |", "|---" * 5 + "|"]
        lines += [f"| {name} | {show(row['forward'], 2)} | {show(row['gradient'], 2)} |" for name, row in rows.items()]
        lines += [f"| *floor* | {floor['forward']:.2f} | | {floor['gradient']:.2f} | |", ""]
    lines.append(describe(environment))
    return "\n".join(lines) + "\n"


def main():
    """Measures, then prints and writes the tables."""
    args, environment = begin(__doc__)
    shapes = SMALL if args.small else SHAPES
    tables = {
        f"{title}, T {shape[0]}, batch {shape[1]}": measure(shape, environment["rounds"]) for title, shape in shapes.items()
    }
    publish("lif", {"environment": environment, "workloads": tables}, markdown(tables, environment), args.output)


if __name__ == "__main__":
    main()
