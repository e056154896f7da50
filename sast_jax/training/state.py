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
from sast_jax.networks import as_output, measure_activity
from sast_jax.randomness import make_key
from sast_jax.sharpness import Ascent
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
        network: A module initialised as `network.init(key, frames)`.
        tx: Optimizer, with or without `sam` before it.
        frames: `[T, B, H, W, C]`, or what else the network takes, for its shape; B may be 1.
        seed: Seed of the weights.
        params: Weights to begin with instead; copied.

    Example:
        >>> from sast_jax import SpikingMLP
        >>> state = init_state(SpikingMLP(num_classes=10), optax.adam(1e-3), np.zeros((5, 1, 8, 8, 2)), seed=0)
        >>> state.step.item(), state.params["dense_0"]["kernel"].shape
        (0, (128, 512))
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
    itself) and :math:`g` on the descent batch; without it, or another link that calls `grad_fn`, one, on the descent batch,
    whether or not there is another. At a step at which `sam(active=...)` is not active the first gradient is the step's only
    one: give no perturbation batch then. The given state is donated. Metrics,
    taken at the unperturbed weights with the first gradient: `loss` (mean cross-entropy), `accuracy`, `gradient_norm`,
    `gradient_norm_<layer>`; per spiking layer `spike_rate_<i>`, and `above_threshold_<i>`, the share of potentials above the
    threshold, which tells a silent layer from one whose smooth spikes leak; and `update_norm` of what is added to the weights.

    Args:
        network: A module applied as `network.apply({"params": params}, frames, mode)`, which returns logits `[B, K]` or a
            `NetworkOutput`.
        tx: Optimizer, with or without `sam` before it.
        mode: Mode of the forward pass, `surrogate` or `straight_through`; or a function from the step to a spike function for
            each layer.
        num_microbatches: Parts in which each gradient is accumulated, for less memory; it divides the batch sizes.
        augment: Function `(batch, step, stream) -> batch`, as from `make_augment`, applied to each batch first.
        perturb: Function from the state to the weights at which the first gradient and the metrics are taken; `None`: the
            weights themselves. Without `sam` it makes a step of one gradient at perturbed weights.
        mesh: Devices among which the samples of each batch are cut in equal parts (as `place` does with `BATCH_SPECS`), while
            each has the whole state; `None`: one device. The step is equal up to rounding.
        ascent: With `sam` on a mesh, `global`: the perturbation climbs the gradient of the whole perturbation batch;
            `per_device`: each device climbs that of its own part, which spares one exchange of gradients a step and is
            SAM's m-sharpness, m being a part's size. Steps that do not perturb must not occur then.

    Raises:
        ValueError: If the mode is `hard`, whose derivative is zero; when called, if frames, labels and logits of a batch are not
            of equally many samples, or a label is no class. Labels on a device are looked at in the first call alone.

    Example:
        >>> from sast_jax import SpikingMLP, sam
        >>> from sast_jax.data import Batch
        >>> def draw(seed):  # With batch_indices and take_batch, from recordings.
        ...     rng = np.random.default_rng(seed)
        ...     return Batch(rng.integers(0, 2, (5, 4, 8, 8, 2)), rng.integers(0, 10, 4), np.ones(4, bool))
        >>> network, tx = SpikingMLP(num_classes=10), optax.chain(sam(0.1), optax.adam(1e-3))
        >>> state = init_state(network, tx, draw(0).frames, seed=0)
        >>> train_step = make_train_step(network, tx, "surrogate")
        >>> for step in range(3):
        ...     state, metrics = train_step(state, draw(step), draw(100 + step))
        >>> int(state.step), sorted(metrics)[:3]
        (3, ['above_threshold_0', 'accuracy', 'gradient_norm'])

    References:
        m-sharpness: Foret, Kleiner, Mobahi, Neyshabur. Sharpness-Aware Minimization for Efficiently Improving
        Generalization. ICLR 2021, section 4.1.
    """
    if isinstance(mode, str) and mode == "hard":
        raise ValueError(
            "mode must be surrogate or straight_through: the derivative of hard spikes is zero, so that no layer before the last "
            "would learn; got 'hard'"
        )
    tx = optax.with_extra_args_support(tx)
    num_classes: list[int] = []  # Known once the network was traced.

    def loss_fn(params, batch, spikes):
        output = as_output(network.apply({"params": params}, batch.frames, spikes))
        _check_shapes(batch, output.logits)
        num_classes[:] = [output.logits.shape[-1]]
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
        has_two = perturbation_batch is not None and _calls_grad_fn(tx, state)
        first_batch = perturbation_batch if has_two else descent_batch
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

    return _CheckedStep(train_step, num_classes)


def _calls_grad_fn(tx, state):
    """Whether the optimizer asks for a gradient of its own, as `sam` does."""
    calls = []

    def grad_fn(params):
        calls.append(params)
        return params

    jax.eval_shape(lambda state: tx.update(state.params, state.opt_state, state.params, grad_fn=grad_fn), state)
    return bool(calls)


def _check_shapes(batch, logits):
    frames, labels = batch.frames, batch.labels
    if labels.ndim != 1 or not jnp.issubdtype(labels.dtype, jnp.integer) or frames.shape[1:2] != labels.shape:
        raise ValueError(
            "a batch must hold frames [T, B, ...], time first, and integer labels [B]; got frames "
            f"{list(frames.shape)} and labels {labels.dtype}{list(labels.shape)}"
        )
    if logits.ndim != 2 or logits.shape[:1] != labels.shape:
        raise ValueError(f"the network must return logits [B, K], here [{len(labels)}, K]; got {list(logits.shape)}")


class _CheckedStep:
    """A jitted step that looks at labels before it runs: one that is no class would make all weights NaN."""

    def __init__(self, step, num_classes):
        self._step, self._num_classes = step, num_classes

    def __call__(self, state, descent_batch, perturbation_batch=None):
        is_first = not self._num_classes
        batches = [batch for batch in (descent_batch, perturbation_batch) if batch is not None]
        if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((state.step, batches))):
            if is_first:
                self._step.eval_shape(state, descent_batch, perturbation_batch)  # The call below does not trace again.
            for batch in batches:
                if isinstance(batch.labels, np.ndarray) or (is_first and batch.labels.is_fully_addressable):
                    _check_labels(np.asarray(batch.labels), *self._num_classes)
        return self._step(state, descent_batch, perturbation_batch)

    def __getattr__(self, name):
        return getattr(self._step, name)


def _check_labels(labels, num_classes):
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"labels must be 0 to {num_classes - 1}, as the network has {num_classes} classes; got labels from "
            f"{labels.min()} to {labels.max()}"
        )
