"""From configs to trained networks and their results."""

import contextlib
import io
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from sast_jax import config as config_lib
from sast_jax.data import Prefetch, make_take, take_batch
from sast_jax.devices import WHOLE, Mesh, is_first_host, is_split, make_mesh, on_any_host, place, settle, share_threads
from sast_jax.errors import Diverged, Interrupted, UserError, refuse
from sast_jax.evaluation.transfer import make_eval_step
from sast_jax.files import local_path, only_process, write_json
from sast_jax.training.build import build_train_step
from sast_jax.training.checkpoints import latest_step
from sast_jax.training.interruption import StopRequest
from sast_jax.training.progress import Progress
from sast_jax.training.records import RESULTS, RUN, RUNS
from sast_jax.training.run import check_workdir, read_results, run_members
from sast_jax.training.session import Result, Session, Task, cores_share_batches
from sast_jax.training.together import (
    build_train_step_together,
    default_together,
    num_fitting,
    program,
    spread_runs,
    stack,
    unstack,
)

_LOGGER = logging.getLogger(__name__)

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
        batch each), wall time of training in seconds, what both were before a warm start, the seconds until the first step of
        the last session, how many devices and runs shared it, and the config. Without the test part `num_test` is 0 and there
        are accuracies under `validation` alone.

    Raises:
        UserError: If the config or the data are wrong, the folder belongs to another config or is in use by another process,
            a metric is not finite, or a file cannot be written.
        Interrupted: On SIGINT or SIGTERM, after a checkpoint is written; the same call goes on from it.
    """
    return _train_strictly({title: config}, [local_path(workdir, "--workdir")])[0]


def _train_strictly(configs, workdirs):
    """As `train_many`, one after the other, up to the first that diverges."""

    def refuse_diverged(index, result):
        if isinstance(result, Diverged):
            raise result

    return train_many(list(configs.values()), workdirs, titles=list(configs), together=1, report=refuse_diverged)


def train_many(
    configs: Sequence[ml_collections.ConfigDict],
    workdirs: Sequence[Path],
    *,
    titles: Sequence[str],
    together: int | None = None,
    show: bool = True,
    report: Callable[[int, Result], None] = lambda index, result: None,
) -> list[Result]:
    """Trains runs as `train_and_evaluate` does, several at once where one program can.

    It can if they differ in `seed`, `sam.rho`, `optimizer.learning_rate` and `optimizer.weight_decay` alone. Each folder
    receives the files that it would if its run were trained alone, with equal numbers up to rounding, but a run's seconds are
    its share of those of all. A run that diverges leaves the others as they are.

    Args:
        configs: Configs, as of `train_and_evaluate`.
        workdirs: Folder of each run.
        titles: Names in the progress display.
        together: Number of runs that are trained at once, at most; `None`: on a CPU one, else as many as fit in memory.
        show: Whether progress is shown.
        report: Called with index and result of each run when it is done.

    Returns:
        The results, in the order of the configs.

    Raises:
        UserError: As `train_and_evaluate`, but for a metric that is not finite.
        Interrupted: As `train_and_evaluate`, after the checkpoints of all runs that were being trained.
    """
    configs = [config_lib.with_plain_values(config) for config in configs]
    results: dict[int, Result] = {}
    workdirs = [local_path(workdir, "--workdir") for workdir in workdirs]

    def done(index, result):
        results[index] = result
        report(index, result)

    def find(indices):
        for index in indices:
            if (found := _find_results(configs[index], workdirs[index])) is not None:
                done(index, found)
        return [index for index in indices if index not in results]

    with contextlib.ExitStack() as locks:
        left = find(range(len(configs)))
        for index in left:
            locks.enter_context(_only_training(workdirs[index]))
        left = find(left)  # Another process may have had a folder until now.
        programs: dict[str, list[int]] = {}
        for index in left:
            programs.setdefault(program(configs[index]), []).append(index)
        for indices in programs.values():
            # Not `default_together`, which would start jax before the allocator is told of the task's arrays.
            task = Task(configs[indices[0]], min(together or 1, len(indices)))
            for group in _groups(task, configs, workdirs, indices, together):
                sessions = [Session(task, configs[index], workdirs[index], titles[index]) for index in group]
                for index, result in zip(group, _train(task, sessions, show), strict=True):
                    done(index, result)
    return [results[index] for index in range(len(configs))]


def _only_training(folder):
    """Keeps a folder for this training; of several processes that share it, the first holds the lock."""
    return only_process(folder) if is_first_host() else contextlib.nullcontext()


def _find_results(config, workdir):
    """Results of a finished run; `None` if it may be trained, and then all that can be checked beforehand is."""
    refuse(config_lib.find_problems(config, with_data=False))
    check_workdir(workdir, config)
    results = read_results(workdir, config)
    if results is None:
        refuse(config_lib.find_problems(config))
    return results


def _groups(
    task: Task,
    configs: Sequence[ml_collections.ConfigDict],
    workdirs: Sequence[Path],
    indices: list[int],
    together: int | None,
) -> Iterator[list[int]]:
    """Yields the runs that are trained at once: as many as asked for, or as fit in memory, all at the same step."""
    steps = {index: latest_step(workdirs[index]) or 0 for index in indices}
    for step in sorted(set(steps.values())):
        left = [index for index in indices if steps[index] == step]
        number = together or default_together()
        if number is None:
            batch = jax.eval_shape(lambda: take_batch(task.splits.train, np.zeros(task.config.batch_size, int)))
            number = num_fitting([configs[index] for index in left], task.network, task.num_steps, task.target, batch)
        yield from (left[first : first + number] for first in range(0, len(left), number))


def _mesh_of_samples(task: Task) -> Mesh | None:
    """Devices that share the batches of a single run."""
    config = task.config
    if is_split() and not cores_share_batches(config):
        return None
    if config.spikes.hard_share and len(jax.devices()) > 1:
        message = "spikes.hard_share: each sample draws its spikes where it is, so that one device must have all of them"
        refuse([f"{message}; use one process"] * (jax.process_count() > 1))
        _LOGGER.warning("one of %d devices is used; %s", len(jax.devices()), message)
        return None
    return make_mesh(math.gcd(config.batch_size, task.perturbation_batch_size) // config.num_microbatches)


def _train(task: Task, sessions: list[Session], show: bool) -> list[Result]:
    """Trains runs that are at the same step to the end, and returns the result of each."""
    config, num_steps, number = sessions[0].config, task.num_steps, len(sessions)  # Others differ in numbers alone.
    if number == 1:
        mesh = _mesh_of_samples(task)
        train_step = build_train_step(config, task.network, num_steps, mesh)
        eval_step = make_eval_step(task.network, mesh)
    else:
        mesh = make_mesh(number)
        train_step = build_train_step_together([session.config for session in sessions], task.network, num_steps, mesh)
        eval_step = make_eval_step(task.network)
    if config.sam.rho and config.sam.ascent == "per_device" and (mesh is None or number > 1):
        _LOGGER.warning("sam.ascent: per_device is global here, where one device has the whole batch of a run")
    take = make_take(task.splits.train, mesh=mesh)

    def draw(step):
        descent, perturbation, is_same = zip(*(task.draw(session.config.seed, step) for session in sessions), strict=True)
        is_perturbed = perturbation[0] is not None
        return take(np.concatenate(descent)), take(np.concatenate(perturbation)) if is_perturbed else None, is_same

    first_step, start = sessions[0].first_step, time.monotonic()

    def seconds():
        return (time.monotonic() - start) / number

    title = sessions[0].title + (f" and {number - 1} more" if number > 1 else "")
    progress = Progress(title, step=first_step, num_steps=num_steps, stream=None if show and is_first_host() else io.StringIO())
    pending: list[dict[str, jax.Array]] = []
    first_step_seconds = None
    with contextlib.ExitStack() as ending:
        ending.callback(progress.close)
        states = []
        for session in sessions:
            states.append(session.start())
            ending.callback(session.close)
        state = place(states[0], mesh, WHOLE) if number == 1 else spread_runs(stack(states), mesh)
        stop = ending.enter_context(StopRequest())
        batches = ending.enter_context(Prefetch(draw, num_steps=num_steps, depth=0 if share_threads(mesh) else 2))
        epoch_start, data_seconds = time.monotonic(), 0.0
        for step in range(first_step + 1, num_steps + 1):
            asked = time.monotonic()
            descent_batch, perturbation_batch, is_same = batches(step - 1)
            data_seconds += time.monotonic() - asked
            state, metrics = settle(train_step(state, descent_batch, perturbation_batch), mesh)
            if first_step_seconds is None:
                jax.block_until_ready(metrics)
                first_step_seconds = time.monotonic() - task.begin
                progress.note(f"first step after {first_step_seconds:.1f} s")
            for session, same in zip(sessions, is_same, strict=True):
                session.note_batches(perturbation_batch is not None, same)
            pending.append(metrics)
            progress.advance()
            epoch, position = divmod(step, task.steps_per_epoch)
            # Several processes agree on stopping when they fetch; a single one stops at once.
            is_asked = stop.requested and jax.process_count() == 1
            if len(pending) < _FETCH_EVERY_STEPS and position > 0 and not is_asked:
                continue
            is_stopped = on_any_host(stop.requested)
            fetched = jax.device_get(pending)
            for index, session in enumerate(sessions):
                own = fetched if number == 1 else [{key: value[index] for key, value in each.items()} for each in fetched]
                session.note_metrics(own, step - len(pending) + 1)
            pending.clear()
            if all(session.diverged for session in sessions):
                break
            is_saved = is_stopped or step == num_steps or (position == 0 and epoch % config.checkpoint_every_epochs == 0)
            is_evaluated = position == 0 and (epoch % config.evaluate_every_epochs == 0 or step == num_steps)
            states = _apart(state, number) if is_saved or is_evaluated else [state] * number
            if position == 0:
                times = {"seconds": (time.monotonic() - epoch_start) / number, "data_seconds": data_seconds / number}
                lines = [
                    session.finish_epoch(epoch, step, times, eval_step if is_evaluated else None, own.params)
                    for session, own in zip(sessions, states, strict=True)
                ]
                if not any(lines):  # Evaluation found the last of them diverged.
                    break
                progress.report(epoch, step, _mean([line for line in lines if line]))
                epoch_start, data_seconds = time.monotonic(), 0.0
            if is_saved:
                for session, own in zip(sessions, states, strict=True):
                    session.save(own, seconds())
            if is_stopped and step < num_steps:
                raise Interrupted(f"stopped at step {step} of {num_steps}; the same command goes on from there")
    others = {
        "first_step_seconds": first_step_seconds,
        "num_devices": mesh.size if mesh else 1,
        "num_runs_together": number,
    }
    return [
        session.finish(eval_step, own.params, seconds, others)
        for session, own in zip(sessions, _apart(state, number), strict=True)
    ]


def _apart(state, number):
    return [state] if number == 1 else unstack(state, number)


def _mean(lines):
    return {key: float(np.mean([line[key] for line in lines])) for key in lines[0]}


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
    workdir = local_path(workdir, "--workdir")
    if list(configs) == [""]:
        return train_and_evaluate(configs[""], workdir, title=workdir.resolve().name)
    if (workdir / RUN).exists():
        raise UserError(f"--workdir: {str(workdir)!r} is a single run; give a folder for the runs {', '.join(configs)}")
    if (workdir / RESULTS).exists() and not run_members(workdir):
        raise UserError(f"--workdir: {str(workdir)!r} has a {RESULTS} of something else; choose another folder")
    runs = {name: _find_results(config, workdir / name) for name, config in configs.items()}
    if None in runs.values() or not (workdir / RESULTS).exists():
        with _only_training(workdir):
            if is_first_host():
                write_json(workdir / RUNS, list(configs))
            runs = dict(zip(configs, _train_strictly(configs, [workdir / name for name in configs]), strict=True))
            if is_first_host():
                write_json(workdir / RESULTS, {**list(runs.values())[-1], "runs": runs})
    return {**list(runs.values())[-1], "runs": runs}
