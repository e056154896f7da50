"""The devices of all hosts as one axis, along which the samples of a batch, or many runs, are spread."""

import logging
import os
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sast_jax.errors import UserError

_LOGGER = logging.getLogger(__name__)

AXIS = "devices"
"""Name of the axis, as collectives within `jax.shard_map` call it."""

WHOLE, SPREAD = PartitionSpec(), PartitionSpec(AXIS)
"""An array that every device has; one whose first axis is cut into equal parts, a device each."""


MAX_SPLIT = 8
"""Into how many devices a CPU is split at most."""

_is_split = False


def split_cpu() -> bool:
    """Lets jax take a CPU as several devices, one for each core that this process may use, at most `MAX_SPLIT`.

    It must be called before jax uses any device. The operations of a spiking network are many and small, and the library that
    XLA gives convolutions to takes each of them on a single core. As devices the cores share a batch by its samples instead, each
    taking its own through the whole network, and meet once a gradient. Results must be waited for before another program is
    started; see `settle`.

    Returns:
        Whether it does; not if there is one core, if the number of devices is set already (`JAX_NUM_CPU_DEVICES`,
        `--xla_force_host_platform_device_count` in `XLA_FLAGS`), or if jax has used one.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    is_set = jax.config.jax_num_cpu_devices > 0  # type: ignore[attr-defined]
    is_set |= "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if cores == 1 or is_set:
        return False
    try:
        jax.config.update("jax_num_cpu_devices", min(cores, MAX_SPLIT))
    except RuntimeError:  # Too late.
        return False
    global _is_split
    _is_split = True
    return True


def is_split() -> bool:
    """Whether the devices are the cores of one CPU, by `split_cpu`."""
    return _is_split and jax.default_backend() == "cpu"  # Beside a GPU nothing is trained on the CPU's.


def num_cpu_devices() -> int:
    """Returns into how many devices a CPU is split, or will be once jax is used."""
    return max(1, jax.config.jax_num_cpu_devices)  # type: ignore[attr-defined]


def num_sharing(num_parts: int, num_devices: int) -> int:
    """Returns how many of some devices can have equally many of `num_parts` parts."""
    return max(size for size in range(1, num_devices + 1) if num_parts % size == 0)


def make_mesh(num_parts: int) -> Mesh | None:
    """Returns as many devices as can have equally many of `num_parts` parts; `None` if that is one.

    Raises:
        UserError: If there are several processes, whose devices must all take part, and cannot.
    """
    devices = jax.devices()
    number = num_sharing(num_parts, len(devices))
    if number < len(devices) and jax.process_count() > 1:
        raise UserError(
            f"batch_size: the {len(devices)} devices of {jax.process_count()} processes must have equal parts of each batch (and "
            f"microbatch), so their number must divide {num_parts}; change batch_size or sam.perturbation_batch_size"
        )
    if number < len(devices) and not is_split():
        _LOGGER.warning("%d of %d devices are used: no larger number of them divides %d", number, len(devices), num_parts)
    return Mesh(np.array(devices[:number]), (AXIS,)) if number > 1 else None


def settle(values: Any, mesh: Mesh | None) -> Any:
    """Returns the results of a program over `mesh`, once they are there if its devices are parts of a CPU.

    These run in one pool of threads, no more than there are cores. With several programs under way their parts that wait, for
    each other or for their turn, can take all threads before a part that they wait for has one, and then all wait for ever.
    """
    return jax.block_until_ready(values) if share_threads(mesh) else values


def share_threads(mesh: Mesh | None) -> bool:
    """Whether the devices are several parts of a CPU; see `settle`."""
    return mesh is not None and mesh.size > 1 and bool(mesh.devices.flat[0].platform == "cpu")


def to_pool(x: jax.Array) -> jax.Array:
    """Returns an array as it is, but where a CPU is several devices only once their program goes on in XLA's pool of threads.

    The program of each device starts on a thread of its own. As long as it waits for nothing, it stays there, and the threads of
    the pool, woken for a part of each operation, take the cores from it. A copy of more than 1 MiB is made in two halves, the
    second one by the pool, and the thread that is done last goes on with the program. Such a copy is made where two variables of
    a loop start from the same array.
    """
    if jax.default_backend() != "cpu" or jax.local_device_count() == 1:
        return x

    def body(carry):
        step, *copies = carry
        return step + 1, *(copy.at[0].set(0 * step.astype(copy.dtype)) for copy in copies)

    zeros = jnp.zeros(2**20 + 2**10, jnp.uint8)
    num_steps = jax.lax.optimization_barrier(jnp.int32(1))  # A loop of one step that the compiler knew of would not be left.
    _, *copies = jax.lax.while_loop(lambda carry: carry[0] < num_steps, body, (jnp.int32(0), zeros, zeros))
    return x - (copies[0][0] + copies[1][0]).astype(x.dtype)


def over_devices(reduce: Callable[..., Any], tree: Any, mesh: Mesh | None) -> Any:
    """Returns `jax.lax.psum` or `pmean` of a tree over devices, which meet once, not for each array.

    All arrays travel as one of a common dtype; beside float32 ones, sums of integers are exact up to 2^24.

    Args:
        reduce: Either of them; a mean is of floating-point numbers.
        tree: Arrays, within `jax.shard_map` over the mesh.
        mesh: Devices; `None`: there is but one, and the tree is returned as it is.
    """
    if mesh is None:
        return tree
    values, unravel = ravel_pytree(tree)
    return unravel(reduce(values, AXIS))


def memory_bytes() -> int | None:
    """Returns the memory of the first device, or of the machine if that is its CPU; `None` if it cannot be told."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in statistics:
        return int(statistics["bytes_limit"])
    if jax.default_backend() == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def place(tree: Any, mesh: Mesh | None, specs: Any) -> Any:
    """Puts arrays on devices; of what is cut, only its own parts go to a host's.

    Args:
        tree: Arrays, equal on all hosts.
        mesh: Devices; `None`: the default one.
        specs: A `PartitionSpec` for each array, or a tree prefix of them.
    """
    if mesh is None:
        return jax.device_put(tree)

    def put(spec, part):
        sharding = NamedSharding(mesh, spec)
        return jax.tree.map(lambda leaf: _put(np.asarray(leaf), sharding), part)

    return jax.tree.map(put, specs, tree, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))


def _put(array, sharding):
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def connect_hosts(address: str) -> None:
    """Joins this process with the others of a training that several hosts share; before anything else asks for devices.

    Args:
        address: `auto`, where the cluster's manager (as Slurm) tells all that is needed; else `HOST:PORT,INDEX,NUMBER`: where
            process 0 listens, which one this is, and how many there are.

    Raises:
        UserError: If the address cannot be read, or the others are not found.
    """
    found = re.fullmatch(r"([^,]+:\d+),(\d+),(\d+)", address)
    if address != "auto" and not (found and int(found[2]) < int(found[3])):
        raise UserError(
            "--hosts: must be auto or HOST:PORT,INDEX,NUMBER, as 10.0.0.1:1234,0,2 for the first of two processes; got "
            f"{address!r}"
        )
    try:
        if found is None:
            jax.distributed.initialize()
        else:
            jax.distributed.initialize(found[1], num_processes=int(found[3]), process_id=int(found[2]))
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0][:300]
        raise UserError(f"--hosts: the other processes were not found ({reason}); start all of them, with one address") from error


def is_first_host() -> bool:
    """Returns whether this process is the one that writes files and shows progress."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def on_any_host(flag: bool) -> bool:
    """Returns whether the flag is set in any process; all must ask."""
    return flag if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(flag)).any())
