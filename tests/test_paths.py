"""Folders of any name, links, devices and other people's files: what is written where, and what is left alone."""

import json
import os
import re
import resource
import shutil
import stat
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from sast_jax import load_run
from sast_jax.cli import main
from sast_jax.compilation import keep_compiled
from sast_jax.config import load_configs, to_json
from sast_jax.data.cache import Recordings, load_or_build
from sast_jax.errors import UserError
from sast_jax.files import append_line, atomic_write, cache_dir, local_path, only_process, write_json
from sast_jax.training import train_and_evaluate
from sast_jax.training.build import load_data
from sast_jax.training.checkpoints import Checkpoints, latest_step, restore
from sast_jax.training.state import TrainState
from tests.conftest import TINY, assert_trees_equal, write_small_nmnist

PARAMS = {"dense": {"kernel": np.arange(12, dtype=np.float32).reshape(3, 4)}}


def state_at(step):
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf) + step, PARAMS)
    return TrainState(jnp.int32(step), params, optax.adam(0.1).init(params))


def save(workdir, *steps, identity=None):
    checkpoints = Checkpoints(workdir, identity)
    for step in steps:
        checkpoints.save(state_at(step), seconds=float(step))
    checkpoints.close()


def save_as_before(workdir, step):
    """Writes a checkpoint with nothing but orbax, as earlier versions did."""
    folder = (workdir / "checkpoints").absolute()
    with ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(max_to_keep=2)) as manager:
        state = ocp.args.StandardSave(state_at(step).__dict__)
        manager.save(step, args=ocp.args.Composite(state=state, meta=ocp.args.JsonSave({"seconds": 1.0})))
        manager.wait_until_finished()


NAMES = [
    "features=[4,8]",
    "a[",
    "]",
    "back\\slash",
    "back\\slash[1]",
    "what?",
    "all*",
    "{x}",
    "50%",
    "#1",
    "it's",
    "über\u0301",
    "a\nb",
]
NOT_UTF_8 = "caf\udce9"


@pytest.mark.parametrize("name", [*NAMES, NOT_UTF_8, "\U0001f600"])
def test_checkpoints_in_a_folder_of_any_name_are_read_back(tmp_path, name):
    workdir = tmp_path / name / "run"
    save(workdir, 3, 6)
    assert_trees_equal(restore(workdir, state_at(0))[0], state_at(6))
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["3", "6"]
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.filterwarnings("ignore")  # Orbax's own, of what it leaves out.
@pytest.mark.parametrize("name", ["features=[4,8]", "back\\slash"])
def test_checkpoints_that_earlier_versions_left_in_parts_are_read(tmp_path, name):
    workdir = tmp_path / name
    save_as_before(workdir, 6)
    assert not (workdir / "checkpoints" / "6" / "state" / "manifest.ocdbt").exists()
    before = sorted(tmp_path.rglob("*"))
    assert_trees_equal(restore(workdir, state_at(0))[0], state_at(6))
    assert sorted(tmp_path.rglob("*")) == before


def test_local_folder_called_as_cloud_storage_is_local():
    workdir = local_path("/gs/sast_jax_test", "--workdir")
    if os.geteuid() != 0 or workdir.parent.exists():
        pytest.skip("needs to make /gs")
    try:
        save(workdir, 3)
        assert_trees_equal(restore(workdir, state_at(0))[0], state_at(3))
        assert (workdir / "checkpoints" / "3" / "state" / "manifest.ocdbt").is_file()
    finally:
        shutil.rmtree(workdir.parent)


def test_run_in_a_folder_of_brackets_is_evaluated_and_gone_on_with(tmp_path, capsys):
    root = write_small_nmnist(tmp_path / "data")
    workdir = tmp_path / "runs" / "features=[4,8]"
    overrides = [*TINY, f"dataset.root={root}", "num_epochs=1"]
    config = load_configs("configs/nmnist.py:baseline", overrides)[""]
    results = train_and_evaluate(config, workdir)
    assert main(["evaluate", f"--workdir={workdir}"]) == 0
    evaluation = json.loads((workdir / "evaluation.json").read_text())
    assert evaluation["transfer"]["hard_accuracy"] == results["hard_accuracy"]
    (workdir / "results.json").unlink()
    assert train_and_evaluate(config, workdir)["hard_accuracy"] == results["hard_accuracy"]


