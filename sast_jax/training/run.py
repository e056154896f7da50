"""A run on disk: its folder, and how to use a trained one."""

import functools
import importlib.metadata
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from sast_jax import config as config_lib
from sast_jax.data import Splits, sensor_size
from sast_jax.errors import UserError, refuse, warn
from sast_jax.files import local_path, refuse_irregular, write_json
from sast_jax.networks import Calibration, SpikingNetwork
from sast_jax.spikes import Mode
from sast_jax.training.build import load_data, make_network, make_optimizer, make_projection
from sast_jax.training.checkpoints import restore
from sast_jax.training.records import METRICS, RESULTS, RUN, RUNS, read_record
from sast_jax.training.state import init_state

MAY_MOVE = ("dataset.root", "dataset.download", "dataset.images")
"""Where recordings and images lie; what they are is compared by checksum."""


def environment() -> dict[str, Any]:
    """Returns the versions, the device and the number of CPU cores that a result was made with."""
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"device": jax.devices()[0].device_kind, "num_cores": num_cores, **_versions()}


@functools.cache
def _versions():
    packages = ("sast_jax", "jax", "flax", "optax", "orbax-checkpoint", "numpy")
    return {name: importlib.metadata.version(name) for name in packages}


_SETTINGS = (
    "jax_enable_x64",
    "jax_threefry_partitionable",
    "jax_default_matmul_precision",
    "jax_random_seed_offset",
)
"""Settings of jax that change what a run computes or draws; the implementation of its keys is fixed, see `make_key`."""


def settings() -> dict[str, Any]:
    """Returns the settings of jax, as JSON values, with which a run must be gone on with."""
    return {name: getattr(jax.config, name) for name in _SETTINGS}


def check_settings(workdir: Path) -> None:
    """Refuses to go on with a run under other settings of jax; those of a run of an earlier version are not known.

    Raises:
        UserError: Listing the settings that differ.
    """
    was = (read_record(workdir / RUN) or {}).get("settings")
    now = settings()
    was = now | was if isinstance(was, dict) else now
    refuse(
        [f"{key}: the run has {was[key]!r}, jax now {now[key]!r} ({key.upper()})" for key in now if was[key] != now[key]],
        f"--workdir: {str(workdir)!r} was begun with other settings of jax, which would change its numbers. Set them as there, "
        "in the environment or with jax.config.update, or choose another folder:",
    )


FORMAT = 1
"""Version of what a run folder holds. Raise it when a config field, a file or a weight means something else than before."""


def read_run(workdir: Path) -> dict[str, Any] | None:
    """Returns what `run.json` holds, or `None` if there is none.

    Raises:
        UserError: If it is damaged, or of a version whose runs mean something else.
    """
    run = read_record(workdir / RUN)
    if run is not None and (version := run.get("format", 1)) != FORMAT:  # The first runs did not say.
        raise UserError(
            f"{workdir / RUN}: is of sast_jax {run['environment'].get('sast_jax')}, which wrote runs of format {version!r}; this "
            f"version reads format {FORMAT}. Use that version of sast_jax, or train again in another --workdir"
        )
    return run


def identity(config: ml_collections.ConfigDict, data: dict[str, Any]) -> dict[str, Any]:
    """Returns what run it is, as JSON values: `{"config", "data"}`; kept with its checkpoints, and compared.

    Args:
        config: Config of the run; fields that may change, `MAY_MOVE`, are left out.
        data: What identifies its data, as in `run.json`.
    """
    fields = config_lib.flatten(config_lib.to_json(config)).items()
    return {
        "config": {key: value for key, value in fields if key not in MAY_MOVE},
        "data": {"checksum": data["checksum"], "num_classes": data["num_classes"]},
    }


def _differing(old, new, whose, other):
    """In what two configs differ, a line each."""
    old, new = (config_lib.flatten(config_lib.to_json(config)) for config in (old, new))
    return [
        f"{key}: {whose} {old.get(key)!r}, {other} {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key not in MAY_MOVE
    ]


