"""From a config to a trained network and its results."""

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from sast_jax import config as config_lib
from sast_jax.data import DESCENT, PERTURBATION, Prefetch, batch_indices, make_take, take_batch
from sast_jax.data.checks import content_ids
from sast_jax.errors import Diverged, Interrupted, UserError, refuse, warn
from sast_jax.evaluation.outputs import BATCH_SIZE
from sast_jax.evaluation.transfer import evaluate_transfer, make_eval_step
from sast_jax.files import atomic_write, only_process, write_json
from sast_jax.training.build import (
    costs_a_gradient,
    load_data,
    make_augment,
    make_network,
    make_optimizer,
    make_perturbation,
    make_projection,
    make_spikes,
    sam_schedule,
)
from sast_jax.training.checkpoints import Checkpoints, restore
from sast_jax.training.health import find_symptoms
from sast_jax.training.interruption import StopRequest
from sast_jax.training.progress import Progress
from sast_jax.training.run import (
    METRICS,
    RESULTS,
    RUN,
    RUNS,
    check_workdir,
    environment,
    load_warm_start,
    read_json,
    register,
    run_members,
)
from sast_jax.training.state import TrainState, init_state, make_train_step

_FETCH_EVERY_STEPS = 50  # How long a non-finite metric can go unseen; fetching every step would make the device wait.


def train_and_evaluate(config: ml_collections.ConfigDict, workdir: str | Path, *, title: str = "train") -> dict[str, Any]:
    """Trains a network, or goes on from the last checkpoint, and evaluates it once on the test part, if `config.test` says so.

    The folder receives `run.json` (config, data, environment), `metrics.jsonl` (a line an epoch), `checkpoints/` and,
    at the end, `results.json`. A finished run is not trained again: its results are returned.

    Args:
        config: A config with the fields of `sast_jax.config.SCHEMA`.
        workdir: Folder of the run.
        title: Name in the progress display.

    Returns:
        The content of `results.json`: accuracies and gap as fractions of the test samples, gradient evaluations (of one
        batch each), wall time of training in seconds, what both were before a warm start, and the config. Without the test
        part `num_test` is 0 and there are accuracies under `validation` alone.

    Raises:
        UserError: If the config or the data are wrong, the folder belongs to another config or is in use by another process,
            a metric is not finite, or a file cannot be written.
        Interrupted: On SIGINT or SIGTERM, after a checkpoint is written; the same call goes on from it.
    """
    workdir = Path(workdir)
    results = _find_results(config, workdir)
    if results is not None:
        return results
    with only_process(workdir):
        return _train_and_evaluate(config, workdir, title)


def _find_results(config, workdir):
    """Results of a finished run; `None` if it may be trained, and then all that can be checked beforehand is."""
    refuse(config_lib.find_problems(config, with_data=False))
    check_workdir(workdir, config)
    results = read_json(workdir / RESULTS)
    if results is None:
        refuse(config_lib.find_problems(config))
    return results


