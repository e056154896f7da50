"""The training state and the jitted step."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from sast_jax.accumulation import accumulate
from sast_jax.data import SAMPLE_AXES, Batch
from sast_jax.spikes import Mode

Metrics = dict[str, jax.Array]


@flax.struct.dataclass
class TrainState:
    """All that changes during training; neurons keep no state between batches.

    Attributes:
        step: Number of optimizer steps done, int32.
        params: Weights.
        opt_state: State of the optax transformation.
    """

    step: jax.Array
    params: Any
    opt_state: optax.OptState


def init_state(
    network: nn.Module, tx: optax.GradientTransformation, frames: jax.typing.ArrayLike, *, seed: int, params: Any = None
) -> TrainState:
    """Returns the state before the first step.

    Args:
        network: A module applied as `network.apply({"params": params}, frames, mode)`.
        tx: Optimizer, with or without `sam` before it.
        frames: `[T, B, H, W, C]`, for its shape; B may be 1.
        seed: Seed of the weights.
        params: Weights to begin with instead; copied.
    """

    @jax.jit
    def init(key, params):
        if params is None:
            params = network.init(key, jnp.zeros(frames.shape, jnp.float32))["params"]
        return TrainState(step=jnp.zeros([], jnp.int32), params=params, opt_state=tx.init(params))

    return init(jax.random.key(seed), params)


def make_train_step(
    network: nn.Module, tx: optax.GradientTransformation, mode: Mode, *, num_microbatches: int = 1
) -> Callable[[TrainState, Batch, Batch | None], tuple[TrainState, Metrics]]:
    r"""Returns the jitted training step `(state, descent_batch, perturbation_batch=None) -> (state, metrics)`.

    With `sam` in `tx` the step takes two gradients, :math:`g'` on the perturbation batch (`None`: on the descent batch
    itself) and :math:`g` on the descent batch; without it one, on the descent batch. The given state is donated. Metrics,
    taken at the unperturbed weights with the first gradient: `loss` (mean cross-entropy), `accuracy`, `gradient_norm` and
    `spike_rate_<i>` per layer; and `update_norm` of what is added to the weights.

    Args:
        network: A module applied as `network.apply({"params": params}, frames, mode)`.
        tx: Optimizer, with or without `sam` before it.
        mode: Mode of the forward pass.
        num_microbatches: Parts in which each gradient is accumulated, for less memory; it divides the batch sizes.
    """
    tx = optax.with_extra_args_support(tx)

    def loss_fn(params, batch):
        output = network.apply({"params": params}, batch.frames.astype(jnp.float32), mode)
        loss = optax.softmax_cross_entropy_with_integer_labels(output.logits, batch.labels).mean()
        metrics = {"loss": loss, "accuracy": jnp.mean(output.logits.argmax(-1) == batch.labels)}
        return loss, metrics | {f"spike_rate_{i}": jnp.mean(spikes) for i, spikes in enumerate(output.spikes)}

    gradient = accumulate(jax.grad(loss_fn, has_aux=True), num_microbatches, axes=SAMPLE_AXES)

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state, descent_batch, perturbation_batch=None):
        first_batch = descent_batch if perturbation_batch is None else perturbation_batch
        grads, metrics = gradient(state.params, first_batch)
        updates, opt_state = tx.update(
            grads, state.opt_state, state.params, grad_fn=lambda params: gradient(params, descent_batch)[0]
        )
        params = optax.apply_updates(state.params, updates)
        metrics |= {"gradient_norm": optax.tree.norm(grads), "update_norm": optax.tree.norm(updates)}
        return TrainState(state.step + 1, params, opt_state), metrics

    return train_step
