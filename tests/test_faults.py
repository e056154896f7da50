"""Full disks, damaged and foreign files, two processes: a message, and nothing lost."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore

from sast_jax import load_run
from sast_jax.cli import main
from sast_jax.config import SCHEMA, to_json
from sast_jax.errors import Interrupted, SuspicionWarning, UserError
from sast_jax.files import MAX_JSON_BYTES, only_process, write_json
from sast_jax.training import init_state, read_metrics, train_and_evaluate, train_variants
from sast_jax.training.build import make_network, make_optimizer
from sast_jax.training.checkpoints import Checkpoints, restore
from sast_jax.training.progress import Progress
from tests.conftest import assert_trees_equal


@pytest.fixture
def config(trained):
    """Config of the trained run of SAST."""
    return trained.config()


@pytest.fixture
def holder():
    """Returns a function that lets another process have a folder."""
    processes = []
    code = "import sys, time, pathlib\nfrom sast_jax.files import only_process\n"
    code += "with only_process(pathlib.Path(sys.argv[1])):\n    print(flush=True)\n    time.sleep(60)"

    def hold(folder):
        process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE)
        process.stdout.readline()
        processes.append(process)
        return process

    yield hold
    for process in processes:
        process.kill()
        process.communicate()


def snapshot(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"}


def test_second_process_is_refused_by_name_until_the_first_is_killed(tiny, holder, tmp_path):
    process = holder(tmp_path / "run")
    with pytest.raises(UserError, match=rf"is in use by process {process.pid} on .+; wait for it"):
        train_and_evaluate(tiny(), tmp_path / "run")
    assert not any(path.name != ".lock" for path in (tmp_path / "run").iterdir())
    process.send_signal(signal.SIGKILL)
    process.wait()
    with (
        only_process(tmp_path / "run"),
        pytest.raises(UserError, match=f"process {os.getpid()} on"),
        only_process(tmp_path / "run"),
    ):
        pass


@pytest.mark.parametrize("held", ["", "sast"])
def test_pair_is_not_begun_if_another_process_has_a_part_of_it(tiny, holder, tmp_path, held):
    holder(tmp_path / held)
    with pytest.raises(UserError, match="is in use by process"):
        train_variants({"baseline": tiny("baseline"), "sast": tiny("sast")}, tmp_path)
    assert not list(tmp_path.rglob("run.json"))


def test_finished_run_is_reported_though_another_process_has_its_folder(config, run, holder):
    holder(run)
    before = snapshot(run)
    assert train_and_evaluate(config, run)["num_test"] == 20
    assert snapshot(run) == before


def test_folder_that_cannot_be_locked_gets_a_warning(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.warns(SuspicionWarning, match="cannot be locked here"), only_process(tmp_path):
        pass


@pytest.fixture
def full_disk():
    """Returns a context in which no file may grow beyond some bytes, as on a full disk; Python ignores the signal of it."""

    class Full:
        def __init__(self, size):
            self.limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, self.limits[1]))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)

    return Full


# The threads that the checkpointer leaves behind when a write fails complain to event loops that are closed by then.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_run_that_met_a_full_disk_goes_on_bit_for_bit(trained, config, tmp_path, monkeypatch, full_disk):
    save = Checkpoints.save

    def full_from_the_second_on(self, state, **meta):
        if state.step < 6:
            return save(self, state, **meta)
        self.wait()
        with full_disk(4096):
            save(self, state, **meta)
            self.close()

    monkeypatch.setattr(Checkpoints, "save", full_from_the_second_on)
    with pytest.raises(UserError, match=r"a checkpoint could not be written to .*Make room"):
        train_and_evaluate(config, tmp_path / "full")
    assert load_run(tmp_path / "full").step == 3
    monkeypatch.setattr(Checkpoints, "save", save)
    train_and_evaluate(config, tmp_path / "full")
    assert_trees_equal(load_run(tmp_path / "full").params, load_run(trained.pair).params)


def test_full_disk_leaves_the_old_file_and_no_half_of_the_new_one(tmp_path, full_disk):
    write_json(tmp_path / "results.json", [1])
    with full_disk(100), pytest.raises(OSError, match="File too large"):
        write_json(tmp_path / "results.json", list(range(1000)))
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert json.loads((tmp_path / "results.json").read_text()) == [1]


@pytest.fixture
def as_nobody():
    """Permissions bind, though the tests may run as root."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield
    os.seteuid(user)


def test_read_only_folder_is_a_message(run, tmp_path, request):
    for path in (tmp_path.parent, tmp_path, run):
        path.chmod(0o755)
    run.chmod(0o555)
    request.getfixturevalue("as_nobody")
    with pytest.raises(UserError, match=r"cannot write to .*Permission denied"), only_process(run):
        pass
    with pytest.raises(OSError, match="Permission denied"):
        write_json(run / "evaluation.json", {})