def test_first_checkpoint_that_cannot_be_read_back_ends_training(tmp_path, monkeypatch):
    handler = ocp.StandardCheckpointHandler
    monkeypatch.setattr(handler, "restore", lambda *_, **__: 1 / 0)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state_at(3), seconds=1.0)
    with pytest.raises(
        UserError, match=r"checkpoints/3' was written but cannot be read back \(ZeroDivisionError.*Choose another"
    ):
        checkpoints.wait()
    monkeypatch.undo()
    checkpoints.close()


def test_checkpoint_of_other_numbers_than_were_saved_ends_training(tmp_path, monkeypatch):
    real = ocp.StandardCheckpointHandler.restore
    monkeypatch.setattr(
        ocp.StandardCheckpointHandler, "restore", lambda *a, **k: jax.tree.map(lambda leaf: leaf * 0, real(*a, **k))
    )
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state_at(3), seconds=1.0)
    with pytest.raises(UserError, match="other numbers came back"):
        checkpoints.close()


@pytest.mark.parametrize("url", ["gs://bucket/a", "s3://bucket/a", "https://host/a", "file:///tmp/a", "gs:/bucket/a", "HDFS://a"])
def test_url_is_refused_before_anything_is_written(tmp_path, monkeypatch, capsys, url):
    monkeypatch.chdir(tmp_path)
    for command in (
        ["train", "--config=none.py", f"--workdir={url}"],
        ["evaluate", f"--workdir={url}"],
        ["export", "--workdir=run", f"--output={url}"],
        ["sweep", "--config=none.py", f"--workdir={url}"],
        ["data", "info", f"--config={url}"],
        ["data", "info", "--config=none.py", f"--workdir={url}"],
    ):
        assert main(command) == 2
        assert f"must be a path on this machine; got the URL {url!r}" in capsys.readouterr().err
    with pytest.raises(UserError, match="--workdir: must be a path on this machine"):
        load_run(url)
    assert not any(tmp_path.iterdir())


def test_home_is_expanded_wherever_a_user_names_a_path(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    root = write_small_nmnist(tmp_path / "home" / "data")
    config = load_configs("configs/nmnist.py:baseline", [*TINY, "dataset.root=~/data", "num_epochs=1"])[""]
    write_json(tmp_path / "home" / "config.json", to_json(config))
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--config=~/config.json", "--workdir=~/runs/a"]) == 0
    assert main(["train", "--config=~/config.json", "--workdir=~/runs/b", "--config.warm_start=~/runs/a"]) == 0
    assert main(["export", "--workdir=~/runs/b", "--output=~/net.nir"]) == 0
    assert load_run("~/runs/b").step == 3
    assert sorted(path.name for path in (tmp_path / "home").iterdir()) == ["config.json", "data", "net.nir", "runs"]
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert root.is_dir()
    assert capsys.readouterr().out.count("Results: ") == 2


@pytest.mark.parametrize("home", ["", None])
def test_no_home_is_a_hint_and_no_folder_of_that_sign(tmp_path, monkeypatch, home):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SAST_JAX_CACHE")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path) if home is None else monkeypatch.setenv("HOME", home)
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=r"no home folder is known.*SAST_JAX_CACHE"):
        cache_dir()
    with pytest.raises(UserError, match="--workdir: '~/a' needs a home folder"):
        local_path("~/a", "--workdir")
    assert not keep_compiled()
    assert local_path("~nobody-has-this-name/a", "--workdir").name == "a"
    assert not any(tmp_path.iterdir())


