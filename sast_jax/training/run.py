"""A run on disk: its folder, and how to use a trained one."""

import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from sast_jax import config as config_lib
from sast_jax.errors import UserError, refuse
from sast_jax.files import write_json
from sast_jax.networks import SpikingNetwork
from sast_jax.spikes import Mode
from sast_jax.training.build import make_network
from sast_jax.training.checkpoints import load_params

RUN, RESULTS, METRICS = "run.json", "results.json", "metrics.jsonl"
RUNS = "runs.json"  # In a folder of several runs: their names, in the order in which they are trained.

_MAY_MOVE = {"dataset.root", "dataset.download"}  # Where recordings lie; what they are is compared by checksum.


def environment() -> dict[str, Any]:
    """Returns the versions, the device and the number of CPU cores that a result was made with."""
    packages = ("sast_jax", "jax", "flax", "optax", "orbax-checkpoint", "numpy")
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"device": jax.devices()[0].device_kind, "num_cores": num_cores} | {
        name: importlib.metadata.version(name) for name in packages
    }


_PROMISED = {
    RUN: {"config", "data", "environment"},
    RESULTS: {"surrogate_accuracy", "hard_accuracy", "transfer_gap", "num_test"},
}


def read_json(path: Path) -> Any:
    """Returns the content of a JSON file of a run, or `None` if it is not there.

    Raises:
        UserError: If it is there but damaged, or not what `sast-jax train` writes under that name.
    """
    try:
        value = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); restore it, or choose another --workdir") from error
    promised = _PROMISED.get(path.name, set())
    if promised and not (isinstance(value, dict) and promised <= value.keys()):
        raise UserError(
            f"{path}: is damaged or not of sast-jax: it must hold {', '.join(sorted(promised))}; choose another --workdir"
        )
    return value


def check_workdir(workdir: Path, config: ml_collections.ConfigDict) -> None:
    """Refuses a folder that holds a run of another config.

    Raises:
        UserError: Listing the fields that differ.
    """
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir: {str(workdir)!r} is a file; give a folder, new or of a run to go on with")
    members = run_members(workdir)
    if members:
        raise UserError(f"--workdir: {str(workdir)!r} holds the runs {', '.join(members)}; give one of them or a new folder")
    run = read_json(workdir / RUN)
    if run is None and (workdir / RESULTS).exists():
        raise UserError(f"--workdir: {str(workdir)!r} has {RESULTS} but no {RUN}; choose another folder")
    if run is not None:
        old = config_lib.flatten(config_lib.with_defaults(ml_collections.ConfigDict(run["config"])))
        new = config_lib.flatten(config_lib.to_json(config))
        differing = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key) and key not in _MAY_MOVE]
        refuse(
            [f"{key}: the run has {old.get(key)!r}, the config {new.get(key)!r}" for key in differing],
            f"--workdir: {str(workdir)!r} is a run of another config; choose another folder, or the config that made it:",
        )


def register(workdir: Path, config: ml_collections.ConfigDict, description: dict[str, Any]) -> None:
    """Writes what a run is, `{"config", "data", "environment"}`, or checks it against what is written there.

    Args:
        workdir: Folder of the run, made if missing.
        config: Config of the run.
        description: What identifies its data; `checksum` is compared.

    Raises:
        UserError: If the data are not those the run began with, or the folder cannot be written.
    """
    run = read_json(workdir / RUN)
    if run is None:
        try:
            write_json(workdir / RUN, {"config": config_lib.to_json(config), "data": description, "environment": environment()})
        except OSError as error:
            raise UserError(f"--workdir: cannot write to {str(workdir)!r}: {error}") from error
    elif run["data"]["checksum"] != description["checksum"]:
        raise UserError(
            f"--workdir: {str(workdir)!r} was begun with other recordings ({run['data']}) than the data set has now "
            f"({description}); restore them, or choose another folder"
        )


