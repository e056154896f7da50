"""What a config stands for: data, network, optimizer."""

import dataclasses
import logging
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh

from sast_jax import data, networks
from sast_jax.data.checks import check_parts
from sast_jax.errors import refuse
from sast_jax.randomness import make_key
from sast_jax.sharpness import perturb_weights, sam
from sast_jax.spikes import Mode, mixed_spike_fn
from sast_jax.theory.certified import cap_currents, keep_projected
from sast_jax.theory.neuron import max_current
from sast_jax.training.state import SpikeSchedule, TrainState, TrainStep, make_train_step

Projection = Callable[[Any], Any]

_LOGGER = logging.getLogger(__name__)

_NOISE, _HARD_SPIKES = 1, 2  # Streams of a run's key.


def load_data(config: ml_collections.ConfigDict, corruption: tuple[str, int] | None = None) -> data.Splits:
    """Returns the data set of a config, and logs what a user should know about it.

    With `corruption`, a kind and a severity, the test part is corrupted.

    Raises:
        UserError: If it is missing, damaged, smaller than a batch, or its parts overlap.
    """
    splits = data.load_dataset(**config.dataset, corruption=corruption)
    check_parts({"training": splits.train, "validation": splits.validation, "test": splits.test}, splits.num_classes)
    for note in splits.notes:
        _LOGGER.warning("%s", note)
    num_train = len(splits.train.labels)
    sizes = {"batch_size": config.batch_size}
    if config.sam.rho:
        sizes["sam.perturbation_batch_size"] = config.sam.perturbation_batch_size
    refuse(
        [
            f"{key}: must be at most the number of training samples, {num_train}; got {size}"
            for key, size in sizes.items()
            if size > num_train
        ]
    )
    return splits


def make_network(config: ml_collections.ConfigDict, num_classes: int) -> networks.SpikingNetwork:
    """Returns the network of a config; sizes that its kind does not have are not used."""
    network = networks.NETWORKS[config.network.kind]
    names = {field.name for field in dataclasses.fields(network)} & set(config.network)
    return network(num_classes=num_classes, **{name: config.network[name] for name in names})


def make_augment(config: ml_collections.ConfigDict) -> Callable[[data.Batch, jax.Array, int], data.Batch] | None:
    """Returns the augmentation of a config's training batches, or `None` if it has none."""
    return data.make_augment(**config.augmentation, binary=config.dataset.binary, seed=config.seed)


def make_projection(config: ml_collections.ConfigDict, network: networks.SpikingNetwork) -> Projection:
    """Returns the function from weights to those that `certified.margin` allows; at margin 0 all are."""
    if not config.certified.margin:
        return lambda params: params
    neuron = {key: config.network[key] for key in ("decay", "threshold", "reset", "family", "slope")}
    limit = max_current(config.certified.margin, **neuron)
    return lambda params: cap_currents(params, limit, layers=network.layer_names[: network.num_spiking])


def make_optimizer(
    config: ml_collections.ConfigDict, num_steps: int, project: Projection | None = None
) -> optax.GradientTransformationExtraArgs:
    """Returns `sam`, the optimizer and the projection of a config, for a run of `num_steps` steps; only those it uses."""
    optimizer, learning_rate = config.optimizer, make_schedule(config, num_steps)
    base = {
        "adam": lambda: optax.adam(learning_rate),
        "adamw": lambda: optax.adamw(learning_rate, weight_decay=optimizer.weight_decay),
        "sgd": lambda: optax.sgd(learning_rate, momentum=0.9),
    }[optimizer.name]()
    if config.certified.margin and project is not None:
        base = optax.chain(base, keep_projected(project))
    if has_radius(config) and config.sam.perturbation == "stale":
        return optax.with_extra_args_support(optax.chain(optax.trace(decay=0.0), base))  # Keeps the gradient for the next step.
    if not costs_a_gradient(config):
        return optax.with_extra_args_support(base)
    adaptive = None if config.sam.adaptive == "none" else config.sam.adaptive
    always = config.sam.every_steps == 1 and not config.sam.start
    active = None if always else sam_schedule(config, num_steps)
    return optax.chain(sam(config.sam.rho, adaptive=adaptive, active=active), base)


def make_schedule(config: ml_collections.ConfigDict, num_steps: int) -> optax.ScalarOrSchedule:
    """Returns the learning rate of a config in a run of `num_steps` steps: it rises from 0, then falls as a cosine or stays."""
    optimizer, num_warmup = config.optimizer, math.ceil(config.optimizer.warmup * num_steps)
    peak, is_cosine = optimizer.learning_rate, optimizer.schedule == "cosine"
    if not num_warmup and not is_cosine:
        return peak
    after = optax.cosine_decay_schedule(peak, max(1, num_steps - num_warmup)) if is_cosine else optax.constant_schedule(peak)
    return optax.join_schedules([optax.linear_schedule(0.0, peak, num_warmup), after], [num_warmup]) if num_warmup else after