def tree(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("place", ["in the run", "through a link"])
def test_other_folders_among_the_checkpoints_are_left_alone(tmp_path, place):
    workdir, folder = tmp_path / "run", tmp_path / "run" / "checkpoints"
    if place == "through a link":
        (tmp_path / "disk").mkdir()
        workdir.mkdir()
        folder.symlink_to(tmp_path / "disk")
    save(workdir, 3, 6)
    (folder / "1").mkdir()
    (folder / "1" / "notes.txt").write_text("mine")
    shutil.copytree(folder / "3", folder / "2")
    save(tmp_path / "other", 4, identity={"config": {"seed": 1}})
    shutil.copytree(tmp_path / "other" / "checkpoints" / "4", folder / "4")
    (folder / "5.orbax-checkpoint-tmp.txt").write_text("mine")
    before = tree(folder)
    save(workdir, 9, 12, identity={"config": {"seed": 0}})
    assert sorted(path.name for path in folder.iterdir()) == ["1", "12", "2", "3", "4", "5.orbax-checkpoint-tmp.txt", "6", "9"]
    assert before.items() <= tree(folder).items()


def test_last_two_checkpoints_of_a_run_are_kept_over_its_sessions(tmp_path):
    identity = {"config": {"seed": 0, "network.features": [4, 8]}, "data": {"checksum": "x"}}
    save(tmp_path, 3, 6, identity=identity)
    save(tmp_path, 9, identity=identity)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["6", "9"]
    save(tmp_path, 12, 15, 18, identity=identity)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["15", "18"]


def test_half_written_checkpoint_of_a_killed_command_is_removed(tmp_path):
    leftover = tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp" / "state.orbax-checkpoint-tmp"
    leftover.mkdir(parents=True)
    (leftover / "d").write_bytes(bytes(100))
    save(tmp_path, 6)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["6"]


def test_run_that_is_read_while_training_replaces_its_checkpoints_gives_a_later_one(tmp_path, monkeypatch):
    save(tmp_path, 3)
    real, seen = ocp.StandardCheckpointHandler.metadata, []

    def replaced_meanwhile(self, folder):
        if not seen:
            save(tmp_path, 6, 9)
        seen.append(folder)
        return real(self, folder)

    monkeypatch.setattr(ocp.StandardCheckpointHandler, "metadata", replaced_meanwhile)
    assert latest_step(tmp_path) == 3
    assert_trees_equal(restore(tmp_path, state_at(0))[0], state_at(9))
    assert len(seen) == 2


def test_damaged_checkpoint_is_never_to_be_deleted(tmp_path):
    save(tmp_path, 3, 6)
    for step, advice in ((6, "move that folder elsewhere to use the one before it, of step 3"), (3, "restore it from a copy")):
        (tmp_path / "checkpoints" / str(step) / "state" / "manifest.ocdbt").write_bytes(b"x")
        with pytest.raises(UserError, match=f"checkpoints/{step}' cannot be read .*{advice}") as error:
            restore(tmp_path, state_at(0))
        assert "remove" not in str(error.value)
        assert "delete" not in str(error.value)
        shutil.move(tmp_path / "checkpoints" / str(step), tmp_path / f"kept-{step}")


def test_lock_file_that_is_a_link_or_of_others_is_not_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    (tmp_path / "run").mkdir()
    lock = tmp_path / "run" / ".lock"
    lock.symlink_to(tmp_path / "thesis.tex")
    with (
        pytest.raises(UserError, match=r"\.lock' is a symbolic link; only a regular file is written to"),
        only_process(tmp_path / "run"),
    ):
        pass
    lock.unlink()
    lock.write_text("of an editor")
    with (
        only_process(tmp_path / "run"),
        pytest.raises(UserError, match="is in use by another process"),
        only_process(tmp_path / "run"),
    ):
        pass
    assert lock.read_text() == "of an editor"
    assert (tmp_path / "thesis.tex").read_text() == "mine"
    lock.unlink()
    os.mkfifo(lock)
    with pytest.raises(UserError, match=r"\.lock' is a pipe"), only_process(tmp_path / "run"):
        pass


def write_whole(path):
    write_json(path, {})


def write_line(path):
    append_line(path, "{}")


@pytest.mark.parametrize("write", [write_whole, write_line])
def test_files_of_a_run_are_written_to_regular_files_alone(tmp_path, write):
    target = tmp_path / "mine"
    target.write_text("mine")
    path = tmp_path / "results.json"
    for make, kind in (
        (lambda: path.symlink_to(target), "a symbolic link"),
        (lambda: path.symlink_to(tmp_path / "nothing"), "a symbolic link"),
        (lambda: os.mkfifo(path), "a pipe"),
        (lambda: os.mknod(path, stat.S_IFCHR, os.makedev(1, 3)) if os.geteuid() == 0 else os.mkfifo(path), "a (device|pipe)"),
    ):
        make()
        with pytest.raises(UserError, match=f"results.json' is {kind}; only a regular file is written to"):
            write(path)
        path.unlink()
    assert target.read_text() == "mine"
    assert [each.name for each in tmp_path.iterdir()] == ["mine"]


def test_output_that_is_a_link_is_written_to_what_it_points_to(tmp_path):
    (tmp_path / "disk").mkdir()
    for target in (tmp_path / "disk" / "net.nir", tmp_path / "disk" / "new.nir"):
        link = tmp_path / target.name
        link.symlink_to(target)
        with atomic_write(link, follow=True) as file:
            file.write(b"graph")
        assert link.is_symlink()
        assert target.read_bytes() == b"graph"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe' is a pipe"), atomic_write(tmp_path / "pipe", follow=True):
        pass
    with pytest.raises(UserError, match="/dev/null' is a device"), atomic_write(tmp_path.__class__("/dev/null"), follow=True):
        pass
    with pytest.raises(UserError, match="disk' is a folder"), atomic_write(tmp_path / "disk", follow=True):
        pass


def test_what_killed_writers_leave_is_removed_and_what_living_ones_and_others_have_is_not(tmp_path):
    path = tmp_path / "results.json"
    (tmp_path / ".results.json.a1b2c3d4").write_text("{")  # Of a killed command.
    others = [".results.json.backup", ".results.json.a1b2c3d4e", ".vscode.settings", "x.results.json.a1b2c3d4", ".results.jsonx"]
    for name in others:
        (tmp_path / name).write_text("mine")
    with atomic_write(path) as living:
        write_json(path, [1])
        living.write(b"[2]")
    assert json.loads(path.read_text()) == [2]
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted(["results.json", *others])


def test_files_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_json(tmp_path / "a.json", {})
        append_line(tmp_path / "metrics.jsonl", "{}")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o640}