def read_results(workdir: Path, config: ml_collections.ConfigDict, data: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """Returns what `results.json` of a run holds, or `None` if it is not there.

    Args:
        workdir: Folder of the run.
        config: Config of the run.
        data: What identifies its data, as in `run.json`; `None`: as it is there.

    Raises:
        UserError: If it is damaged, or of a run of another config or other data.
    """
    results = read_record(workdir / RESULTS)
    if results is None or not isinstance(results.get("config"), dict):
        return results
    path, run = workdir / RESULTS, read_record(workdir / RUN)
    was = config_lib.from_json(results["config"], heading=f"{path}: its config is not one of this version; use that one:")
    problems = _differing(was, config, "the results have", "the run")
    data = data or (run or {}).get("data")
    if data and results.get("data_checksum", data["checksum"]) != data["checksum"]:
        problems.append("its recordings are others")
    refuse(problems, f"{path}: is of another run; put back the run's own, or move it elsewhere and go on with `sast-jax train`:")
    return results


def check_workdir(workdir: Path, config: ml_collections.ConfigDict) -> None:
    """Refuses a folder that holds a run of another config.

    Raises:
        UserError: Listing the fields that differ.
    """
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir: {str(workdir)!r} is a file; give a folder, new or of a run to go on with")
    for name in (RUN, METRICS, RESULTS):
        refuse_irregular(workdir / name)
    members = run_members(workdir)
    if members:
        raise UserError(f"--workdir: {str(workdir)!r} holds the runs {', '.join(members)}; give one of them or a new folder")
    run = read_run(workdir)
    if run is None and (workdir / RESULTS).exists():
        raise UserError(f"--workdir: {str(workdir)!r} has {RESULTS} but no {RUN}; choose another folder")
    if run is not None:
        refuse(
            _differing(read_config(workdir, run), config, "the run has", "the config"),
            f"--workdir: {str(workdir)!r} is a run of another config; choose another folder, or the config that made it:",
        )


def register(workdir: Path, config: ml_collections.ConfigDict, description: dict[str, Any]) -> None:
    """Writes what a run is, or checks it against what is written: `{"format", "config", "data", "environment", "settings"}`.

    Args:
        workdir: Folder of the run, made if missing.
        config: Config of the run.
        description: What identifies its data; `checksum` is compared.

    Raises:
        UserError: If the data are not those the run began with, or the folder cannot be written.
    """
    run = read_run(workdir)
    if run is None:
        try:
            write_json(
                workdir / RUN,
                {
                    "format": FORMAT,
                    "config": config_lib.to_json(config),
                    "data": description,
                    "environment": environment(),
                    "settings": settings(),
                },
            )
        except OSError as error:
            raise UserError(f"--workdir: cannot write to {str(workdir)!r}: {error}") from error
    elif run["data"]["checksum"] != description["checksum"]:
        raise UserError(
            f"--workdir: {str(workdir)!r} was begun with other recordings ({run['data']}) than the data set has now "
            f"({description}); restore them, or choose another folder"
        )


def read_config(workdir: Path, run: dict[str, Any]) -> ml_collections.ConfigDict:
    """Returns the config of what `run.json` holds; fields that a later version brought have their defaults.

    Raises:
        UserError: If the config has fields or values that this version does not know.
    """
    writer = run["environment"].get("sast_jax")
    return config_lib.from_json(
        run["config"],
        heading=f"{workdir / RUN}: its config, of sast_jax {writer}, is not one of this version; use that one, or train again:",
    )


def run_members(workdir: Path) -> list[str]:
    """Returns the names of the runs in a folder of several, in the order in which they are trained; none for a single run."""
    return read_record(workdir / RUNS) or []


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

    def predict(self, frames: np.ndarray, mode: Mode = "hard", calibration: Calibration | None = None) -> jax.Array:
        """Returns the logits `[B, K]` of event frames.

        Args:
            frames: `[T, B, H, W, 2]` event counts, time first, of the run's height and width; with `config.dataset.binary` they
                are cut to 0 and 1 here, as in training. If B equals T, nothing tells the two axes apart: mind their order.
            mode: `surrogate`, `hard` or `straight_through`.
            calibration: Thresholds and gains, as those that `sast-jax evaluate --suite=calibration` finds; `load_calibration`
                of `sast_jax.evaluation.suites` reads them.

        Raises:
            ValueError: If frames have other axes or sizes than the run's, hold no recording, or are not finite. Another number of
                time steps than the run's is taken, with a warning.
        """
        _check_frames(frames, self.config.dataset)
        counts = jnp.asarray(frames, jnp.float32)
        if self.config.dataset.binary:
            counts = jnp.minimum(counts, 1.0)
        return _apply(self.network, self.params, counts, mode, calibration).logits


def _check_frames(frames, dataset):
    num_time_steps, place = dataset.num_time_steps, (*sensor_size(dataset.name, dataset.downsample), 2)
    shape = jnp.shape(frames)
    wanted = (
        f"frames must be [T, B, H, W, 2], for this run [{num_time_steps}, B, {', '.join(map(str, place))}]; got {list(shape)}"
    )
    if len(shape) == 4 and shape[1:] == place:
        raise ValueError(f"{wanted}. A single recording needs an axis of samples: frames[:, None]")
    if len(shape) != 5 or shape[2:] != place:
        raise ValueError(wanted)
    if 0 in shape:
        raise ValueError(f"{wanted}, which holds no recording")
    if shape[0] != num_time_steps and shape[1] == num_time_steps:
        raise ValueError(f"{wanted}. Time comes first: frames.swapaxes(0, 1)")
    if shape[0] != num_time_steps:
        warn(f"frames have {shape[0]} time steps; the run was trained with {num_time_steps} (dataset.num_time_steps)")
    is_known = not isinstance(frames, jax.core.Tracer) and jnp.issubdtype(jnp.result_type(frames), jnp.inexact)
    if is_known and not jnp.isfinite(frames).all():
        raise ValueError("frames must be finite event counts; got NaN or infinity, of which hard spikes would make finite logits")


@functools.partial(jax.jit, static_argnums=(0, 3))
def _apply(network, params, frames, mode, calibration):
    return network.apply({"params": params}, frames, mode, calibration)


def load_warm_start(workdir: str, params: Any, description: dict[str, Any]) -> tuple[Any, dict[str, float]]:
    """Loads the weights that a run begins with instead of drawing them.

    Args:
        workdir: Folder of a finished run, as for `load_run`; empty: there are none.
        params: Weights, or their shapes, of the run that begins.
        description: What identifies the data of the run that begins.

    Returns:
        The weights, or `None`, and what they cost: gradient evaluations and seconds, those of earlier warm starts included.

    Raises:
        UserError: If it has not finished, its weights have other shapes, or it had other splits of the data, so that
            samples tested here may have been trained on there.
    """
    cost = {"num_gradient_evaluations": 0.0, "wall_time_seconds": 0.0}
    if not workdir:
        return None, cost
    run = load_run(local_path(workdir, "warm_start"))
    there = read_record(run.workdir / RUN)["data"]
    heading = f"warm_start: the run {str(run.workdir)!r}"
    if run.results is None:
        raise UserError(f"{heading} has not finished; finish it with its own `sast-jax train` command")
    before, after = (
        {jax.tree_util.keystr(path): jnp.shape(x) for path, x in jax.tree.leaves_with_path(p)} for p in (run.params, params)
    )
    differing = [
        f"{key} is {before.get(key)} there and {after.get(key)} here"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]
    refuse(differing, f"{heading} is of a network of other weights; set config.network as there:")
    if there["checksum"] != description["checksum"]:
        raise UserError(
            f"{heading} was trained on other data ({there}) than this run's ({description}), so it may have seen samples that "
            "are tested here; set config.dataset as there"
        )
    earlier = run.results.get("warm_start_cost", cost)
    return run.params, {key: run.results[key] + earlier[key] for key in cost}


def load_run(workdir: str | Path) -> Run:
    """Loads a run, finished, stopped or in training, from its last checkpoint.

    Args:
        workdir: Folder of the run; `~` is expanded. A folder of several runs, as a pair of baseline and SAST, stands for the last
            of them.

    Returns:
        The run.

    Raises:
        UserError: If the folder holds no run or no checkpoint, or files that are damaged or of different runs.
    """
    workdir = local_path(workdir, "--workdir")
    members = run_members(workdir)
    workdir = workdir / members[-1] if members else workdir
    run = read_run(workdir)
    if run is None:
        raise UserError(f"--workdir: {str(workdir)!r} is no run; expected a folder that `sast-jax train` wrote, with {RUN}")
    config = read_config(workdir, run)
    network = make_network(config, run["data"]["num_classes"])
    size = sensor_size(config.dataset.name, config.dataset.downsample)
    frames = jax.ShapeDtypeStruct((config.dataset.num_time_steps, 1, *size, 2), jnp.uint8)
    tx = make_optimizer(config, 1, make_projection(config, network))
    target = jax.eval_shape(lambda: init_state(network, tx, frames, seed=config.seed))
    restored = restore(workdir, target, identity(config, run["data"]))
    if restored is None:
        raise UserError(f"--workdir: {str(workdir)!r} has no checkpoint yet; run `sast-jax train` with its config first")
    state, _ = restored
    params = jax.tree.map(jnp.asarray, jax.device_get(state.params))  # What is restored is bound to a device.
    return Run(network, params, config, read_results(workdir, config), int(state.step), workdir)


def load_run_and_data(workdir: str | Path, overrides: Sequence[str] = ()) -> tuple[Run, ml_collections.ConfigDict, Splits]:
    """Loads a run and the data it was trained and is tested on.

    Args:
        workdir: Folder of the run.
        overrides: Where the recordings lie now: `dataset.root=...`; `dataset.download=true`, which only these allow: the
            run's own field does not.

    Returns:
        The run, its config with the overrides, and its data.

    Raises:
        UserError: If the folder is no run, an override is of another field, or the recordings are missing or others.
    """
    run = load_run(workdir)
    config = config_lib.forbid_download(run.config.copy_and_resolve_references().unlock())
    elsewhere = [text for text in overrides if text.partition("=")[0] not in MAY_MOVE]
    refuse([f"{text}: of a trained run only {', '.join(MAY_MOVE[:-1])} and {MAY_MOVE[-1]} can be set" for text in elsewhere])
    refuse(config_lib.apply_overrides(config, overrides) + config_lib.find_problems(config))
    splits = load_data(config)
    register(run.workdir, config, splits.describe())
    return run, config, splits