def test_clock_that_runs_backwards_changes_nothing(trained, config, tmp_path, monkeypatch):
    advance, steps, now = Progress.advance, [], time.time()

    def stop(self):
        advance(self)
        steps.append(1)
        if len(steps) == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Progress, "advance", stop)
    monkeypatch.setattr(time, "time", lambda: now - 60 * len(steps))  # A minute back at each step.
    with pytest.raises(Interrupted, match="stopped at step 5"):
        train_and_evaluate(config, tmp_path / "run")
    monkeypatch.setattr(time, "time", lambda: now - 1e8)
    results = train_and_evaluate(config, tmp_path / "run")
    assert 0 < results["wall_time_seconds"] < 600
    assert_trees_equal(load_run(tmp_path / "run").params, load_run(trained.pair).params)


def go_on(run, config):
    """Makes the run unfinished and trains it again."""
    (run / "results.json").unlink()
    return train_and_evaluate(config, run)


def damage_of(kind, file):
    if kind == "removed":
        file.unlink()
    elif kind == "cut off":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    else:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(bytes(content))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["removed", "cut off", "bit flipped"])
def test_checkpoint_damaged_anywhere_is_refused_or_read_unharmed(config, run, kind, capfd):
    target = state_of(config)
    good, _ = restore(run, target)
    messages = []
    for file in sorted((run / "checkpoints" / "6").rglob("*")):
        if file.is_file() and file.stat().st_size:
            before = file.read_bytes()
            damage_of(kind, file)
            try:
                assert_trees_equal(restore(run, target)[0], good)
            except UserError as error:
                messages.append(str(error))
            file.write_bytes(before)
    assert len(messages) >= 4
    assert all(str(run / "checkpoints" / "6") in message for message in messages)
    assert "Traceback" not in capfd.readouterr().err


def test_damaged_checkpoint_is_kept_and_the_one_before_it_serves(config, run):
    expected = load_run(run).params
    damaged = run / "checkpoints" / "6"
    damage_of("cut off", max((damaged / "state").rglob("d/*"), key=lambda path: path.stat().st_size))
    before = snapshot(run)
    with pytest.raises(UserError, match="move that folder elsewhere to use the one before it, of step 3"):
        go_on(run, config)
    (run / "results.json").write_bytes(before[run / "results.json"])
    assert snapshot(run) == before
    shutil.rmtree(damaged)
    go_on(run, config)
    assert_trees_equal(load_run(run).params, expected)


@pytest.mark.parametrize("name", ["7", "007", "notes", "6.orbax-checkpoint-tmp-1", "99999999999999999999999"])
def test_foreign_folder_among_checkpoints_is_named_or_left_alone(config, run, name):
    foreign = run / "checkpoints" / name
    foreign.mkdir()
    if name == str(int(name) if name.isdigit() else ""):
        with pytest.raises(UserError, match=f"checkpoints/{name}'"):
            go_on(run, config)
    else:
        go_on(run, config)
        assert load_run(run).step == 6


def test_checkpoint_under_another_step_is_refused(run):
    (run / "checkpoints" / "6").rename(run / "checkpoints" / "9")
    with pytest.raises(UserError, match=r"was changed after it was written.*\n.*its step is 6"):
        load_run(run)


def test_checkpoint_beyond_the_end_is_refused(config, run):
    state = state_of(config)
    shutil.rmtree(run / "checkpoints")
    checkpoints = Checkpoints(run)
    checkpoints.save(state.__class__(jnp.int32(60), state.params, state.opt_state), seconds=1.0)
    checkpoints.close()
    with pytest.raises(UserError, match="checkpoint of step 60, but the run ends at 6"):
        go_on(run, config)


def state_of(config):
    return init_state(make_network(config, 10), make_optimizer(config, 6), np.zeros((3, 1, 34, 34, 2)), seed=0)


def saved(folder, state):
    checkpoints = Checkpoints(folder)
    checkpoints.save(state, seconds=1.0)
    checkpoints.close()
    return folder


def test_state_of_other_types_names_or_shapes_is_refused_and_never_cast(config, tmp_path):
    state = state_of(config)
    assert_trees_equal(restore(saved(tmp_path / "same", state), state)[0], state)
    half = state.replace(params=jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state.params))
    wide = state.replace(params={**state.params, "readout": {**state.params["readout"], "bias": jnp.zeros(11)}})
    more = state.replace(params={**state.params, "extra": jnp.zeros(2)})
    for name, other, message in (
        ("half", half, r"params.readout.bias: the checkpoint has bfloat16\[10\], the run float32\[10\]"),
        ("wide", wide, r"params.readout.bias: the checkpoint has float32\[11\], the run float32\[10\]"),
        ("more", more, r"params.extra: the checkpoint has float32\[2\], the run nothing"),
    ):
        with pytest.raises(UserError, match=message):
            restore(saved(tmp_path / name, other), state)
    with pytest.raises(UserError, match=r"params.extra: the checkpoint has nothing, the run float32\[2\]"):
        restore(tmp_path / "same", more)