def test_error_of_the_disk_names_the_file(tmp_path):
    with pytest.raises(OSError, match=r"No space left on device: .*results.json'"), atomic_write(tmp_path / "results.json"):
        raise OSError(28, "No space left on device")
    with pytest.raises(OSError, match=r"other\.txt"), atomic_write(tmp_path / "results.json"):
        (tmp_path / "other.txt").read_bytes()
    assert not any(tmp_path.iterdir())


def test_half_written_cache_of_a_killed_command_is_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("SAST_JAX_CACHE", str(tmp_path))
    recordings = Recordings(np.zeros((1, 1, 1, 1, 2), np.uint8), np.zeros(1, np.int32), np.array(["a"]))
    load_or_build({"name": "digits", "a": 1}, lambda: recordings)
    before = sorted(tmp_path.iterdir())
    (tmp_path / ".nmnist-0123456789abcdef.npz.k3x_9abc").write_bytes(bytes(1000))
    (tmp_path / ".nmnist.npz.notes").write_text("mine")
    load_or_build({"name": "digits", "a": 1}, lambda: 1 / 0)
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / ".nmnist.npz.notes"])


@pytest.fixture
def limit():
    """Returns a function that sets the soft limit of a resource until the test ends."""
    before = {}

    def set_limit(which, number):
        before.setdefault(which, resource.getrlimit(which))
        resource.setrlimit(which, (number, before[which][1]))

    yield set_limit
    for which, limits in before.items():
        resource.setrlimit(which, limits)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("which", ["full disk", "moved"])
