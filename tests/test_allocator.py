import platform
import subprocess
import sys

import pytest

# Allocates and frees 200 MiB a few times and prints the page faults of the last time.
SCRIPT = """
import resource, sys
import numpy as np
from sast_jax.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(200 * 2**20, np.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_freed_memory_is_not_faulted_in_again():
    faults = {
        how: int(subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True).stdout)
        for how in ("keep", "return")
    }
    assert faults["keep"] < 0.1 * faults["return"]
