"""What is no regular file is named and never waited for; what is too large is named and never read."""

import functools
import gzip
import json
import os
import resource
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest

from sast_jax.data import decoders, load_dataset
from sast_jax.data.images import read_idx
from sast_jax.data.simulated import NMNIST, simulate_saccades
from sast_jax.errors import UserError
from sast_jax.files import read_json, read_regular
from sast_jax.training import read_metrics
from tests.conftest import gesture_events, write_aedat

READERS = {
    "0.bin": decoders.read_nmnist_file,
    "0.npy": decoders.read_gesture_array,
    "a.aedat": decoders.read_aedat,
    "a_labels.csv": decoders.read_gesture_labels,
    "train-images-idx3-ubyte.gz": functools.partial(read_idx, num_dimensions=3),
    "train-images-idx3-ubyte": functools.partial(read_idx, num_dimensions=3),
    "a.json": read_json,
    "any": functools.partial(read_regular, max_bytes=2**20),
}


@pytest.fixture
def little_memory():
    """256 MiB beyond what the process has of address space, and back."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 256 * 2**20, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("what", ["pipe", "device", "folder"])
def test_reader_waits_for_no_pipe_and_reads_no_device_or_folder(tmp_path, name, what):
    if what == "pipe":
        os.mkfifo(tmp_path / name)
    elif what == "device":
        (tmp_path / name).symlink_to("/dev/zero")
    else:
        (tmp_path / name).mkdir()
    with pytest.raises(OSError, match=f"(it is no regular file, but a pipe, socket or device|Is a directory): .*{name}"):
        READERS[name](tmp_path / name)


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
@pytest.mark.parametrize("name", READERS)
def test_sparse_file_of_gigabytes_is_refused_before_it_is_read(tmp_path, name, little_memory):
    with (tmp_path / name).open("wb") as file:
        if name == "0.npy":
            header = "{'descr': '|u1', 'fortran_order': False, 'shape': (500000000, 4), }".ljust(117) + "\n"
            file.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode())
        file.truncate(2_000_000_000 + file.tell())
    with pytest.raises(ValueError, match=r"(2000000...|500,000,000) .*[\d,]+ are allowed"):
        READERS[name](tmp_path / name)


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
@pytest.mark.parametrize("sizes", [(60_000, 28, 28), (5_000_000, 28, 28)], ids=["says less", "says it"])
def test_small_archive_cannot_unpack_to_gigabytes(tmp_path, sizes, little_memory):
    file = tmp_path / "train-images-idx3-ubyte.gz"
    block = gzip.compress(bytes(2**24))  # Archives may follow each other in a file.
    header = b"\0\0\x08\x03" + np.array(sizes, ">u4").tobytes()
    file.write_bytes(gzip.compress(header) + block * 128)
    assert file.stat().st_size < 3e6
    with pytest.raises(ValueError, match=r"holds more \(truncated, or damaged\)|bytes; 536,870,912 are allowed"):
        read_idx(file, 3)


def test_recordings_that_hold_nothing_but_zeros_are_named(small_nmnist, small_gestures):
    (small_nmnist / "Train/3/00001.bin").write_bytes(bytes(4000))
    with pytest.raises(UserError, match=r"Train/3/00001.bin: holds 4,000 bytes that are all 0 \(a copy that was cut off"):
        load_dataset("nmnist", root=str(small_nmnist), num_time_steps=3, num_validation=0)
    np.save(small_gestures / "ibmGestureTrain/user01_led/3.npy", np.zeros((800, 4), np.float32))
    with pytest.raises(UserError, match=r"user01_led/3.npy: holds 800 equal events \(zero-filled: a copy that was cut off\)"):
        load_dataset("dvs_gesture", root=str(small_gestures), num_time_steps=2, num_validation=0)


@pytest.mark.parametrize("name", ["Train/3/00001.bin", "ibmGestureTrain/user01_led/3.npy", "user02_natural_labels.csv"])
def test_data_set_with_a_pipe_names_it_and_does_not_wait(name, request):
    fixture = {"Tr": "small_nmnist", "ib": "small_gestures", "us": "small_aedat"}[name[:2]]
    root = request.getfixturevalue(fixture)
    root = root[0] if fixture == "small_aedat" else root
    (root / name).unlink()
    os.mkfifo(root / name)
    kind = "nmnist" if fixture == "small_nmnist" else "dvs_gesture"
    with pytest.raises(UserError, match=f"^dataset.root: {root / name}: cannot be read \\(it is no regular file, but a pipe"):
        load_dataset(kind, root=str(root), num_time_steps=2, num_validation=0)


def test_images_that_are_a_pipe_are_named(tmp_path):
    os.mkfifo(tmp_path / "train-images-idx3-ubyte")
    with pytest.raises(UserError, match="has no train-images-idx3-ubyte or train-images"):
        load_dataset("digits", images=str(tmp_path), num_time_steps=2, num_validation=0)


def test_images_as_bytes_are_simulated_as_their_intensities():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 28, 28)).astype(np.uint8)
    kinds = (pixels, pixels / np.float32(255))  # The second takes four times the memory, for all images at once.
    a, b = (list(simulate_saccades(images, seed=1, recorder=NMNIST)) for images in kinds)
    assert [x.tolist() for x in a] == [x.tolist() for x in b]
    assert len(a[0]) > 100


def test_cache_file_that_is_a_pipe_is_named_and_not_waited_for(recordings, tmp_path, monkeypatch):
    from sast_jax.data import cache

    monkeypatch.setenv("SAST_JAX_CACHE", str(tmp_path))
    cache.load_or_build({"name": "x"}, lambda: recordings)
    (file,) = tmp_path.iterdir()
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(UserError, match="is a pipe; only a regular file is written to"):
        cache.load_or_build({"name": "x"}, lambda: recordings)
    assert file.is_fifo()


def test_metrics_of_gigabytes_are_named_and_not_read(tmp_path):
    with (tmp_path / "metrics.jsonl").open("wb") as file:
        file.truncate(2_000_000_000)
    with pytest.raises(UserError, match=r"metrics.jsonl: it has 2000000000 bytes; 268435456 are allowed; it is no"):
        read_metrics(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of a step with its checkpoint, from which tests take copies."""
    from sast_jax.config import load_configs
    from sast_jax.training import train_and_evaluate
    from tests.conftest import TINY, write_small_nmnist

    folder = tmp_path_factory.mktemp("bounded")
    root = write_small_nmnist(folder / "data")
    overrides = [*TINY, f"dataset.root={root}", "num_epochs=1", "checkpoint_every_epochs=1"]
    train_and_evaluate(load_configs("configs/nmnist.py:baseline", overrides)[""], folder / "run")
    return folder / "run"


