"""Files that commands read, damaged at random: each ends in one message, is left out by name, or does no harm."""

import json
import os
import resource
import shutil

import numpy as np
import pytest

from sast_jax.cli import main
from sast_jax.files import cache_dir

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::sast_jax.errors.SuspicionWarning")]

NUM_DAMAGES = 60


def damage(content, rng):
    """A damaged copy of a file's content: cut, extended, flipped, zeroed, repeated, replaced by noise, or emptied."""
    kind = rng.integers(7)
    where = int(rng.integers(len(content) + 1))
    if kind == 0:
        return content[:where]
    if kind == 1:
        return content + rng.bytes(int(rng.integers(1, 200)))
    if kind == 2:
        flipped = bytearray(content)
        for position in rng.integers(0, len(content), 1 + int(rng.integers(8))):
            flipped[position] ^= 1 << int(rng.integers(8))
        return bytes(flipped)
    if kind == 3:
        return content[:where] + bytes(len(content) - where)
    if kind == 4:
        return content[:where] + content
    if kind == 5:
        return rng.bytes(len(content))
    return b""


def ends_well(status, error):
    assert status in (0, 2)
    assert "Traceback" not in error
    assert all(character.isprintable() or character == "\n" for character in error)
    if status:
        assert error.count("sast-jax: error: ") == 1, error


def info(capsys, name, root, *overrides):
    command = ["data", "info", f"--config=configs/{name}.py:baseline", f"--config.dataset.root={root}"]
    status = main([*command, "--config.dataset.num_validation=2", *overrides])
    captured = capsys.readouterr()
    ends_well(status, captured.err)
    return status, captured


@pytest.mark.parametrize("skip_bad", [False, True])
@pytest.mark.parametrize("file", ["nmnist", "gestures", "aedat", "labels"])
def test_damaged_recordings_and_labels_are_named(file, skip_bad, small_nmnist, small_gestures, small_aedat, capsys):
    roots = {"nmnist": small_nmnist, "gestures": small_gestures, "aedat": small_aedat[0], "labels": small_aedat[0]}
    endings = {"nmnist": "*.bin", "gestures": "*.npy", "aedat": "*.aedat", "labels": "*.csv"}
    root, rng = roots[file], np.random.default_rng([len(file), skip_bad])
    victim = sorted(root.rglob(endings[file]))[0]
    content, statuses = victim.read_bytes(), set()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(NUM_DAMAGES):
        victim.write_bytes(damage(content, rng))
        config = "nmnist" if file == "nmnist" else "dvs_gesture"
        status, captured = info(capsys, config, root, f"--config.dataset.skip_bad={skip_bad}")
        assert not status or str(root) in captured.err or "dataset" in captured.err
        statuses.add(status)
    assert 2 in statuses or skip_bad
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2e6  # Kilobytes.


def test_damaged_cache_is_read_anew_and_never_trusted(small_nmnist, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("SAST_JAX_CACHE", str(tmp_path / "cache"))
    _, good = info(capsys, "nmnist", small_nmnist)
    rng = np.random.default_rng(0)
    (cached,) = cache_dir().glob("nmnist-*.npz")
    content = cached.read_bytes()
    for _ in range(NUM_DAMAGES):
        cached.write_bytes(damage(content, rng))
        status, captured = info(capsys, "nmnist", small_nmnist)
        assert status == 0
        assert captured.out == good.out


STUDY = """
import runpy
from sast_jax.experiments import METHODS, Study, change

def get_config(variant=""):
    config = runpy.run_path("configs/digits.py")["get_config"]("baseline")
    config.network.update(kind="mlp", features=(4,))
    config.dataset.update(num_time_steps=2, downsample=2)
    config.update(num_epochs=1, evaluate_every_epochs=1, checkpoint_every_epochs=1, batch_size=256)
    return change(config, variant)

def get_study():
    return Study({"baseline": METHODS["baseline"]}, seeds=(0, 1), selection_seeds=())
"""


def test_damaged_study_folder_ends_in_one_message_or_goes_on(tmp_path, capsys):
    (tmp_path / "study.py").write_text(STUDY)
    command = ["sweep", f"--config={tmp_path / 'study.py'}"]
    assert main([*command, f"--workdir={tmp_path / 'good'}"]) == 0
    rng = np.random.default_rng(0)
    names = ["study.json", "tested/baseline-seed0/results.json", "tested/baseline-seed0/run.json", "results.json"]
    for number, name in enumerate(names * 8):
        folder = shutil.copytree(tmp_path / "good", tmp_path / str(number))
        (folder / name).write_bytes(damage((folder / name).read_bytes(), rng))
        status = main([*command, f"--workdir={folder}"])
        ends_well(status, capsys.readouterr().err)
        if status == 0:  # What was written again is what it was.
            assert json.loads((folder / "results.json").read_text())["methods"].keys() == {"baseline"}
        shutil.rmtree(folder)


def test_pipes_devices_and_loops_in_place_of_files_end_in_one_message(small_nmnist, capsys):
    victim = sorted(small_nmnist.rglob("*.bin"))[0]
    makers = {
        "pipe": lambda: os.mkfifo(victim),
        "loop": lambda: victim.symlink_to(victim),
        "device": lambda: victim.symlink_to("/dev/zero"),
        "folder": victim.mkdir,
        "nowhere": lambda: victim.symlink_to("nowhere"),
    }
    for make in makers.values():
        victim.unlink(missing_ok=True)
        make()
        status, _ = info(capsys, "nmnist", small_nmnist)
        assert status == 2
        if victim.is_dir() and not victim.is_symlink():
            victim.rmdir()
