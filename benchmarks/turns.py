"""Candidates that take turns in one process, so that what slows the machine slows all of them."""

import itertools
import os
import time

import jax
import numpy as np
from publish import Parser, processor

from sast_jax.allocator import keep_freed_memory


def take_turns(functions, rounds):
    """Returns the seconds of each function in each round; what a function returns is waited for."""
    seconds = {name: [] for name in functions}
    for _, (name, function) in itertools.product(range(rounds), functions.items()):
        start = time.perf_counter()
        jax.block_until_ready(function())
        seconds[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in seconds.items()}


def compare(seconds, reference):
    """Quartiles of the times, and the median of their ratios to those of the reference, round by round."""
    return {
        "milliseconds": [round(1e3 * float(q), 3) for q in np.quantile(seconds, (0.25, 0.5, 0.75))],
        "ratio": round(float(np.median(seconds / reference)), 3),
    }


def show(row, digits):
    """Median, quartiles and ratio, as the cells of a table."""
    low, median, high = (f"{value:.{digits}f}" for value in row["milliseconds"])
    return f"{median} ({low} - {high}) | {row['ratio']:.2f}"


def begin(description):
    """Returns the arguments of the command line, and what they and the process are, which it prepares."""
    parser = Parser(description)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    rounds = 2 if args.small else args.rounds
    keep_freed_memory()
    return args, {
        "device": processor() if jax.default_backend() == "cpu" else jax.devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0)),
        "jax": jax.__version__,
        "load_average": os.getloadavg()[0],
        "rounds": rounds,
    }


def describe(environment):
    """What `begin` found, as the caption of a table."""
    return "jax {jax} on {cores} {device} cores, {rounds} rounds, load {load_average:.1f} at the start.".format(**environment)
