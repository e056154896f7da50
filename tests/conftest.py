import contextlib
import gc
import io
import os
import shutil
import struct
from pathlib import Path
from typing import NamedTuple

import jax
import jaxlib.version
import numpy as np
import pytest

from sast_jax.cli import main
from sast_jax.config import load_configs
from sast_jax.data.cache import Recordings

# Tests compile far more than they compute, so they ask XLA for quick compilation instead of quick programs.
# `pytest -m "slow or perf"` in `.ci/run` compiles as users' programs are compiled: there XLA_FLAGS sets the level.
# The flags are read when jax is first used.
OPTIMIZATION = "--xla_backend_optimization_level"
if OPTIMIZATION not in os.environ.get("XLA_FLAGS", ""):
    flags = [os.environ.get("XLA_FLAGS", ""), f"{OPTIMIZATION}=0"]
    if jaxlib.version.__version_info__ < (0, 11):  # Halves the time of compilation; later versions end at an unknown flag.
        flags.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join(flags)


@pytest.fixture(scope="session")
def _shared(tmp_path_factory):
    """A folder of this run of the tests, of all its processes."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(autouse=True, scope="session")
def _own_cache(_shared):
    """No test reads or writes the user's cache."""
    before = os.environ.get("SAST_JAX_CACHE")
    os.environ["SAST_JAX_CACHE"] = str(_shared / "cache")
    yield
    os.environ.pop("SAST_JAX_CACHE")
    if before is not None:
        os.environ["SAST_JAX_CACHE"] = before


