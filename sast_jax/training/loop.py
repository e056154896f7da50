"""From a config to a trained network and its results."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from sast_jax import config as config_lib
from sast_jax.data import DESCENT, PERTURBATION, batch_indices, take_batch
from sast_jax.errors import UserError, refuse
from sast_jax.evaluation.transfer import evaluate_transfer, make_eval_step
from sast_jax.files import atomic_write, write_json
from sast_jax.training.build import load_data, make_network, make_optimizer, sam_schedule
from sast_jax.training.checkpoints import Checkpoints
from sast_jax.training.interruption import Interrupted, StopRequest
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
from sast_jax.training.state import init_state, make_train_step

EVALUATION_BATCH_SIZE = 100

_FETCH_EVERY_STEPS = 50  # How long a non-finite metric can go unseen; fetching every step would make the device wait.


def train_and_evaluate(config: ml_collections.ConfigDict, workdir: str | Path, *, title: str = "train") -> dict[str, Any]:
    """Trains a network, or goes on from the last checkpoint, and evaluates it once on the test part.

    The folder receives `run.json` (config, data, environment), `metrics.jsonl` (a line an epoch), `checkpoints/` and,
    at the end, `results.json`. A finished run is not trained again: its results are returned.

    Args:
        config: A config with the fields of `sast_jax.config.SCHEMA`.
        workdir: Folder of the run.
        title: Name in the progress display.

    Returns:
        The content of `results.json`: accuracies and gap as fractions of the test samples, gradient evaluations (of one
        batch each), wall time of training in seconds, what both were before a warm start, and the config.

    Raises:
        UserError: If the config or the data are wrong, the folder belongs to another config, or a metric is not finite.
        Interrupted: On SIGINT or SIGTERM, after a checkpoint is written; the same call goes on from it.
    """
    workdir = Path(workdir)
    refuse(config_lib.find_problems(config, with_data=False))
    check_workdir(workdir, config)
    results = read_json(workdir / RESULTS)
    if results is not None:
        return results
    refuse(config_lib.find_problems(config))
    splits = load_data(config)
    data = splits.describe()
    num_train = data["num_train"]
    steps_per_epoch = num_train // config.batch_size
    num_steps = config.num_epochs * steps_per_epoch

    network = make_network(config, splits.num_classes)
    tx = make_optimizer(config, num_steps)
    state = init_state(network, tx, take_batch(splits.train, np.arange(1)).frames, seed=config.seed)
    warm_start_cost = {"num_gradient_evaluations": 0.0, "wall_time_seconds": 0.0}
    if config.warm_start:
        params, before = load_warm_start(config.warm_start, state.params, data)
        earlier = before.get("warm_start_cost", warm_start_cost)  # Of the run that the warm start began with itself.
        warm_start_cost = {key: before[key] + earlier[key] for key in warm_start_cost}
        state = init_state(network, tx, splits.train.frames, seed=config.seed, params=params)
    register(workdir, config, data)
    train_step = make_train_step(network, tx, config.mode, num_microbatches=config.num_microbatches)
    eval_step = make_eval_step(network)
    perturbs = sam_schedule(config, num_steps)
    is_independent = config.sam.perturbation == "independent"
    perturbation_batch_size = config.sam.perturbation_batch_size or config.batch_size

    checkpoints = Checkpoints(workdir)
    restored = checkpoints.restore(state)
    state, seconds_before = restored if restored is not None else (state, 0.0)
    first_step = int(state.step)
    _forget_metrics_after(workdir, first_step)
    start = time.monotonic()

    def seconds():
        return seconds_before + time.monotonic() - start

    def draw(stream, step, size):
        return take_batch(splits.train, batch_indices(num_train, size, seed=config.seed, stream=stream, step=step))

    progress = Progress(title, step=first_step, num_steps=num_steps)
    pending: list[dict[str, jax.Array]] = []
    fetched: list[dict[str, float]] = []
    epoch_start = time.monotonic()
    try:
        with StopRequest() as stop:
            for step in range(first_step + 1, num_steps + 1):
                is_drawn = is_independent and perturbs(step - 1)
                perturbation_batch = draw(PERTURBATION, step - 1, perturbation_batch_size) if is_drawn else None
                state, metrics = train_step(state, draw(DESCENT, step - 1, config.batch_size), perturbation_batch)
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
                    line["seconds"] = time.monotonic() - epoch_start
                    if len(splits.validation.labels) and (epoch % config.evaluate_every_epochs == 0 or step == num_steps):
                        validation = evaluate_transfer(eval_step, state.params, splits.validation, EVALUATION_BATCH_SIZE)
                        refuse_non_finite([validation], step, workdir)
                        line |= {f"validation_{key}": value for key, value in validation.items()}
                    with (workdir / METRICS).open("a") as file:
                        file.write(json.dumps(line) + "\n")
                    progress.report(epoch, step, line)
                    fetched.clear()
                    epoch_start = time.monotonic()
                if stop.requested or step == num_steps or (position == 0 and epoch % config.checkpoint_every_epochs == 0):
                    checkpoints.save(state, seconds=seconds())
                if stop.requested and step < num_steps:
                    raise Interrupted(f"stopped at step {step} of {num_steps}; the same command goes on from there")
    finally:
        progress.close()
        checkpoints.close()

    transfer = evaluate_transfer(eval_step, state.params, splits.test, EVALUATION_BATCH_SIZE)
    refuse_non_finite([transfer], num_steps, workdir)
    epoch_seconds = [line["seconds"] for line in read_metrics(workdir) if line["num_steps"] == steps_per_epoch]
    num_perturbed = sum(map(bool, map(perturbs, range(num_steps))))
    results = {
        **transfer,
        **{key: data[key] for key in ("num_train", "num_validation", "num_test")},
        "validation": evaluate_transfer(eval_step, state.params, splits.validation, EVALUATION_BATCH_SIZE)
        if len(splits.validation.labels)
        else None,
        "num_gradient_evaluations": num_steps + num_perturbed * perturbation_batch_size / config.batch_size,
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
    for name, config in configs.items():
        check_workdir(workdir / name, config)
    write_json(workdir / RUNS, list(configs))
    runs = {name: train_and_evaluate(config, workdir / name, title=name) for name, config in configs.items()}
    results = {**list(runs.values())[-1], "runs": runs}
    write_json(workdir / RESULTS, results)
    return results


def read_metrics(workdir: str | Path) -> list[dict[str, Any]]:
    """Returns the lines of a run's `metrics.jsonl`; a last line that a crash cut off is left out."""
    path = Path(workdir) / METRICS
    lines = []
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def _forget_metrics_after(workdir, step):
    lines = [line for line in read_metrics(workdir) if line["step"] <= step]
    with atomic_write(workdir / METRICS) as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines).encode())


def refuse_non_finite(metrics: Sequence[dict[str, float]], first_step: int, workdir: Path) -> None:
    """Raises a `UserError` naming quantity and step if a metric of successive steps from `first_step` on is not finite."""
    for step, values in enumerate(metrics, first_step):
        for name, value in values.items():
            if not np.isfinite(value):
                raise UserError(
                    f"{name} is {value} at step {step}; training stopped. Checkpoints before it are kept in {str(workdir)!r}. "
                    "Lower optimizer.learning_rate or sam.rho, in a new --workdir"
                )
