"""Runs in several processes at once, each on processor cores of its own."""

import concurrent.futures
import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import ml_collections

from sast_jax.allocator import keep_freed_memory
from sast_jax.errors import Interrupted, UserError, show_warning
from sast_jax.training.interruption import StopRequest
from sast_jax.training.session import Result

_POLL_SECONDS = 0.2

_is_stopped = threading.Event().is_set  # Of a process of `Workers`, its parent's.


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
        """Starts no process yet.

        Args:
            number: Number of processes, at most that of processor cores.

        Raises:
            UserError: If it is larger.
        """
        context = multiprocessing.get_context("spawn")
        shares = context.SimpleQueue()
        for cores in share_cores(number):
            shares.put(cores)
        self._stop = context.Event()
        self._pool = concurrent.futures.ProcessPoolExecutor(number, context, _begin, (shares, os.getpid(), self._stop))

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *exception) -> None:
        self._pool.shutdown(cancel_futures=True)

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
            titles: Not shown; the processes show no progress of their own.
            together: Not used; each process trains one run.
            report: As of `train_many`.

        Returns:
            The results, in the order of the configs.

        Raises:
            UserError: As `train_many`, or if a process dies.
            Interrupted: As `train_many`.
        """
        del together
        results: dict[int, Result] = {}
        with StopRequest() as stop:
            indices = {
                self._pool.submit(_train, config.to_dict(), workdir, title): index
                for index, (config, workdir, title) in enumerate(zip(configs, workdirs, titles, strict=True))
            }
            left = set(indices)
            try:
                while left:
                    if stop.requested:
                        raise Interrupted("stopped; the same command goes on from there")
                    done, left = concurrent.futures.wait(left, _POLL_SECONDS, concurrent.futures.FIRST_COMPLETED)
                    for future in done:
                        results[indices[future]] = future.result()
                        report(indices[future], results[indices[future]])
            except BaseException as error:
                for future in left:
                    future.cancel()
                self._stop.set()  # Runs in progress write a checkpoint; a process has asked for the next one already.
                concurrent.futures.wait(left)
                if not isinstance(error, BrokenProcessPool):
                    raise
                if stop.requested:  # A signal to all processes ends one that has no run.
                    raise Interrupted("stopped; the same command goes on from there") from error
                raise UserError(
                    "--processes: one was killed, for want of memory perhaps; the same command with fewer of them goes on"
                ) from error
        return [results[index] for index in range(len(configs))]


def _begin(shares, parent, stop):
    """Prepares a process, before anything has used a device in it."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, shares.get())
    keep_freed_memory()
    warnings.showwarning = show_warning
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the parent passes it on.
    signal.signal(signal.SIGTERM, _interrupt)
    threading.Thread(target=_watch, args=(parent, stop), daemon=True).start()
    global _is_stopped
    _is_stopped = stop.is_set


def _interrupt(number, frame):
    raise Interrupted("stopped before the first step")


def _watch(parent, stop):
    """Passes a request to stop on, and ends this process when its parent is gone, however it went."""
    while os.getppid() == parent:
        if stop.wait(_POLL_SECONDS):
            os.kill(os.getpid(), signal.SIGTERM)
            break
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    os._exit(1)


def _train(fields, workdir, title):
    from sast_jax.training.loop import train_many

    if _is_stopped():
        raise Interrupted("stopped before the first step")
    config = ml_collections.ConfigDict(fields).lock()
    (result,) = train_many([config], [workdir], titles=[title], together=1, show=False)
    return result