def run_members(workdir: Path) -> list[str]:
    """Returns the names of the runs in a folder of several, in the order in which they are trained; none for a single run."""
    names = read_json(workdir / RUNS)
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise UserError(f"{workdir / RUNS}: must be a list of names; choose another --workdir")
    return names or []


class Run(NamedTuple):
    """A trained network.

    Attributes:
        network: The linen module.
        params: Its weights.
        config: The config it was trained with.
        results: What `results.json` holds, or `None` if training has not finished.
        step: Optimizer steps that the weights have had.
        workdir: Its folder.
    """

    network: SpikingNetwork
    params: Any
    config: ml_collections.ConfigDict
    results: dict[str, Any] | None
    step: int
    workdir: Path

    def predict(self, frames: np.ndarray, mode: Mode = "hard") -> jax.Array:
        """Returns the logits `[B, K]` of event frames.

        Args:
            frames: `[T, B, H, W, 2]` event counts; with `config.dataset.binary` they are cut to 0 and 1 here, as in training.
            mode: `surrogate`, `hard` or `straight_through`.
        """
        counts = jnp.asarray(frames, jnp.float32)
        if self.config.dataset.binary:
            counts = jnp.minimum(counts, 1.0)
        return _apply(self.network, self.params, counts, mode).logits


_apply = jax.jit(lambda network, params, frames, mode: network.apply({"params": params}, frames, mode), static_argnums=(0, 3))


def load_warm_start(workdir: str | Path, params: Any, description: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Loads the finished run whose weights another run begins with.

    Args:
        workdir: Folder of the finished run, as for `load_run`.
        params: Weights, or their shapes, of the run that begins.
        description: What identifies the data of the run that begins.

    Returns:
        Its weights and its results.

    Raises:
        UserError: If it has not finished, its weights have other shapes, or it had other splits of the same data set, so that
            samples tested here may have been trained on there.
    """
    run = load_run(workdir)
    there = read_json(Path(run.workdir) / RUN)["data"]
    heading = f"warm_start: the run {str(run.workdir)!r}"
    if run.results is None:
        raise UserError(f"{heading} has not finished; finish it with its own `sast-jax train` command")
    shapes = [
        {jax.tree_util.keystr(path): jnp.shape(leaf) for path, leaf in jax.tree.leaves_with_path(p)} for p in (run.params, params)
    ]
    differing = sorted(key for key in shapes[0].keys() | shapes[1].keys() if shapes[0].get(key) != shapes[1].get(key))
    if differing:
        listed = "; ".join(f"{key} is {shapes[0].get(key)} there and {shapes[1].get(key)} here" for key in differing)
        raise UserError(f"{heading} is of a network of other weights: {listed}; set config.network as there")
    if there["checksum"] != description["checksum"]:
        raise UserError(
            f"{heading} was trained on other data ({there}) than this run's ({description}), so it may have seen samples that "
            "are tested here; set config.dataset as there"
        )
    return run.params, run.results


def load_run(workdir: str | Path) -> Run:
    """Loads a run, finished or not, from its last checkpoint.

    Args:
        workdir: Folder of the run. A folder of several runs, as a pair of baseline and SAST, stands for the last of them.

    Returns:
        The run.

    Raises:
        UserError: If the folder holds no run or no checkpoint.
    """
    workdir = Path(workdir)
    members = run_members(workdir)
    workdir = workdir / members[-1] if members else workdir
    run = read_json(workdir / RUN)
    if run is None:
        raise UserError(f"--workdir: {str(workdir)!r} is no run; expected a folder that `sast-jax train` wrote, with {RUN}")
    config = config_lib.from_json(run["config"], heading=f"{workdir / RUN}: its config is not one of this version:")
    restored = load_params(workdir)
    if restored is None:
        raise UserError(f"--workdir: {str(workdir)!r} has no checkpoint yet; run `sast-jax train` with its config first")
    network = make_network(config, run["data"]["num_classes"])
    params, step = restored
    return Run(network, params, config, read_json(workdir / RESULTS), step, workdir)
