r"""Synaptic operations of the hard network, counted as NeuroBench does.

An operation is one weight met by one input. It is *effective* if neither is 0, an accumulation (AC) if the layer's inputs are
binary and a multiply-accumulation (MAC) if they are not; *dense* counts all weights at all steps. Biases and the pooling
itself are not counted. With :math:`f_i` the fan-out of input :math:`i`, the number of its weights that are not 0, borders of a
convolution included:

.. math:: \text{effective} = \sum_t \sum_i [x_i(t) \ne 0] \, f_i, \qquad \text{events} = \sum_t \sum_i n_i(t) \, f_i

Inputs are taken behind the pooling, where averages of spikes are no longer binary, so that layers behind a pooling need MACs.
A chip that sends every spike through the pooling by itself needs ACs alone, one for each of the :math:`n_i` spikes in a window:
`event_acs`. There a frame's count stands for as many events.

NeuroBench's harness looks at each batch and step by itself to see whether inputs are binary; here a layer is binary if its
inputs are at all steps of all recordings, so that the result does not depend on the batches.

References:
    Yik et al. The NeuroBench framework for benchmarking neuromorphic computing algorithms and systems. Nature Communications
    2025, "Synaptic operations" and "Activation sparsity"; neurobench.metrics.workload.SynapticOperations.
"""

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sast_jax.data import Batch, Recordings, evaluation_batches
from sast_jax.evaluation.outputs import BATCH_SIZE, apply
from sast_jax.networks import SpikingNetwork

PER_RECORDING = ("effective_acs", "effective_macs", "dense", "event_acs")


def evaluate_synops(network: SpikingNetwork, params: Any, recordings: Recordings) -> dict[str, Any]:
    """Counts the synaptic operations of the hard network.

    Args:
        network: The network.
        params: Its weights.
        recordings: At least one.

    Returns:
        `synops` of `sast_jax.evaluation`.
    """

    def batches() -> Iterator[tuple[Batch, tuple[jax.Array, ...]]]:
        for batch in evaluation_batches(recordings, min(BATCH_SIZE, len(recordings.labels))):
            yield batch, _hard_spikes(network, params, batch.frames)

    return {**count(network, params, batches()), "num_test": len(recordings.labels)}


@functools.partial(jax.jit, static_argnums=0)
def _hard_spikes(network, params, frames):
    return apply(network, params, frames, "hard").spikes


def count(network: SpikingNetwork, params: Any, batches: Iterable[tuple[Batch, tuple[jax.Array, ...]]]) -> dict[str, Any]:
    """Counts operations from the spikes that the layers emitted.

    Args:
        network: The network, for its shape.
        params: Weights as they are used: those that are 0 do not count.
        batches: At least one batch of recordings, each with the spikes of each layer, 0 or 1, `[T, B, ...]`.

    Returns:
        Means per recording: the keys of `PER_RECORDING`, `activation_sparsity`, and `layers`.
    """
    activity, num_recordings, num_time_steps = None, 0, 0
    for batch, spikes in batches:
        counted = jax.tree.map(lambda a: np.asarray(a, np.int64), _activity(network, batch.frames, spikes, batch.mask))
        activity = counted if activity is None else jax.tree.map(np.add, activity, counted)
        num_recordings += int(batch.mask.sum())
        num_time_steps = len(batch.frames)
    assert activity is not None

    layers: dict[str, dict[str, Any]] = {}
    for index, name in enumerate(network.layer_names):
        inputs = {key: activity[key][index] for key in ("nonzero", "non_binary", "events")}
        weights = np.asarray(params[name]["kernel"])
        fan_out = _fan_out(network, params, index, weights != 0, inputs["nonzero"].shape)
        all_fan_out = _fan_out(network, params, index, np.ones(weights.shape), fan_out.shape)
        effective = int(np.sum(inputs["nonzero"] * fan_out)) / num_recordings
        is_binary = not inputs["non_binary"].any()
        counts = activity["spikes"][index] if index < network.num_spiking else None
        layers[name] = {
            "effective_acs": effective if is_binary else 0.0,
            "effective_macs": 0.0 if is_binary else effective,
            "dense": num_time_steps * int(np.sum(all_fan_out)),
            "event_acs": int(np.sum(inputs["events"] * fan_out)) / num_recordings,
            "spike_rate": None if counts is None else float(counts.mean()) / (num_recordings * num_time_steps),
        }
    outputs = activity["spikes"]
    num_outputs = sum(each.size for each in outputs) * num_recordings * num_time_steps
    return {
        **{key: sum(layer[key] for layer in layers.values()) for key in PER_RECORDING},
        "activation_sparsity": 1.0 - sum(int(each.sum()) for each in outputs) / num_outputs if outputs else None,
        "layers": layers,
    }


@functools.partial(jax.jit, static_argnums=0)
def _activity(network, frames, spikes, mask):
    """Of each layer, summed over steps and recordings: its pooled inputs that are not 0, not binary, their sums, its spikes."""
    sums: dict[str, list[jax.Array]] = {"nonzero": [], "non_binary": [], "events": []}
    outputs = [x.astype(jnp.int32) * mask.reshape(-1, *[1] * (x.ndim - 2)) for x in (frames, *spikes)]
    for index in range(len(network.layer_names)):
        x = network.pool(index, outputs[index].reshape(-1, *outputs[index].shape[2:]))
        sums["nonzero"].append(jnp.sum(x != 0, axis=0))
        sums["non_binary"].append(jnp.sum((x != 0) & (x != network.pool_area(index)), axis=0))
        sums["events"].append(jnp.sum(x, axis=0))
    return {**sums, "spikes": [jnp.sum(x, axis=(0, 1)) for x in outputs[1:]]}


def _fan_out(network, params, index, is_counted, shape):
    """Number of counted weights of a layer that each of its inputs meets: the transpose of the layer applied to ones."""
    name = network.layer_names[index]
    weights = {"params": {name: {**params[name], "kernel": is_counted.astype(np.float32)}}}
    return np.asarray(_transposed_ones(network, weights, index, shape), np.int64)


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _transposed_ones(network, weights, index, shape):
    def current(x):
        return network.apply(weights, x, method=lambda module, x: module.synapses[index](x))

    output, transpose = jax.vjp(current, jnp.zeros((1, *shape)))
    return transpose(jnp.ones_like(output))[0][0]