def _train_and_evaluate(config, workdir, title):
    results = _find_results(config, workdir)  # Another process may have had the folder until now.
    if results is not None:
        return results
    splits = load_data(config)
    data = splits.describe()
    num_train = data["num_train"]
    steps_per_epoch = num_train // config.batch_size
    num_steps = config.num_epochs * steps_per_epoch
    if num_steps > config_lib.MAX_INTEGER:
        raise UserError(
            f"num_epochs: {config.num_epochs} of them are {num_steps} steps; at most {config_lib.MAX_INTEGER} are counted"
        )

    network = make_network(config, splits.num_classes)
    project = make_projection(config, network)
    tx = make_optimizer(config, num_steps, project)
    frames = take_batch(splits.train, np.arange(1)).frames
    target = jax.eval_shape(lambda: init_state(network, tx, frames, seed=config.seed))
    refuse_too_large(target)
    params, warm_start_cost = load_warm_start(config.warm_start, target.params, data)
    register(workdir, config, data)
    train_step = make_train_step(
        network,
        tx,
        make_spikes(config, num_steps, network.num_spiking),
        num_microbatches=config.num_microbatches,
        augment=make_augment(config),
        perturb=make_perturbation(config, num_steps),
    )
    eval_step = make_eval_step(network)
    perturbs = sam_schedule(config, num_steps)
    is_independent = config.sam.perturbation == "independent"
    perturbation_batch_size = config.sam.perturbation_batch_size or config.batch_size

    restored = restore(workdir, target)
    if restored is None:
        state, seconds_before = init_state(network, tx, frames, seed=config.seed, params=params), 0.0
        state = dataclasses.replace(state, params=project(state.params))
    else:
        state, seconds_before = restored
    first_step = int(state.step)
    if first_step > num_steps:
        raise UserError(f"--workdir: {str(workdir)!r} has a checkpoint of step {first_step}, but the run ends at {num_steps}")
    checkpoints = Checkpoints(workdir)
    _forget_metrics_after(workdir, first_step)
    start = time.monotonic()

    def seconds():
        return seconds_before + time.monotonic() - start

    take, contents = make_take(splits.train), content_ids(splits.train)

    def draw(step):
        def indices(stream, size):
            return batch_indices(num_train, size, seed=config.seed, stream=stream, step=step)

        descent = indices(DESCENT, config.batch_size)
        if not (is_independent and perturbs(step)):
            return take(descent), None, False
        perturbation = indices(PERTURBATION, perturbation_batch_size)
        is_same = np.array_equal(np.sort(contents[descent]), np.sort(contents[perturbation]))
        return take(descent), take(perturbation), is_same

    num_perturbed = num_same = 0  # Steps of the epoch with a perturbation batch of its own, and of those with equal frames.
    shown: set[str] = set()

    progress = Progress(title, step=first_step, num_steps=num_steps)
    pending: list[dict[str, jax.Array]] = []
    fetched: list[dict[str, float]] = []
    epoch_start, data_seconds = time.monotonic(), 0.0
    try:
        with StopRequest() as stop, Prefetch(draw, num_steps=num_steps) as batches:
            for step in range(first_step + 1, num_steps + 1):
                asked = time.monotonic()
                descent_batch, perturbation_batch, is_same = batches(step - 1)
                data_seconds += time.monotonic() - asked
                num_perturbed += perturbation_batch is not None
                num_same += is_same
                state, metrics = train_step(state, descent_batch, perturbation_batch)
                pending.append(metrics)
                progress.advance()
                epoch, position = divmod(step, steps_per_epoch)
                if len(pending) == _FETCH_EVERY_STEPS or position == 0 or stop.requested:
                    fetched += jax.device_get(pending)
                    refuse_non_finite(fetched[-len(pending) :], step - len(pending) + 1, workdir)
                    pending.clear()
                if position == 0:
                    line = {"step": step, "epoch": epoch, "num_steps": len(fetched)}
                    line |= {key: float(np.mean([each[key] for each in fetched])) for key in fetched[0]}
                    line |= {"seconds": time.monotonic() - epoch_start, "data_seconds": data_seconds}
                    if len(splits.validation.labels) and (epoch % config.evaluate_every_epochs == 0 or step == num_steps):
                        validation = evaluate_transfer(eval_step, state.params, splits.validation, BATCH_SIZE)
                        refuse_non_finite([validation], step, workdir)
                        line |= {f"validation_{key}": value for key, value in validation.items()}
                    with (workdir / METRICS).open("a") as file:
                        file.write(json.dumps(line) + "\n")
                    progress.report(epoch, step, line)
                    symptoms = find_symptoms(line)
                    if num_same > num_perturbed / 2:
                        symptoms["same batch"] = (
                            f"the perturbation batch had the frames of the descent batch in {num_same} of {num_perturbed} steps, "
                            "so this is ordinary SAM. Lower batch_size, or say so: sam.perturbation=same"
                        )
                    for name in symptoms.keys() - shown:
                        warn(f"epoch {epoch} of {str(workdir)!r}: {symptoms[name]}")
                    shown |= symptoms.keys()
                    num_perturbed = num_same = 0
                    fetched.clear()
                    epoch_start, data_seconds = time.monotonic(), 0.0
                if stop.requested or step == num_steps or (position == 0 and epoch % config.checkpoint_every_epochs == 0):
                    checkpoints.save(state, seconds=seconds())
                if stop.requested and step < num_steps:
                    raise Interrupted(f"stopped at step {step} of {num_steps}; the same command goes on from there")
    finally:
        progress.close()
        checkpoints.close()

    def evaluate(part):
        transfer = evaluate_transfer(eval_step, state.params, part, BATCH_SIZE)
        refuse_non_finite([transfer], num_steps, workdir)
        return transfer

    epoch_seconds = [line["seconds"] for line in read_metrics(workdir) if line["num_steps"] == steps_per_epoch]
    num_perturbations = sum(map(bool, map(perturbs, range(num_steps)))) if costs_a_gradient(config) else 0
    results = {
        **(evaluate(splits.test) if config.test else {}),
        **{key: data[key] for key in ("num_train", "num_validation")},
        "num_test": data["num_test"] if config.test else 0,
        "validation": evaluate(splits.validation) if len(splits.validation.labels) else None,
        "num_gradient_evaluations": num_steps + num_perturbations * perturbation_batch_size / config.batch_size,
        "wall_time_seconds": seconds(),
        "warm_start_cost": warm_start_cost,
        "median_epoch_seconds": float(np.median(epoch_seconds)) if epoch_seconds else None,
        "environment": environment(),
        "config": config_lib.to_json(config),
    }
    write_json(workdir / RESULTS, results)
    return results