def build_train_step(
    config: ml_collections.ConfigDict, network: networks.SpikingNetwork, num_steps: int, mesh: Mesh | None = None
) -> TrainStep:
    """Returns the train step of a config, for a run of `num_steps` steps."""
    return make_train_step(
        network,
        make_optimizer(config, num_steps, make_projection(config, network)),
        make_spikes(config, num_steps, network.num_spiking),
        num_microbatches=config.num_microbatches,
        augment=make_augment(config),
        perturb=make_perturbation(config, num_steps),
        mesh=mesh,
        ascent=config.sam.ascent if costs_a_gradient(config) else "global",  # Else each device would take its own step.
    )


def sam_schedule(config: ml_collections.ConfigDict, num_steps: int) -> Callable[[Any], Any]:
    """Returns the function from a step, counted from 0, to whether it perturbs; of an int or an array."""
    first = math.ceil(config.sam.start * num_steps)
    if not has_radius(config):
        return lambda step: False
    return lambda step: (step >= first) & (step % config.sam.every_steps == 0)


def has_radius(config: ml_collections.ConfigDict) -> bool:
    """Returns whether the radius is above 0; a traced one, of one of many runs, always is."""
    return isinstance(config.sam.rho, jax.core.Tracer) or config.sam.rho > 0


def costs_a_gradient(config: ml_collections.ConfigDict) -> bool:
    """Returns whether a perturbed step takes a gradient of its own for the direction, as SAM does."""
    return has_radius(config) and config.sam.perturbation in ("independent", "same")


def num_gradients(config: ml_collections.ConfigDict, num_steps: int) -> float:
    """Returns how many gradients of a descent batch a run of `num_steps` steps costs: one a step, and those that perturb.

    A perturbation batch of another size counts in proportion to it.
    """
    if not costs_a_gradient(config):
        return num_steps
    perturbs = np.broadcast_to(sam_schedule(config, num_steps)(np.arange(num_steps)), num_steps)
    return num_steps + float(perturbs.sum()) * (config.sam.perturbation_batch_size or config.batch_size) / config.batch_size


def make_perturbation(config: ml_collections.ConfigDict, num_steps: int) -> Callable[[TrainState], Any] | None:
    """Returns the function from a state to the weights at which a step takes its only gradient; `None`: SAM, or none at all.

    The direction is normal noise, or the gradient of the step before (zero, so no perturbation, at the first step).
    """
    if not has_radius(config) or costs_a_gradient(config):
        return None
    adaptive = None if config.sam.adaptive == "none" else config.sam.adaptive
    perturbs, key = sam_schedule(config, num_steps), jax.random.fold_in(make_key(config.seed), _NOISE)

    def perturb(state):
        if config.sam.perturbation == "stale":
            direction = state.opt_state[0].trace
        else:
            direction = optax.tree.random_like(jax.random.fold_in(key, state.step), state.params, jax.random.normal)
        return perturb_weights(state.params, direction, jnp.where(perturbs(state.step), config.sam.rho, 0.0), adaptive=adaptive)

    return perturb


def make_spikes(config: ml_collections.ConfigDict, num_steps: int, num_layers: int) -> Mode | SpikeSchedule:
    r"""Returns the spikes of training: `config.mode`, or, with a field of `spikes` set, a function from the step.

    .. math:: k(n) = k_0 \, (k / k_0)^{n / (N - 1)}, \qquad n = 0, \dots, N - 1

    The slope rises from `spikes.initial_slope` to the network's own, with which it is evaluated. A neuron of a sample spikes
    hard with probability `spikes.hard_share`, drawn anew at each step and equal over the time steps of a recording; in the
    last part of the steps, `spikes.finish`, all do.

    Args:
        config: A config.
        num_steps: Steps N of the run.
        num_layers: Layers of spiking neurons.
    """
    spikes, network = config.spikes, config.network
    if not any(spikes.values()):
        return config.mode
    initial = spikes.initial_slope or network.slope
    slope_at = optax.exponential_decay(initial, max(1, num_steps - 1), network.slope / initial)
    first_hard = num_steps - round(spikes.finish * num_steps)
    key = jax.random.fold_in(make_key(config.seed), _HARD_SPIKES)

    def spikes_at(step):
        is_finish = (step >= first_hard) | (config.mode == "straight_through")

        def make(layer):
            if not spikes.hard_share:
                return mixed_spike_fn(lambda x: is_finish, network.family, slope_at(step))
            own = jax.random.fold_in(jax.random.fold_in(key, step), layer)
            return mixed_spike_fn(
                lambda x: is_finish | jax.random.bernoulli(own, spikes.hard_share, x.shape), network.family, slope_at(step)
            )

        return [make(layer) for layer in range(num_layers)]

    return spikes_at
