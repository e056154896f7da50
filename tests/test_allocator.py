import os
import platform
import subprocess
import sys

import pytest

from sast_jax.allocator import PIECE

# Allocates and frees memory a few times, in a thread of its own or in the first one, and prints the page faults of the last time.
SCRIPT = """
import resource, sys, threading
import numpy as np
from sast_jax.allocator import expect_array, keep_freed_memory
how, where, *sizes = sys.argv[1:]
if how != "return":
    assert keep_freed_memory()
if how == "expect":
    expect_array(max(map(int, sizes)) * 2**20)
def allocate():
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        arrays = [np.ones(int(size) * 2**20, np.uint8) for size in sizes]
        del arrays
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
if where == "thread":
    thread = threading.Thread(target=allocate)
    thread.start()
    thread.join()
else:
    allocate()
"""

FLAG = "--xla_multiheap_size_constraint_per_heap"


def count_faults(*arguments):
    # Without this flag temporary arrays are expected to take several times the largest.
    environment = os.environ | {"XLA_FLAGS": f"{FLAG}=1"}
    command = [sys.executable, "-c", SCRIPT, *map(str, arguments)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)


@pytest.mark.perf
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
@pytest.mark.parametrize(
    ("how", "where", "sizes"), [("keep", "first", [200]), ("keep", "thread", [40, 50, 30]), ("expect", "thread", [200])]
)
def test_freed_memory_is_not_faulted_in_again(how, where, sizes):
    assert count_faults(how, where, *sizes) < 0.1 * count_faults("return", where, *sizes)


@pytest.mark.perf
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_only_arrays_that_an_arena_cannot_keep_make_threads_share_one():
    # What the main arena can keep, one of a thread cannot.
    assert count_faults("keep", "thread", 200) > 10 * count_faults("expect", "thread", 200)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only then anything is set")
@pytest.mark.parametrize(
    ("variables", "version", "expected"),
    [
        ({"JAX_PLATFORMS": "cpu"}, "0.10.2", f"{FLAG}=58720256"),
        ({"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--other"}, "0.12.0.1", f"--other {FLAG}=58720256"),
        ({"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{FLAG}=5"}, "0.10.2", f"{FLAG}=5"),
        ({"JAX_PLATFORMS": "cuda,cpu"}, "0.10.2", ""),
        ({"JAX_PLATFORMS": "cpu"}, "0.13.0", ""),  # XLA ends a process for a flag that it does not have.
    ],
)
def test_temporary_arrays_come_in_pieces_on_a_cpu_that_knows_the_flag(variables, version, expected):
    script = (
        "import importlib.metadata, os; version = importlib.metadata.version\n"
        f"importlib.metadata.version = lambda name: {version!r} if name == 'jaxlib' else version(name)\n"
        "from sast_jax.allocator import keep_freed_memory; keep_freed_memory()\n"
        "print(os.environ.get('XLA_FLAGS', '').strip())"
    )
    environment = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "JAX_PLATFORMS")} | variables
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert result.stdout.strip() == expected


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only then anything is set")
@pytest.mark.parametrize(("num_bytes", "is_in_pieces"), [(PIECE, True), (PIECE + 1, False)])
def test_nothing_comes_in_pieces_where_an_array_is_larger(num_bytes, is_in_pieces):
    script = (
        "import os; from sast_jax.allocator import expect_array, keep_freed_memory; keep_freed_memory()\n"
        f"expect_array({num_bytes}); print(os.environ['XLA_FLAGS'])"
    )
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--other"}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert result.stdout.strip() == (f"--other {FLAG}={PIECE}" if is_in_pieces else "--other")
