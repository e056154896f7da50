"""Runs in several processes at once, each on processor cores of its own."""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import ml_collections

from sast_jax.allocator import keep_freed_memory
from sast_jax.errors import Interrupted, UserError, show_warning
from sast_jax.training.interruption import StopRequest
from sast_jax.training.session import Result

_POLL_SECONDS = 0.2


def share_cores(number: int) -> list[set[int]]:
    """Returns the cores that this process may use in `number` parts, which differ in size by one at most.

    Raises:
        UserError: If there are fewer cores than parts.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    if number > len(cores):
        raise UserError(f"--processes: must be from 1 to {len(cores)}, the number of processor cores here; got {number}")
    return [set(cores[part::number]) for part in range(number)]


class Workers:
    """Processes that train runs, one run each at a time.

    A small network keeps few cores busy, so that on a CPU several runs side by side take less time than one after the other. The
    devices of an accelerator belong to one process; there runs are trained together as one program instead.
    """

    def __init__(self, number: int):
        """Starts the processes.

        Args:
            number: Number of processes, at most that of processor cores.

        Raises:
            UserError: If it is larger.
        """
        context = multiprocessing.get_context("spawn")
        self._workers = {}
        for cores in share_cores(number):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, cores, os.getpid()), daemon=True)
            process.start()
            theirs.close()
            self._workers[ours] = process

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *exception) -> None:
        for connection, process in self._workers.items():
            connection.close()  # Which ends it.
            process.join()

    def train(
        self,
        configs: Sequence[ml_collections.ConfigDict],
        workdirs: Sequence[Path],
        *,
        titles: Sequence[str],
        together: int | None = None,
        report: Callable[[int, Result], None] = lambda index, result: None,
    ) -> list[Result]:
        """Trains runs as `train_many` does, and begins them in the order of the configs.

        Args:
            configs: As of `train_many`.
            workdirs: As of `train_many`.
            titles: As of `train_many`; the processes show no progress of their own.
            together: Not used; each process trains one run.
            report: As of `train_many`.

        Returns:
            The results, in the order of the configs.

        Raises:
            UserError: As `train_many`, or if a process dies.
            Interrupted: As `train_many`.
        """
        del together
        waiting = list(enumerate(zip(configs, workdirs, titles, strict=True)))[::-1]
        training: dict[multiprocessing.connection.Connection, int] = {}
        results: dict[int, Result] = {}
        with StopRequest() as stop:
            try:
                while waiting or training:
                    for connection in self._workers.keys() - training.keys() if waiting else ():
                        index, (config, workdir, title) = waiting.pop()
                        training[connection] = index
                        connection.send((config.to_dict(), workdir, title))
                        if not waiting:
                            break
                    for connection in multiprocessing.connection.wait(list(training), _POLL_SECONDS):
                        index = training.pop(connection)
                        results[index] = result = _receive(connection)
                        report(index, result)
                    if stop.requested:
                        raise Interrupted("stopped; the same command goes on from there")
            except BaseException:
                for connection in training:  # Their runs write a checkpoint, and say so.
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(self._workers[connection].pid, signal.SIGTERM)
                for connection in training:
                    with contextlib.suppress(EOFError):
                        connection.recv()
                raise
        return [results[index] for index in range(len(configs))]


def _receive(connection):
    try:
        result, is_error = connection.recv()
    except (EOFError, ConnectionResetError) as error:
        raise UserError(
            "--processes: one was killed, for want of memory perhaps; the same command with fewer of them goes on"
        ) from error
    if is_error:
        raise result
    return result


def _work(connection, cores, parent):
    """What a process does until its parent closes the connection."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)  # Before anything has used a device.
    keep_freed_memory()
    warnings.showwarning = show_warning
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the parent passes it on.
    signal.signal(signal.SIGTERM, _interrupt)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    with contextlib.suppress(EOFError, Interrupted):
        while True:
            connection.send(_train(*connection.recv()))


def _interrupt(number, frame):
    raise Interrupted("stopped before the first step")


def _end_with(parent):
    """Ends this process when its parent is gone, however it went."""
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    os._exit(1)


def _train(fields, workdir, title):
    """Returns the result of a run, or the error that it ended in, and whether it is one."""
    from sast_jax.training.loop import train_many

    try:
        config = ml_collections.ConfigDict(fields).lock()
        (result,) = train_many([config], [workdir], titles=[title], together=1, show=False)
        return result, False
    except BaseException as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            return RuntimeError(f"{type(error).__name__}: {error}"), True
        return error, True
