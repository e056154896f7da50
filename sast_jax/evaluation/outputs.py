"""What a network puts out for all recordings, in batches."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from sast_jax.data import BATCH_SPECS, Recordings, evaluation_batches
from sast_jax.devices import is_split, make_mesh, place
from sast_jax.networks import Calibration, NetworkOutput, SpikingNetwork
from sast_jax.neurons import LIFState, lif_init, lif_step
from sast_jax.spikes import Mode, spike_fn

BATCH_SIZE = 100
"""Recordings per call; changes memory and speed, not the result."""


def sharing_devices(network: SpikingNetwork, num_parts: int) -> Mesh | None:
    """Returns the devices that share the samples of a call, `None` for one; see `make_mesh`.

    The cores of a CPU are left to one device where its products are few and large, as in training.
    """
    return None if is_split() and network.order_on_cpu == "layer_major" else make_mesh(num_parts)


def map_recordings(
    network: SpikingNetwork, function: Callable[[jax.Array], Any], recordings: Recordings, batch_size: int = BATCH_SIZE
) -> Any:
    """Returns what a function makes of all recordings, taken in batches of equal size.

    Args:
        network: The network that the function applies.
        function: From frames `[T, B, H, W, 2]` to a tree of arrays `[B, ...]`; jitted. The cores of a CPU share the samples.
        recordings: N samples, at least one.
        batch_size: Samples per call.

    Returns:
        The tree with NumPy arrays `[N, ...]`.
    """
    batch_size = min(batch_size, len(recordings.labels))
    mesh = sharing_devices(network, batch_size) if is_split() else None  # Kernels for GPUs cannot be shared from outside.

    def values(batch):
        return jax.tree.map(lambda a: np.asarray(a)[batch.mask], function(place(batch.frames, mesh, BATCH_SPECS.frames)))

    parts = [values(batch) for batch in evaluation_batches(recordings, batch_size)]
    return jax.tree.map(lambda *each: np.concatenate(each), *parts)


def apply(
    network: SpikingNetwork,
    params: Any,
    frames: jax.Array,
    mode: Mode | tuple[Mode, ...],
    calibration: Calibration | None = None,
) -> NetworkOutput:
    """Applies a network to frames of any dtype."""
    output: Any = network.apply({"params": params}, frames.astype(jnp.float32), mode, calibration)
    return output


@functools.partial(jax.jit, static_argnums=(0, 3))
def _logits(network, params, frames, mode, calibration):
    return apply(network, params, frames, mode, calibration).logits


def predict_logits(
    network: SpikingNetwork,
    params: Any,
    recordings: Recordings,
    mode: Mode | tuple[Mode, ...],
    calibration: Calibration | None = None,
) -> np.ndarray:
    """Returns the logits `[N, K]` of N recordings; the arguments are those of the network."""
    return map_recordings(network, lambda frames: _logits(network, params, frames, mode, calibration), recordings)


def score(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Returns `accuracy`, a fraction, and `loss`, the mean cross-entropy, of logits `[N, K]`."""
    loss = optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(logits), labels).mean()
    return {"accuracy": float(np.mean(logits.argmax(-1) == labels)), "loss": float(loss)}


@functools.partial(jax.jit, static_argnums=(0, 3))
def trace(
    network: SpikingNetwork,
    params: Any,
    frames: jax.Array,
    mode: Mode | tuple[Mode, ...],
    calibration: Calibration | None = None,
) -> list[LIFState]:
    """Returns the potentials and the spikes of each layer at all steps.

    Args:
        network: The network.
        params: Its weights.
        frames: `[T, B, H, W, 2]` of any dtype.
        mode: As the network's.
        calibration: As the network's.

    Returns:
        For each layer potential and spikes, `[T, B, ...]` each; a leaky readout's neurons never spike.
    """
    neurons = network.neurons(mode, calibration)
    if network.readout == "leaky":
        neurons.append({"decay": network.readout_decay, "threshold": jnp.inf, "reset": "none", "spike_fn": spike_fn("hard")})
    states: list[LIFState] = []
    x = frames.astype(jnp.float32)
    for index, neuron in enumerate(neurons):
        current: Any = network.apply({"params": params}, index, x.reshape(-1, *x.shape[2:]), method="current")
        current = current.reshape(*x.shape[:2], *current.shape[1:])

        def step(state, current_now, neuron=neuron):
            state = lif_step(state, current_now, **neuron)
            return state, state

        states.append(jax.lax.scan(step, lif_init(current[0]), current)[1])
        x = states[-1].spikes
        if calibration is not None and index < network.num_spiking:
            x = jnp.multiply(calibration.gains[index], x)
    return states