@pytest.mark.parametrize("name", ["state/_METADATA", "state/manifest.ocdbt", "meta/metadata", "state/d"])
@pytest.mark.parametrize("what", ["pipe", "gigabytes"])
def test_checkpoint_with_a_pipe_or_a_sparse_file_is_refused_at_once(finished, tmp_path, name, what):
    from sast_jax import load_run

    run = shutil.copytree(finished, tmp_path / "run")
    (step,) = (run / "checkpoints").iterdir()
    file = next((step / name).iterdir()) if (step / name).is_dir() else step / name
    if what == "pipe":
        file.unlink()
        os.mkfifo(file)
    else:
        os.truncate(file, 4_000_000_000)
    message = "it is no regular file, but a pipe" if what == "pipe" else f"{file.name}': it has 4000000000 bytes"
    with pytest.raises(UserError, match=f"--workdir: the checkpoint '{step}' was changed after it was written: .*{message}"):
        load_run(run)


def test_gesture_file_uses_less_memory_than_a_table_of_its_numbers(tmp_path):
    write_aedat(tmp_path / "a.aedat", [gesture_events(0)])
    np.save(tmp_path / "0.npy", np.array([[1, 2, 0, 3.5], [4, 5, 1, 6.5]], np.float64))
    assert decoders.read_gesture_array(tmp_path / "0.npy").tolist() == [(1, 2, 0, 0), (4, 5, 3000, 1)]


def test_written_files_follow_the_umask_and_leave_nothing_beside(tmp_path):
    program = "import os, sys; os.umask(int(sys.argv[1], 8)); from pathlib import Path; from sast_jax.files import write_json;"
    program += "write_json(Path(sys.argv[2]), {'a': 1})"
    for mask in ("077", "002", "022"):
        file = tmp_path / mask / "a.json"
        file.parent.mkdir()
        subprocess.run([sys.executable, "-c", program, mask, str(file)], check=True)
        assert json.loads(file.read_text()) == {"a": 1}
        assert file.stat().st_mode & 0o777 == 0o666 & ~int(mask, 8)
        assert [path.name for path in file.parent.iterdir()] == ["a.json"]
