"""Runs that differ in numbers alone, as one program: their states have an axis of runs, their data are shared."""

import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.custom_batching import sequential_vmap

from sast_jax import config as config_lib
from sast_jax.data import BATCH_SPECS, SAMPLE_AXES, Batch
from sast_jax.devices import SPREAD, WHOLE, Mesh, memory_bytes, place
from sast_jax.networks import SpikingNetwork
from sast_jax.training.build import build_train_step, has_radius
from sast_jax.training.state import TrainState, TrainStep

NUMBERS = {
    "seed": np.uint32,
    "sam.rho": np.float32,
    "optimizer.learning_rate": np.float32,
    "optimizer.weight_decay": np.float32,
}
"""What the runs of a program may differ in, with the types in which it takes them; radii are all 0 or all above."""

MEMORY_SHARE = 0.7
"""Of the device's memory, what the step of many runs may take; the data may have what `sast_jax.data.loading` says."""


def program(config: ml_collections.ConfigDict) -> str:
    """Returns a text that is equal for the configs of runs that one program can train."""
    fields = config_lib.flatten(config_lib.to_json(config))
    return json.dumps([has_radius(config), {key: value for key, value in fields.items() if key not in NUMBERS}], sort_keys=True)


def _is_shared(leaf):
    # Runs are at the same step. Its counters stay scalars, so that what depends on them alone stays a branch of the program.
    return jnp.issubdtype(leaf.dtype, jnp.integer)


def _specs(state):
    return jax.tree.map(lambda leaf: WHOLE if _is_shared(leaf) else SPREAD, state)


def stack(states: Sequence[TrainState]) -> TrainState:
    """Returns the states of runs at the same step as one."""
    return jax.tree.map(lambda *leaves: leaves[0] if _is_shared(leaves[0]) else jnp.stack(leaves), *states)


def unstack(state: TrainState, number: int) -> list[TrainState]:
    """Returns the states of `number` runs, each on the first device."""
    device = jax.devices()[0]

    def take(index):
        return jax.tree.map(lambda leaf: jax.device_put(leaf if _is_shared(leaf) else leaf[index], device), state)

    return [take(index) for index in range(number)]


def build_train_step_together(
    configs: Sequence[ml_collections.ConfigDict], network: SpikingNetwork, num_steps: int, mesh: Mesh | None = None
) -> TrainStep:
    """Returns the train step of many runs at once, each equal to its own up to rounding.

    State and metrics have an axis of runs, as from `stack`. A batch holds those of all runs, one after the other along the
    axis of samples.

    Args:
        configs: Configs of one `program`.
        network: Their network.
        num_steps: Steps of a run.
        mesh: Devices that share the runs; their number divides that of the runs.
    """
    varying = [key for key in NUMBERS if key != "sam.rho" or has_radius(configs[0])]
    flat = [config_lib.flatten(config) for config in configs]
    numbers = {key: np.array([fields[key] for fields in flat], NUMBERS[key]) for key in varying}

    def step_alone(numbers, state, *batches):
        config = ml_collections.ConfigDict(configs[0].to_dict())
        for key, number in numbers.items():
            config_lib.set_field(config, key, number)
        return build_train_step(config, network, num_steps)(state, *batches)

    def step(numbers, state, *batches):
        def split(axis, leaf):
            return leaf.reshape(*leaf.shape[:axis], len(numbers["seed"]), -1, *leaf.shape[axis + 1 :])

        batches = [None if batch is None else jax.tree.map(split, SAMPLE_AXES, batch) for batch in batches]
        batch_axes = [None if batch is None else SAMPLE_AXES for batch in batches]
        state_axes = jax.tree.map(lambda leaf: None if _is_shared(leaf) else 0, state)
        in_axes = (0, state_axes, *batch_axes)
        if jax.default_backend() != "cpu" or network.order_on_cpu == "layer_major":
            return jax.vmap(step_alone, in_axes, (state_axes, 0))(numbers, state, *batches)
        # As one operation, convolutions with weights of their own are several times slower on a CPU: one run after the other.
        new_state, metrics = jax.vmap(sequential_vmap(step_alone), in_axes)(numbers, state, *batches)
        return jax.tree.map(lambda leaf: leaf[0] if _is_shared(leaf) else leaf, new_state), metrics

    def spread_step(numbers, state, *batches):
        if mesh is None:
            return step(numbers, state, *batches)
        batch_specs = [None if batch is None else BATCH_SPECS for batch in batches]
        specs = _specs(state)
        spread = jax.shard_map(
            step, mesh=mesh, in_specs=(SPREAD, specs, *batch_specs), out_specs=(specs, SPREAD), check_vma=False
        )
        return spread(numbers, state, *batches)

    jitted, placed = jax.jit(spread_step, donate_argnums=1), place(numbers, mesh, SPREAD)

    def train_step(state, descent_batch, perturbation_batch=None):
        return jitted(placed, state, descent_batch, perturbation_batch)

    return train_step


def spread_runs(state: TrainState, mesh: Mesh | None) -> TrainState:
    """Puts the state of many runs on the devices that share them."""
    return place(state, mesh, _specs(state))


def default_together() -> int | None:
    """Returns how many runs are trained at once if nothing else is said; `None`: as many as fit in memory.

    On a CPU one; `benchmarks/results/many_runs.md` has what small networks would gain by more.
    """
    return 1 if jax.default_backend() == "cpu" else None


def num_fitting(
    configs: Sequence[ml_collections.ConfigDict], network: SpikingNetwork, num_steps: int, state: TrainState, batch: Batch
) -> int:
    """Returns how many of the runs, all or a half, a quarter, ... of them, a device has the memory to train at once.

    Args:
        configs: Configs of one `program`.
        network: Their network.
        num_steps: Steps of a run.
        state: State of one of them, as shapes.
        batch: A descent batch of one of them, as shapes.
    """
    number, limit = len(configs), memory_bytes()
    while number > 1 and limit is not None:
        step = build_train_step_together(configs[:number], network, num_steps)
        many = jax.eval_shape(stack, [state] * number)
        batches = jax.tree.map(
            lambda axis, leaf, n=number: jax.ShapeDtypeStruct(
                (*leaf.shape[:axis], n * leaf.shape[axis], *leaf.shape[axis + 1 :]), leaf.dtype
            ),
            SAMPLE_AXES,
            batch,
        )
        needed: Any = jax.jit(step).lower(many, batches).compile().memory_analysis()
        if needed.argument_size_in_bytes + needed.temp_size_in_bytes <= MEMORY_SHARE * limit:
            break
        number = -(-number // 2)
    return number