@pytest.fixture(autouse=True, scope="session")
def _compile_once(_shared):
    """Equal programs of different tests are compiled once; many tests train the same small network. All on one device."""
    jax.config.update("jax_compilation_cache_dir", str(_shared / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    assert len(jax.devices()) == 1  # In use from here on, so that no command splits the CPU of this process.


@pytest.fixture
def four_devices(monkeypatch):
    """Python processes started by the test have four virtual devices."""
    monkeypatch.setenv("XLA_FLAGS", f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4")


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


def write_small_nmnist(root):
    """Writes a folder in N-MNIST's layout with 4 training and 2 test recordings of each digit, a blob in a place of its digit."""
    rng = np.random.default_rng(0)
    for part, number in (("Train", 4), ("Test", 2)):
        for digit in range(10):
            for i in range(number):
                times = np.sort(rng.integers(0, 310_000, 400))
                xs = np.clip(rng.normal(5 + 6 * (digit % 5), 2, 400), 0, 33).astype(int)
                ys = np.clip(rng.normal(8 + 16 * (digit // 5), 2, 400), 0, 33).astype(int)
                events = zip(xs.tolist(), ys.tolist(), times.tolist(), rng.integers(0, 2, 400).tolist(), strict=True)
                write_nmnist_file(root / part / str(digit) / f"{i:05d}.bin", events)
    return root


@pytest.fixture(scope="session")
def _written_nmnist(tmp_path_factory):
    return write_small_nmnist(tmp_path_factory.mktemp("nmnist") / "data")


@pytest.fixture
def small_nmnist(_written_nmnist, tmp_path):
    """The folder of `write_small_nmnist`, the test's own."""
    return shutil.copytree(_written_nmnist, tmp_path / "data")


@pytest.fixture(scope="session")
def gesture_root():
    """The folder of real DVS128 Gesture recordings."""
    root = Path(os.environ.get("SAST_JAX_DATA", "")) / "DVSGesture"
    if not os.environ.get("SAST_JAX_DATA") or not root.is_dir():
        pytest.skip("needs real DVS128 Gesture recordings in $SAST_JAX_DATA/DVSGesture")
    return root


def write_aedat(path, packets, header="#!AER-DAT3.1\r\n#Format: RAW\r\n#Source 0: DVS128\r\n#!END-HEADER\r\n"):
    """Writes packets of polarity events (x, y, t, p) in AEDAT 3.1, independently of the reader."""
    raw = bytearray(header.encode())
    for events in packets:
        overflow = events[0][2] >> 31 if events else 0
        raw += struct.pack("<hhiiiiii", 1, 0, 8, 4, overflow, len(events), len(events), len(events))
        for x, y, t, p in events:
            raw += struct.pack("<Ii", x << 17 | y << 2 | p << 1 | 1, t & 0x7FFFFFFF)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(raw))


def gesture_events(seed, *, num_events=300, start=0, length=900_000):
    """Events (x, y, t, p) anywhere on the sensor, in order; the first one at the start."""
    rng = np.random.default_rng(seed)
    times = np.sort(rng.integers(start, start + length, num_events))
    times[0] = start
    x, y, p = rng.integers(0, 128, num_events), rng.integers(0, 128, num_events), rng.integers(0, 2, num_events)
    return list(zip(x.tolist(), y.tolist(), times.tolist(), p.tolist(), strict=True))


@pytest.fixture(scope="session")
def _written_gestures(tmp_path_factory):
    root = tmp_path_factory.mktemp("gestures") / "gestures"
    for part, users in (("Train", (1, 7)), ("Test", (24, 29))):
        for user in users:
            folder = root / f"ibmGesture{part}" / f"user{user:02d}_led"
            folder.mkdir(parents=True)
            for label in range(11):
                x, y, t, p = zip(*gesture_events(100 * user + label), strict=True)
                np.save(folder / f"{label}.npy", np.array([x, y, p, np.array(t) / 1000], np.float32).T)
    return root


@pytest.fixture
def small_gestures(_written_gestures, tmp_path):
    """A folder in tonic's layout of DVS128 Gesture: 4 users, 2 of them of the test part, 11 classes each."""
    return shutil.copytree(_written_gestures, tmp_path / "gestures")


@pytest.fixture
def small_aedat(tmp_path):
    """A folder in the layout of DVS128 Gesture's authors: 2 users, 3 gestures each, class 8 twice; and its events by id."""
    expected = {}
    for user in (2, 25):
        name = f"user{user:02d}_natural"
        lines, packets = ["class,startTime_usec,endTime_usec"], []
        for i, (label, gesture) in enumerate(((1, "0"), (8, "7"), (8, "7-2"))):
            start = 5_000_000 * (i + 1)
            events = gesture_events(10 * user + i, start=start)
            expected[f"{name}/{gesture}"] = [(x, y, t - start, p) for x, y, t, p in events]
            lines.append(f"{label},{start},{start + 1_000_000}")
            between = gesture_events(1000 + i, num_events=5, start=start + 2_000_000, length=100)
            packets += [events[:100], events[100:], between]
        write_aedat(tmp_path / "original" / f"{name}.aedat", packets)
        (tmp_path / "original" / f"{name}_labels.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "original", expected


TINY = [
    "dataset.num_time_steps=3",
    "dataset.num_validation=10",
    "network.kind=mlp",
    "network.features=8",
    "batch_size=10",
    "num_epochs=10",
    "evaluate_every_epochs=2",
    "checkpoint_every_epochs=3",
]


@pytest.fixture
def tiny(small_nmnist):
    """Returns a function from a variant and overrides to the config of a run of 30 steps."""

    def load(variant="sast", *overrides):
        return load_configs(f"configs/nmnist.py:{variant}", [*TINY, f"dataset.root={small_nmnist}", *overrides])[""]

    return load


class Trained(NamedTuple):
    """A pair of tiny runs, `baseline` and `sast`, as `sast-jax train` leaves them; tests that change it copy it.

    Attributes:
        pair: Their folder. Each has 6 steps, in 2 epochs, and a checkpoint of steps 3 and 6.
        data: Folder of the recordings.
        fields: Of the command, but for the folder of the recordings.
        out: What the command printed.
        err: What it printed to standard error.
    """

    pair: Path
    data: Path
    fields: list[str]
    out: str
    err: str

    def config(self, name="sast"):
        return load_configs(str(self.pair / name / "run.json"))[""]


@pytest.fixture(scope="session")
def trained(_written_nmnist, tmp_path_factory):
    """The trained pair, for reading."""
    fields = [
        "dataset.num_time_steps=3",
        "dataset.num_validation=10",
        "network.kind=mlp",
        "network.features=8,6",
        "batch_size=10",
    ]
    fields += ["num_epochs=2", "evaluate_every_epochs=1", "checkpoint_every_epochs=1"]
    folder, out, err = tmp_path_factory.mktemp("trained") / "pair", io.StringIO(), io.StringIO()
    overrides = [f"--config.{field}" for field in [*fields, f"dataset.root={_written_nmnist}"]]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert main(["train", "--config=configs/nmnist.py", f"--workdir={folder}", *overrides]) == 0, err.getvalue()
    gc.freeze()  # What is loaded by now stays, so no collection need look through it.
    return Trained(folder, _written_nmnist, fields, out.getvalue(), err.getvalue())


@pytest.fixture
def pair(trained, tmp_path):
    """A copy of the trained pair."""
    return shutil.copytree(trained.pair, tmp_path / "pair")


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the trained run of SAST."""
    return shutil.copytree(trained.pair / "sast", tmp_path / "run")


def assert_trees_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture
def recordings():
    rng = np.random.default_rng(1)
    frames = rng.integers(0, 3, (7, 3, 4, 4, 2)).astype(np.uint8)
    return Recordings(frames, np.arange(7, dtype=np.int32), np.array([f"r{i}" for i in range(7)]))
