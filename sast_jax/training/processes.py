"""Runs in several processes at once, each on processor cores of its own."""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from sast_jax.allocator import keep_freed_memory
from sast_jax.devices import split_cpu
from sast_jax.errors import Interrupted, UserError, show_warning
from sast_jax.training.interruption import StopRequest
from sast_jax.training.session import Result

_POLL_SECONDS = 0.2
_GONE = (EOFError, OSError)  # What a connection raises whose other end has been closed.


def share_cores(number: int) -> list[set[int]]:
    """Returns the cores that this process may use in `number` parts of neighbours, which differ in size by one at most.

    Raises:
        UserError: If there are fewer cores than parts, or processes cannot be kept to cores here.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise UserError("--processes: only Linux can keep a process to its cores; leave it out")
    cores = sorted(os.sched_getaffinity(0))
    if number > len(cores):
        raise UserError(f"--processes: must be from 1 to {len(cores)}, the number of processor cores here; got {number}")
    return [set(part.tolist()) for part in np.array_split(cores, number)]


# Not an executor of concurrent.futures: that gives a process its next run ahead and cannot ask one in progress for a checkpoint.
class Workers:
    """Processes that train runs, one run each at a time.

    A small network, its compilation and its evaluation keep few cores busy, so that on a CPU several runs side by side take less
    time than one after the other. The
    devices of an accelerator belong to one process; there runs are trained together as one program instead. The processes import
    the main module, so a script must make them under `if __name__ == "__main__"`.
    """

    def __init__(self, number: int):
        """Starts the processes.

        Args:
            number: Number of processes, at most that of processor cores.

        Raises:
            UserError: If it is larger.
        """
        context = multiprocessing.get_context("spawn")
        self._processes: dict[multiprocessing.connection.Connection, Any] = {}
        for cores in share_cores(number):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, cores, os.getpid()), daemon=True)
            process.start()
            theirs.close()
            self._processes[ours] = process

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *exception) -> None:
        for process in self._processes.values():
            process.terminate()
        for connection, process in self._processes.items():
            connection.close()  # Not before: the signal would meet a process that is already leaving.
            process.join()

    def train(
        self,
        configs: Sequence[ml_collections.ConfigDict],
        workdirs: Sequence[Path],
        *,
        titles: Sequence[str],
        report: Callable[[int, Result], None] = lambda index, result: None,
    ) -> list[Result]:
        """Trains runs as `train_many` does, and begins them in the order of the configs.

        Args:
            configs: As of `train_many`.
            workdirs: As of `train_many`.
            titles: As of `train_many`; the processes show no progress of their own.
            report: As of `train_many`.

        Returns:
            The results, in the order of the configs.

        Raises:
            UserError: As `train_many`, or if a process dies. After any error there may be fewer processes; make new ones.
            Interrupted: As `train_many`.
        """
        waiting = list(enumerate(zip(configs, workdirs, titles, strict=True)))[::-1]
        training: dict[multiprocessing.connection.Connection, int] = {}
        results: dict[int, Result] = {}
        with StopRequest() as stop:
            try:
                while waiting or training:
                    for connection in [each for each in self._processes if each not in training][: len(waiting)]:
                        index, (config, workdir, title) = waiting.pop()
                        self._exchange(connection, connection.send, (config.to_dict(), workdir, title))
                        training[connection] = index
                    ready = multiprocessing.connection.wait(list(training), _POLL_SECONDS)
                    for connection in [each for each in training if each in ready]:
                        index = training.pop(connection)
                        result, is_error = self._exchange(connection, connection.recv)
                        if is_error:
                            raise result
                        results[index] = result
                        report(index, result)
                    if stop.requested:
                        raise Interrupted("stopped; the same command goes on from there")
            except BaseException:
                for connection in training:  # Their runs write a checkpoint, and say so.
                    self._processes[connection].terminate()
                for connection in training:
                    with contextlib.suppress(*_GONE):
                        connection.recv()
                raise
        return [results[index] for index in range(len(configs))]

    def _exchange(self, connection, method, *arguments):
        try:
            return method(*arguments)
        except _GONE as error:
            process = self._processes[connection]
            process.join()
            status = process.exitcode
            reason = f"was killed (signal {-status}), for want of memory perhaps" if status < 0 else f"ended with status {status}"
            raise UserError(f"--processes: one {reason}; the same command, perhaps with fewer of them, goes on") from error


def _work(connection, cores, parent):
    """What a process does until its parent closes the connection."""
    os.sched_setaffinity(0, cores)  # Before anything has used a device.
    split_cpu()
    keep_freed_memory()
    warnings.showwarning = show_warning
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the parent passes it on.
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    with contextlib.suppress(*_GONE, KeyboardInterrupt):
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # Within the training loop it asks for a checkpoint.
        while True:
            connection.send(_train(*connection.recv()))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # All is on disk; what is left is leaving.


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
    except KeyboardInterrupt:
        return Interrupted("stopped before the first step"), True
    except Exception as error:
        where = "".join(traceback.format_exception(error))
        try:
            error = pickle.loads(pickle.dumps(error))
        except Exception:
            error = RuntimeError(str(error))
        error.add_note(where)
        return error, True
