"""What the swap from surrogate to hard spikes costs, on equal weights."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from sast_jax.data import Batch, Recordings, evaluation_batches

EvalStep = Callable[[Any, Batch], dict[str, jax.Array]]


def make_eval_step(network: nn.Module) -> EvalStep:
    """Returns the jitted function `(params, batch) -> sums` over the samples of a batch.

    The sums are `num_samples` and, for the modes `surrogate` and `hard`, `<mode>_correct` and `<mode>_loss` (cross-entropy).
    Masked samples count nothing, so a padded last batch biases nothing.

    Args:
        network: A module applied as `network.apply({"params": params}, frames, mode)`.
    """

    @jax.jit
    def eval_step(params, batch):
        sums = {"num_samples": jnp.sum(batch.mask)}
        for mode in ("surrogate", "hard"):
            logits = network.apply({"params": params}, batch.frames.astype(jnp.float32), mode).logits
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
            sums[f"{mode}_correct"] = jnp.sum(batch.mask & (logits.argmax(-1) == batch.labels))
            sums[f"{mode}_loss"] = jnp.sum(jnp.where(batch.mask, loss, 0.0))
        return sums

    return eval_step


def evaluate_transfer(eval_step: EvalStep, params: Any, recordings: Recordings, batch_size: int) -> dict[str, float]:
    r"""Evaluates equal weights in both modes.

    .. math:: \text{transfer gap} = \text{surrogate accuracy} - \text{hard accuracy}

    Args:
        eval_step: From `make_eval_step`.
        params: Weights.
        recordings: At least one sample.
        batch_size: Samples per call; changes memory, not the result.

    Returns:
        `surrogate_accuracy`, `hard_accuracy`, `transfer_gap` (fractions), and the mean `surrogate_loss` and `hard_loss`.
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