def test_weights_that_are_not_finite_are_named(config, tmp_path):
    state = state_of(config)
    kernel = state.params["dense_0"]["kernel"].at[3, 1].set(jnp.nan)
    state = state.replace(params={**state.params, "dense_0": {**state.params["dense_0"], "kernel": kernel}})
    with pytest.raises(UserError, match=r"dense_0.kernel holds numbers that are not finite"):
        restore(saved(tmp_path, state), state)


@pytest.mark.parametrize(("shape", "chunks"), [([100_000, 100_000], [100_000, 100_000]), ([2312, 8], [100_000, 100_000])])
def test_checkpoint_that_asks_for_forty_gigabytes_is_refused_in_time(run, shape, chunks):
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{run}/checkpoints/6/state/"}).result()
    key = b"params.dense_0.kernel/.zarray"
    header = json.loads(store.read(key).result().value)
    store.write(key, json.dumps({**header, "shape": shape, "chunks": chunks}).encode()).result()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"params.dense_0.kernel: .*100000, 100000\]"):
        load_run(run)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1e6  # Kilobytes.


def rewrite(run, **changes):
    content = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**content, **changes}))


def test_run_of_an_earlier_version_is_read_and_gone_on_with(config, run, monkeypatch):
    rewrite(run, format=1)
    content = json.loads((run / "run.json").read_text())
    del content["format"], content["config"]["sam"]["start"]
    (run / "run.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"sam.start: is missing"):
        load_run(run)
    monkeypatch.setitem(SCHEMA, "sam.start", SCHEMA["sam.start"].or_else(0.0))
    assert load_run(run).config.sam.start == 0.0
    assert go_on(run, config)["num_test"] == 20


def test_run_of_another_format_is_refused_with_the_version_that_wrote_it(trained, config, run):
    for changes, message in (
        ({"format": 2}, r"is of sast_jax 0.1.0, which wrote runs of format 2; this version reads format 1"),
        ({"config": {**to_json(config), "shape": 3}}, r"its config, of sast_jax 0.1.0, .*\n.*shape: there is no such field"),
    ):
        shutil.copy(trained.pair / "sast/run.json", run)
        rewrite(run, **changes)
        for attempt in (lambda: load_run(run), lambda: go_on(run, config)):
            shutil.copy(trained.pair / "sast/results.json", run)
            with pytest.raises(UserError, match=message):
                attempt()


HOSTILE = {
    "empty": b"",
    "cut off": b"{",
    "deep": b"[" * 100_000,
    "no text": b"\xff\xfe\x00",
    "wrong types": b'{"config": 1, "data": [], "environment": "x", "seconds": "many"}',
    "wrong values": b'{"config": {"a.b": {"c": 1}}, "data": {"checksum": 1, "num_classes": 1e99}, "environment": {}, '
    b'"seconds": -1}',
    "huge": b'{"config": {}, "data": {"checksum": "x", "num_classes": 40000000000}, "environment": {}, "seconds": NaN}',
    "outside": b'["../../outside"]',
    "results": b'{"surrogate_accuracy": "x", "hard_accuracy": [], "transfer_gap": null, "num_test": {}}',
}


@pytest.mark.parametrize("name", ["run.json", "results.json", "runs.json", "checkpoints/6/meta/metadata"])
@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_hostile_json_is_a_message(run, name, content, capsys):
    (run / name).write_bytes(content)
    assert main(["evaluate", f"--workdir={run}"]) == 2
    captured = capsys.readouterr().err
    assert captured.startswith("sast-jax: error: ")
    assert name.partition("/")[0] in captured
    assert "Traceback" not in captured


def test_json_without_end_or_measure_is_a_message(run, capsys):
    (run / "run.json").unlink()
    os.mkfifo(run / "run.json")  # Reading it would wait for ever.
    assert main(["evaluate", f"--workdir={run}"]) == 2
    (run / "run.json").unlink()
    with (run / "run.json").open("wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    assert main(["evaluate", f"--workdir={run}"]) == 2
    assert "67108864 are allowed" in capsys.readouterr().err


def test_damaged_line_among_the_metrics_is_named_and_nothing_is_lost(trained, config, run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    for damaged in ("{not json", '{"epoch": 1}', "3", '{"step": "x"}', "[" * 100_000):
        text = "\n".join([damaged, *lines]) + "\n"
        (run / "metrics.jsonl").write_text(text)
        shutil.copy(trained.pair / "sast/results.json", run)
        with pytest.raises(UserError, match=r"metrics.jsonl: line 1 is damaged .*; remove that line"):
            go_on(run, config)
        assert (run / "metrics.jsonl").read_text() == text
    (run / "metrics.jsonl").write_text("\n".join([*lines, "{not json"]))
    assert [line["step"] for line in read_metrics(run)] == [3, 6]
