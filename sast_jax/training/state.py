"""The training state and the jitted step."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from sast_jax.accumulation import accumulate
from sast_jax.data import BATCH_SPECS, DESCENT, PERTURBATION, SAMPLE_AXES, Batch
from sast_jax.devices import WHOLE, over_devices
from sast_jax.networks import measure_activity
from sast_jax.randomness import make_key
from sast_jax.sam import Ascent
from sast_jax.spikes import Mode, SpikeFn

Metrics = dict[str, jax.Array]
SpikeSchedule = Callable[[jax.Array], Sequence[SpikeFn]]
"""Function from a step to the spike function of each layer."""


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


TrainStep = Callable[[TrainState, Batch, Batch | None], tuple[TrainState, Metrics]]


def init_state(
    network: nn.Module,
    tx: optax.GradientTransformation,
    frames: jax.Array | np.ndarray | jax.ShapeDtypeStruct,
    *,
    seed: int,
    params: Any = None,
) -> TrainState:
    """Returns the state before the first step.

    Args:
        network: A module applied as `network.apply({"params": params}, frames, mode)`.
        tx: Optimizer, with or without `sam` before it.
        frames: `[T, B, H, W, C]`, for its shape; B may be 1.
        seed: Seed of the weights.
        params: Weights to begin with instead; copied.
    """
    return make_init(network, tx, frames)(make_key(seed), params)


def make_init(
    network: nn.Module, tx: optax.GradientTransformation, frames: jax.Array | np.ndarray | jax.ShapeDtypeStruct
) -> Callable[[jax.Array, Any], TrainState]:
    """Returns the jitted function `(key, params) -> state` behind `init_state`, compiled once for many seeds."""

    @jax.jit
    def init(key, params):
        if params is None:
            params = network.init(key, jnp.zeros(frames.shape, jnp.float32))["params"]
        return TrainState(step=jnp.zeros([], jnp.int32), params=params, opt_state=tx.init(params))

    return init


def make_train_step(
    network: nn.Module,
    tx: optax.GradientTransformation,
    mode: Mode | SpikeSchedule,
    *,
    num_microbatches: int = 1,
    augment: Callable[[Batch, jax.Array, int], Batch] | None = None,
    perturb: Callable[[TrainState], Any] | None = None,
    mesh: Mesh | None = None,
    ascent: Ascent = "global",
) -> TrainStep:
    r"""Returns the jitted training step `(state, descent_batch, perturbation_batch=None) -> (state, metrics)`.

    With `sam` in `tx` the step takes two gradients, :math:`g'` on the perturbation batch (`None`: on the descent batch
    itself) and :math:`g` on the descent batch; without it one, on the descent batch. The given state is donated. Metrics,
    taken at the unperturbed weights with the first gradient: `loss` (mean cross-entropy), `accuracy`, `gradient_norm`,
    `gradient_norm_<layer>`; per spiking layer `spike_rate_<i>`, and `above_threshold_<i>`, the share of potentials above the
    threshold, which tells a silent layer from one whose smooth spikes leak; and `update_norm` of what is added to the weights.

    Args:
        network: A module applied as `network.apply({"params": params}, frames, mode)`.
        tx: Optimizer, with or without `sam` before it.
        mode: Mode of the forward pass; or a function from the step to a spike function for each layer.
        num_microbatches: Parts in which each gradient is accumulated, for less memory; it divides the batch sizes.
        augment: Function `(batch, step, stream) -> batch`, as from `make_augment`, applied to each batch first.
        perturb: Function from the state to the weights at which the first gradient and the metrics are taken; `None`: the
            weights themselves. Without `sam` it makes a step of one gradient at perturbed weights.
        mesh: Devices among which the samples of each batch are cut in equal parts (as `place` does with `BATCH_SPECS`), while
            each has the whole state; `None`: one device. The step is equal up to rounding.
        ascent: With `sam` on a mesh, `global`: the perturbation climbs the gradient of the whole perturbation batch;
            `per_device`: each device climbs that of its own part, which spares one exchange of gradients a step and is
            SAM's m-sharpness, m being a part's size. Steps that do not perturb must not occur then.

    References:
        m-sharpness: Foret, Kleiner, Mobahi, Neyshabur. Sharpness-Aware Minimization for Efficiently Improving
        Generalization. ICLR 2021, section 4.1.
    """
    tx = optax.with_extra_args_support(tx)

    def loss_fn(params, batch, spikes):
        output = network.apply({"params": params}, batch.frames, spikes)
        loss = optax.softmax_cross_entropy_with_integer_labels(output.logits, batch.labels).mean()
        metrics = {"loss": loss, "accuracy": jnp.mean(output.logits.argmax(-1) == batch.labels)}
        activity = output.activity or jax.tree.map(jnp.mean, measure_activity(output.spikes))
        for i, (rate, share) in enumerate(zip(*activity, strict=True)):
            metrics |= {f"spike_rate_{i}": rate, f"above_threshold_{i}": share}
        return loss, metrics

    mean = functools.partial(over_devices, jax.lax.pmean, mesh=mesh)

    def step(state, descent_batch, perturbation_batch):
        spikes = mode(state.step) if callable(mode) else mode
        grad_fn = jax.grad(functools.partial(loss_fn, spikes=spikes), has_aux=True)
        gradient = accumulate(grad_fn, num_microbatches, axes=SAMPLE_AXES)
        first_batch = descent_batch if perturbation_batch is None else perturbation_batch
        grads, metrics = gradient(state.params if perturb is None else perturb(state), first_batch)
        grads = grads if ascent == "per_device" else mean(grads)
        metrics |= {"gradient_norm": optax.tree.norm(grads)}
        metrics |= {f"gradient_norm_{layer}": optax.tree.norm(part) for layer, part in grads.items()}
        updates, opt_state = tx.update(
            grads, state.opt_state, state.params, grad_fn=lambda params: mean(gradient(params, descent_batch)[0])
        )
        params = optax.apply_updates(state.params, updates)
        metrics |= {"update_norm": optax.tree.norm(updates)}
        return TrainState(state.step + 1, params, opt_state), mean(metrics)

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state, descent_batch, perturbation_batch=None):
        if augment is not None:
            descent_batch = augment(descent_batch, state.step, DESCENT)
            if perturbation_batch is not None:
                perturbation_batch = augment(perturbation_batch, state.step, PERTURBATION)
        if mesh is None:
            return step(state, descent_batch, perturbation_batch)
        # Gradients are averaged above, where they are taken, so that each device can also climb its own.
        specs = (WHOLE, BATCH_SPECS, None if perturbation_batch is None else BATCH_SPECS)
        spread = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=WHOLE, check_vma=False)
        return spread(state, descent_batch, perturbation_batch)

    return train_step