def test_checkpoint_that_cannot_be_written_is_one_message_that_says_what_to_do(tmp_path, limit, capfd, which):
    save(tmp_path / "warm", 1)  # Loads what opens files of its own.
    checkpoints = Checkpoints(tmp_path / "run")
    checkpoints.save(state_at(3), seconds=1.0)
    checkpoints.wait()
    if which == "full disk":
        limit(resource.RLIMIT_FSIZE, 300)
        message = r"File too large.*earlier ones are kept. Make room, or allow larger files"
    else:
        (tmp_path / "run").rename(tmp_path / "elsewhere")
        (tmp_path / "run").write_text("in the way")
        message = r"Not a directory"

    def save_and_wait():
        checkpoints.save(state_at(6), seconds=2.0)
        checkpoints.wait()

    with pytest.raises(UserError, match=f"a checkpoint could not be written to .*{message}"):
        save_and_wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.getrlimit(resource.RLIMIT_FSIZE)[1],) * 2)
    checkpoints.close()
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    assert_trees_equal(restore(tmp_path / ("elsewhere" if which == "moved" else "run"), state_at(0))[0], state_at(3))


def test_recordings_and_folders_that_are_not_utf_8_work(tmp_path, monkeypatch):
    monkeypatch.setenv("SAST_JAX_CACHE", str(tmp_path / NOT_UTF_8 / "cache"))
    root = write_small_nmnist(tmp_path / NOT_UTF_8 / "data")
    for part in ("Train", "Test"):
        (root / part / "3" / "00000.bin").rename(root / part / "3" / f"{NOT_UTF_8}.bin")
    config = load_configs("configs/nmnist.py:baseline", [*TINY, f"dataset.root={root}"])[""]
    splits = load_data(config, corruption=("drop", 1))
    assert r"Test/3/caf\xe9" in splits.test.ids
    assert load_data(config).describe()["checksum"] == load_data(config).describe()["checksum"]


# Which call of which library fails first, and so how it words the error, depends on how many files are open by then.
TOO_MANY = (
    r"\((OSError: \[Errno 24\] )?Too many open files.*\); earlier ones are kept. Allow more open files "
    r"\(ulimit -n 4096\), and the same command"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("resources", "message"),
    [
        ("-n 10", TOO_MANY),
        ("-n 16", TOO_MANY),
        (
            "-f 60",
            r"\(File too large\); earlier ones are kept. Make room, or allow larger files \(ulimit -f unlimited\), and the",
        ),
    ],
)
def test_command_that_cannot_save_ends_with_one_message(tmp_path, resources, message):
    root = write_small_nmnist(tmp_path / "data")
    fields = [f"--config.{field}" for field in [*TINY, f"dataset.root={root}", "num_epochs=2", "checkpoint_every_epochs=1"]]
    command = [sys.executable, "-m", "sast_jax", "train", "--config=configs/nmnist.py:sast", f"--workdir={tmp_path / 'run'}"]
    subprocess.run([*command[:3], "data", "prepare", command[4], *fields], check=True, capture_output=True)
    limited = ["bash", "-c", f'ulimit {resources}; exec "$@"', "bash", *command, *fields]
    ended = subprocess.run(limited, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 2, ended.stderr
    errors = [line for line in ended.stderr.splitlines() if not line.startswith("run: ")]
    assert len(errors) == 1, ended.stderr
    assert re.search(f"^sast-jax: error: --workdir: a checkpoint could not be written to .* {message}", errors[0])
    again = subprocess.run([*command, *fields], capture_output=True, text=True, timeout=120, check=False)
    assert again.returncode == 0, again.stderr
