"""What a config stands for: data, network, optimizer."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import ml_collections
import optax

from sast_jax import data, networks
from sast_jax.errors import refuse
from sast_jax.sam import sam


def load_data(config: ml_collections.ConfigDict) -> data.Splits:
    """Returns the data set of a config.

    Raises:
        UserError: If it is missing, damaged, or smaller than a batch.
    """
    splits = data.load_dataset(**config.dataset)
    num_train = len(splits.train.labels)
    sizes = {"batch_size": config.batch_size, "sam.perturbation_batch_size": config.sam.perturbation_batch_size}
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


def make_optimizer(config: ml_collections.ConfigDict, num_steps: int) -> optax.GradientTransformationExtraArgs:
    """Returns `sam` and the optimizer of a config, for a run of `num_steps` steps; at radius 0 the optimizer alone."""
    optimizer, learning_rate = config.optimizer, config.optimizer.learning_rate
    if optimizer.schedule == "cosine":
        learning_rate = optax.cosine_decay_schedule(learning_rate, num_steps)
    base = {
        "adam": lambda: optax.adam(learning_rate),
        "adamw": lambda: optax.adamw(learning_rate, weight_decay=optimizer.weight_decay),
        "sgd": lambda: optax.sgd(learning_rate, momentum=0.9),
    }[optimizer.name]()
    if not config.sam.rho:
        return optax.with_extra_args_support(base)
    adaptive = None if config.sam.adaptive == "none" else config.sam.adaptive
    always = config.sam.every_steps == 1 and not config.sam.start
    active = None if always else sam_schedule(config, num_steps)
    return optax.chain(sam(config.sam.rho, adaptive=adaptive, active=active), base)


def sam_schedule(config: ml_collections.ConfigDict, num_steps: int) -> Callable[[Any], Any]:
    """Returns the function from a step, counted from 0, to whether it perturbs; of an int or an array."""
    first = math.ceil(config.sam.start * num_steps)
    if not config.sam.rho:
        return lambda step: False
    return lambda step: (step >= first) & (step % config.sam.every_steps == 0)
