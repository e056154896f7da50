"""What the swap from surrogate to hard spikes costs, on equal weights, and where."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from sast_jax.data import BATCH_SPECS, SAMPLE_AXES, Batch, Recordings, evaluation_batches
from sast_jax.devices import WHOLE, over_devices, place, settle
from sast_jax.evaluation.outputs import BATCH_SIZE, apply, map_recordings, predict_logits, score, sharing_devices
from sast_jax.networks import SpikingNetwork, as_output

EvalStep = Callable[[Any, Batch], dict[str, jax.Array]]


def make_eval_step(network: nn.Module, mesh: Mesh | None = None) -> EvalStep:
    """Returns the jitted function `(params, batch) -> sums` over the samples of a batch, the same one for equal arguments.

    The sums are `num_samples` and, for the modes `surrogate` and `hard`, `<mode>_correct` and `<mode>_loss` (cross-entropy).
    Masked samples count nothing, so a padded last batch biases nothing. Equal networks share a function, so the runs of a study
    compile it once.

    Args:
        network: A module applied as `network.apply({"params": params}, frames, mode)`, which returns logits `[B, K]` or a
            `NetworkOutput`.
        mesh: Devices that share the samples and each have the weights; `None`: one device.
    """
    try:
        return _shared_eval_step(network, mesh)
    except TypeError:  # A field of the module has no hash, as an array.
        return _shared_eval_step.__wrapped__(network, mesh)


@functools.lru_cache(maxsize=16)
def _shared_eval_step(network, mesh):
    def eval_step(params, batch):
        sums = {"num_samples": jnp.sum(batch.mask)}
        for mode in ("surrogate", "hard"):
            logits = as_output(network.apply({"params": params}, batch.frames, mode)).logits
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
            sums[f"{mode}_correct"] = jnp.sum(batch.mask & (logits.argmax(-1) == batch.labels))
            sums[f"{mode}_loss"] = jnp.sum(jnp.where(batch.mask, loss.astype(jnp.float32), 0.0))
        return over_devices(jax.lax.psum, sums, mesh)

    if mesh is None:
        return jax.jit(eval_step)
    spread = jax.jit(jax.shard_map(eval_step, mesh=mesh, in_specs=(WHOLE, BATCH_SPECS), out_specs=WHOLE, check_vma=False))

    def spread_step(params, batch):
        missing = -len(batch.labels) % mesh.size

        def pad(axis, leaf):
            return np.pad(leaf, [(0, missing * (i == axis)) for i in range(leaf.ndim)])

        return settle(spread(params, place(jax.tree.map(pad, SAMPLE_AXES, batch), mesh, BATCH_SPECS)), mesh)

    return spread_step


def evaluate_transfer(eval_step: EvalStep, params: Any, recordings: Recordings, batch_size: int) -> dict[str, float]:
    r"""Evaluates equal weights in both modes.

    .. math:: \text{transfer gap} = \text{surrogate accuracy} - \text{hard accuracy}

    Args:
        eval_step: From `make_eval_step`.
        params: Weights.
        recordings: At least one sample, as the parts of `load_dataset` are, or `Recordings(frames, labels, ids)` of one's own.
        batch_size: Samples per call; changes memory, not the result.

    Returns:
        `surrogate_accuracy`, `hard_accuracy`, `transfer_gap` (fractions), and the mean `surrogate_loss` and `hard_loss`.

    Raises:
        ValueError: If there are no recordings, or `batch_size` is less than 1.

    Example:
        >>> from sast_jax import SpikingMLP
        >>> network, rng = SpikingMLP(num_classes=3), np.random.default_rng(0)
        >>> recordings = Recordings(rng.integers(0, 2, (7, 5, 4, 4, 2)), np.arange(7) % 3, np.arange(7).astype(str))
        >>> params = network.init(jax.random.key(0), np.zeros((5, 1, 4, 4, 2), np.float32))["params"]
        >>> measured = evaluate_transfer(make_eval_step(network), params, recordings, batch_size=4)
        >>> measured["transfer_gap"] == measured["surrogate_accuracy"] - measured["hard_accuracy"]
        True
    """
    sums = [eval_step(params, batch) for batch in evaluation_batches(recordings, min(batch_size, len(recordings.labels)))]
    total = {key: float(sum(each[key] for each in jax.device_get(sums))) for key in sums[0]}
    means = {key: value / total["num_samples"] for key, value in total.items()}
    return {
        "surrogate_accuracy": means["surrogate_correct"],
        "hard_accuracy": means["hard_correct"],
        "transfer_gap": means["surrogate_correct"] - means["hard_correct"],
        "surrogate_loss": means["surrogate_loss"],
        "hard_loss": means["hard_loss"],
    }


def analyze_transfer(network: SpikingNetwork, params: Any, recordings: Recordings) -> dict[str, Any]:
    """Swaps layers one after the other and one by one, and compares the two modes' decisions and spikes.

    Args:
        network: The network.
        params: Its weights.
        recordings: At least one.

    Returns:
        `transfer` of `sast_jax.evaluation`.
    """
    eval_step = make_eval_step(network, sharing_devices(network, jax.device_count()))
    transfer = evaluate_transfer(eval_step, params, recordings, BATCH_SIZE)
    names = network.layer_names[: network.num_spiking]

    @functools.cache
    def swap(hard):
        if len(hard) in (0, len(names)):
            mode = "hard" if hard else "surrogate"
            return {"accuracy": transfer[f"{mode}_accuracy"], "loss": transfer[f"{mode}_loss"]}
        modes = tuple("hard" if name in hard else "surrogate" for name in names)
        return score(predict_logits(network, params, recordings, modes), recordings.labels)

    orders: dict[str, list[tuple[str, ...]]] = {
        "prefix": [names[:number] for number in range(len(names) + 1)],
        "single": [(name,) for name in names],
    }
    decisions, statistics = map_recordings(network, lambda frames: _compare(network, params, frames), recordings)
    num_classes = network.num_classes
    return {
        **transfer,
        "num_test": len(recordings.labels),
        "layer_swap": {key: [{"hard": list(hard), **swap(hard)} for hard in order] for key, order in orders.items()},
        "agreement": {
            "decisions": float(np.mean(decisions["surrogate"] == decisions["hard"])),
            "layers": {name: _agreement(each) for name, each in zip(names, statistics, strict=True)},
        },
        "confusion": {
            mode: np.bincount(recordings.labels * num_classes + decided, minlength=num_classes**2)
            .reshape(num_classes, num_classes)
            .tolist()
            for mode, decided in decisions.items()
        },
    }


@functools.partial(jax.jit, static_argnums=0)
def _compare(network, params, frames):
    """Decisions by mode `[B]`, and of each layer the means over neurons of what `_agreement` needs, `[B]` each."""
    surrogate, hard = (apply(network, params, frames, mode) for mode in ("surrogate", "hard"))

    def statistics(x, y):
        x, y = (jnp.sum(spikes, axis=0).reshape(spikes.shape[1], -1) for spikes in (x, y))
        means = {"x": x, "y": y, "xx": x * x, "yy": y * y, "xy": x * y, "difference": jnp.abs(x - y)}
        return {key: value.mean(-1) for key, value in means.items()} | {"steps": jnp.full(len(x), len(frames))}

    decisions = {"surrogate": surrogate.logits.argmax(-1), "hard": hard.logits.argmax(-1)}
    return decisions, [statistics(*pair) for pair in zip(surrogate.spikes, hard.spikes, strict=True)]


def _agreement(statistics):
    mean = {key: float(value.mean(dtype=np.float64)) for key, value in statistics.items()}
    variances = [max(mean[key * 2] - mean[key] ** 2, 0.0) for key in "xy"]
    covariance = mean["xy"] - mean["x"] * mean["y"]
    return {
        "surrogate_activation": mean["x"] / mean["steps"],
        "hard_rate": mean["y"] / mean["steps"],
        "count_correlation": covariance / np.sqrt(variances[0] * variances[1]) if min(variances) > 1e-9 else None,
        "count_difference": mean["difference"],
    }