def train_variants(configs: dict[str, ml_collections.ConfigDict], workdir: str | Path) -> dict[str, Any]:
    """Trains each config in a folder of its own and writes their results together.

    Args:
        configs: Configs by name; a single one of empty name is trained in `workdir` itself.
        workdir: Folder of the run, or of the folders `<name>/`.

    Returns:
        Results of the single run; or those of the last one together with `runs`, the results by name, which
        `results.json` of `workdir` also holds.

    Raises:
        UserError: As `train_and_evaluate`, and before any training if one of the folders is of another config.
        Interrupted: As `train_and_evaluate`.
    """
    workdir = Path(workdir)
    if list(configs) == [""]:
        return train_and_evaluate(configs[""], workdir, title=workdir.resolve().name)
    if (workdir / RUN).exists():
        raise UserError(f"--workdir: {str(workdir)!r} is a single run; give a folder for the runs {', '.join(configs)}")
    if (workdir / RESULTS).exists() and not run_members(workdir):
        raise UserError(f"--workdir: {str(workdir)!r} has a {RESULTS} of something else; choose another folder")
    runs = {name: _find_results(config, workdir / name) for name, config in configs.items()}
    if None in runs.values() or not (workdir / RESULTS).exists():
        with contextlib.ExitStack() as stack:
            for folder in (workdir, *(workdir / name for name in configs)):
                stack.enter_context(only_process(folder))
            write_json(workdir / RUNS, list(configs))
            runs = {name: _train_and_evaluate(config, workdir / name, name) for name, config in configs.items()}
            write_json(workdir / RESULTS, {**list(runs.values())[-1], "runs": runs})
    return {**list(runs.values())[-1], "runs": runs}


def read_metrics(workdir: str | Path) -> list[dict[str, Any]]:
    """Returns the lines of a run's `metrics.jsonl`; a last line that a crash cut off is left out.

    Raises:
        UserError: If another line is damaged.
    """
    path = Path(workdir) / METRICS
    texts = path.read_bytes().splitlines() if path.is_file() else []
    lines = []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
            if type(line["step"]) is not int:
                raise ValueError("step is no integer")
            lines.append(line)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            if number < len(texts):
                raise UserError(f"{path}: line {number} is damaged ({error}); remove that line") from error
    return lines


def _forget_metrics_after(workdir, step):
    lines = [line for line in read_metrics(workdir) if line["step"] <= step]
    with atomic_write(workdir / METRICS) as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines).encode())


def refuse_non_finite(metrics: Sequence[dict[str, float]], first_step: int, workdir: Path) -> None:
    """Raises a `Diverged` naming quantity and step if a metric of successive steps from `first_step` on is not finite."""
    for step, values in enumerate(metrics, first_step):
        for name, value in values.items():
            if not np.isfinite(value):
                raise Diverged(
                    f"{name} is {value} at step {step}; training stopped. Checkpoints before it are kept in {str(workdir)!r}. "
                    "Lower optimizer.learning_rate or sam.rho, in a new --workdir"
                )


def refuse_too_large(state: TrainState) -> None:
    """Raises a `UserError` if weights and optimizer state alone, given as shapes, exceed the memory of this machine."""
    if jax.default_backend() != "cpu" or not hasattr(os, "sysconf"):
        return
    needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise UserError(
            f"network.features: weights and optimizer state need {needed / 2**30:.1f} GiB; this machine has "
            f"{memory / 2**30:.1f}. Take smaller ones"
        )
