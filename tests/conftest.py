import os
from pathlib import Path

import jax
import numpy as np
import pytest

from sast_jax.data.cache import Recordings


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """No test reads or writes the user's cache."""
    before = os.environ.get("SAST_JAX_CACHE")
    os.environ["SAST_JAX_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("SAST_JAX_CACHE")
    if before is not None:
        os.environ["SAST_JAX_CACHE"] = before


@pytest.fixture(autouse=True, scope="session")
def _compile_once(tmp_path_factory):
    """Equal programs of different tests are compiled once; many tests train the same small network."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def nmnist_root():
    """The folder of real N-MNIST recordings."""
    root = Path(os.environ.get("SAST_JAX_DATA", "")) / "NMNIST"
    if not os.environ.get("SAST_JAX_DATA") or not root.is_dir():
        pytest.skip("needs real N-MNIST recordings in $SAST_JAX_DATA/NMNIST")
    return root


def write_nmnist_file(path, events):
    """Writes events (x, y, t, p) in N-MNIST's 40-bit format, independently of the reader."""
    raw = bytearray()
    for x, y, t, p in events:
        raw += bytes([x, y, (p << 7) | (t >> 16), (t >> 8) & 255, t & 255])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(raw))


@pytest.fixture
def small_nmnist(tmp_path):
    """A folder in N-MNIST's layout with 4 training and 2 test recordings of each digit, a blob in a place of its digit."""
    rng = np.random.default_rng(0)
    for part, number in (("Train", 4), ("Test", 2)):
        for digit in range(10):
            for i in range(number):
                times = np.sort(rng.integers(0, 310_000, 400))
                xs = np.clip(rng.normal(5 + 6 * (digit % 5), 2, 400), 0, 33).astype(int)
                ys = np.clip(rng.normal(8 + 16 * (digit // 5), 2, 400), 0, 33).astype(int)
                events = zip(xs.tolist(), ys.tolist(), times.tolist(), rng.integers(0, 2, 400).tolist(), strict=True)
                write_nmnist_file(tmp_path / "data" / part / str(digit) / f"{i:05d}.bin", events)
    return tmp_path / "data"


@pytest.fixture
def recordings():
    rng = np.random.default_rng(1)
    frames = rng.integers(0, 3, (7, 3, 4, 4, 2)).astype(np.uint8)
    return Recordings(frames, np.arange(7, dtype=np.int32), np.array([f"r{i}" for i in range(7)]))
