import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from sast_jax import Calibration, cli, load_run
from sast_jax.cli import format_table, main
from sast_jax.errors import SuspicionWarning, UserError, show_warning
from sast_jax.evaluation.suites import SUITES
from sast_jax.training.build import load_data
from sast_jax.training.progress import Progress
from tests.conftest import assert_trees_equal, write_nmnist_file

TINY = [
    "--config.dataset.num_time_steps=3",
    "--config.dataset.num_validation=10",
    "--config.network.kind=mlp",
    "--config.network.features=8",
    "--config.batch_size",
    "10",
    "--config.num_epochs=2",
]


@pytest.fixture
def train(small_nmnist, tmp_path):
    """Returns a function that runs `sast-jax train` in this process and returns its exit status."""

    def run(*arguments, config="configs/nmnist.py", root=small_nmnist):
        workdir = f"--workdir={tmp_path / 'run'}"
        return main(["train", f"--config={config}", workdir, f"--config.dataset.root={root}", *TINY, *arguments])

    return run


def refused(capsys, status):
    """Returns the message of a command that ended with status 2, after checking that it is one."""
    captured = capsys.readouterr()
    assert status == 2
    assert captured.err.startswith("sast-jax: error: ")
    assert "Traceback" not in captured.err
    return captured.err


@pytest.fixture
def train_pair(trained, pair):
    """Returns a function that runs the command of the trained pair, with more arguments, on its copy, or one run of it."""

    def run(*arguments, name="", root=trained.data):
        overrides = [f"--config.{field}" for field in [*trained.fields, f"dataset.root={root}"]]
        config = f"configs/nmnist.py:{name}".rstrip(":")
        return main(["train", f"--config={config}", f"--workdir={pair / name}", *overrides, *arguments])

    return run


def test_train_prints_accuracies_and_gaps_and_evaluate_finds_them_again(trained, pair, capsys):
    assert main(["evaluate", f"--workdir={pair}"]) == 0
    again = capsys.readouterr().out
    runs = json.loads((pair / "results.json").read_text())["runs"]
    assert list(runs) == ["baseline", "sast"]
    for text in (trained.out, again):
        heading, *lines = text.splitlines()[:3]
        assert heading.split() == ["run", "surrogate", "hard", "gap", "test", "samples", "gradients", "seconds"]
        for line, (name, run) in zip(lines, runs.items(), strict=True):
            cells = line.split()
            assert cells[0] == name
            assert [cells[1], cells[3]] == [f"{100 * run[f'{mode}_accuracy']:.1f}" for mode in ("surrogate", "hard")]
            assert float(cells[5]) == pytest.approx(100 * run["transfer_gap"], abs=0.051)
    evaluation = json.loads((pair / "sast" / "evaluation.json").read_text())
    assert evaluation["transfer"]["hard_accuracy"] == runs["sast"]["hard_accuracy"]


def test_finished_runs_are_reported_again_though_recordings_are_gone(trained, train_pair, pair, capsys, tmp_path):
    assert "epoch" in trained.err
    assert train_pair() == 0
    again = capsys.readouterr()
    assert again.out == trained.out.replace(str(trained.pair), str(pair))
    assert not again.err
    assert train_pair(root=tmp_path / "gone") == 0
    assert capsys.readouterr() == again
    tables = []
    for root in (trained.data, tmp_path / "gone"):
        assert train_pair(name="sast", root=root) == 0
        single = capsys.readouterr()
        assert not single.err
        tables.append(single.out)
    assert tables[0] == tables[1]
    assert tables[0].splitlines()[1].split() == again.out.splitlines()[2].split()


def move_recordings(run, root):
    """Changes where a run says that its recordings are."""
    content = json.loads((run / "run.json").read_text())
    content["config"]["dataset"]["root"] = str(root)
    (run / "run.json").write_text(json.dumps(content))


def test_recordings_that_moved_are_found_by_evaluate(trained, run, capsys, tmp_path):
    move_recordings(run, tmp_path / "gone")
    assert "does not exist" in refused(capsys, main(["evaluate", f"--workdir={run}"]))
    assert main(["evaluate", f"--workdir={run}", f"--config.dataset.root={trained.data}"]) == 0
    capsys.readouterr()
    message = refused(capsys, main(["evaluate", f"--workdir={run}", "--config.sam.rho=1"]))
    assert "only dataset.root, dataset.download and dataset.images can be set" in message


def test_suites_are_gathered_in_one_file_until_the_weights_change(run, capsys):
    assert main(["evaluate", f"--workdir={run}", "--suite=synops,transfer"]) == 0
    table = capsys.readouterr()
    assert "effective ACs" in table.out
    assert "evaluation.json" in table.out
    assert "run: synops (2 of 2)" in table.err
    first = json.loads((run / "evaluation.json").read_text())
    assert first.keys() == {"step", "weights", "transfer", "synops"}
    assert main(["evaluate", f"--workdir={run}"]) == 0
    assert json.loads((run / "evaluation.json").read_text()) == first

    (run / "evaluation.json").write_text(json.dumps({**first, "step": first["step"] - 1}))
    assert main(["evaluate", f"--workdir={run}"]) == 0
    assert json.loads((run / "evaluation.json").read_text()).keys() == {"step", "weights", "transfer"}


@pytest.mark.slow
def test_all_suites_agree_on_what_they_share(run, capsys):
    assert main(["evaluate", f"--workdir={run}", "--suite=all"]) == 0
    written = json.loads((run / "evaluation.json").read_text())
    assert written.keys() == {"step", "weights", *SUITES}
    assert written["calibration"]["split"] == "validation"
    assert written["calibration"]["methods"]["none"]["accuracy"] == written["transfer"]["hard_accuracy"]
    assert written["robustness"]["clean"]["hard_accuracy"] == written["transfer"]["hard_accuracy"]
    assert written["quantization"]["float"]["synops"]["dense"] == written["synops"]["dense"]
    assert all(row["reference"]["equal"] for row in written["quantization"]["configurations"])
    assert all(result["num_test"] == 20 for suite, result in written.items() if suite in SUITES)
    table = capsys.readouterr().out
    for text in ("gradient_channel", "INT4 per channel, decay power", "hot_pixels"):
        assert text in table

    method = written["calibration"]["methods"]["threshold_channel"]
    found = Calibration(*(tuple(map(np.array, method[key].values())) for key in ("thresholds", "gains")))
    loaded = load_run(run)
    test = load_data(loaded.config).test
    decided = np.asarray(loaded.predict(test.frames.swapaxes(0, 1), "hard", found)).argmax(-1)
    assert np.mean(decided == test.labels) == method["accuracy"]


def test_unknown_suite_is_refused(capsys, tmp_path):
    message = refused(capsys, main(["evaluate", f"--workdir={tmp_path}", "--suite=transfer,synopses"]))
    assert "--suite: must be of transfer, calibration, quantization, synops, robustness, all" in message
    assert "got 'synopses'" in message


def test_mistakes_in_the_config_are_told_together(train, capsys, tmp_path):
    message = refused(capsys, train("--config.sam.rhoo=1", "--config.network.decay=2", root=tmp_path / "none"))
    assert "sam.rhoo: there is no such field; did you mean sam.rho?" in message
    assert "network.decay: must be a finite number from 0 to 1; got 2.0" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("variant", ["", ":sast"])
def test_missing_data_folder_is_refused_before_anything_is_written(train, capsys, tmp_path, variant):
    assert "does not exist" in refused(capsys, train(root=tmp_path / "none", config=f"configs/nmnist.py{variant}"))
    assert not (tmp_path / "run").exists()


def test_damaged_recording_is_named(train, capsys, small_nmnist):
    (small_nmnist / "Train/3/00001.bin").write_bytes(b"1234567")
    write_nmnist_file(small_nmnist / "Test/4/00001.bin", [(99, 1, 10, 0)])
    message = refused(capsys, train())
    assert "Train/3/00001.bin: size must be a positive multiple of 5 bytes; got 7" in message
    assert "Test/4/00001.bin: event x must be 0 to 33; got 99 to 99" in message


def test_batch_larger_than_the_training_part_is_refused(train, capsys):
    assert "batch_size: must be at most the number of training samples, 30; got 31" in refused(
        capsys, train("--config.batch_size=31")
    )


def test_folder_of_another_config_or_kind_is_refused(train, train_pair, pair, run, capsys):
    before = (pair / "sast" / "results.json").read_text()
    message = refused(capsys, train_pair("--config.num_epochs=3", name="sast"))
    assert "num_epochs: the run has 2, the config 3" in message
    assert (pair / "sast" / "results.json").read_text() == before
    assert "is a single run" in refused(capsys, train())
    assert (run / "results.json").read_text() == before


def test_folder_that_is_no_run_is_refused(capsys, tmp_path):
    assert "is no run" in refused(capsys, main(["evaluate", f"--workdir={tmp_path}"]))
    assert "is no run" in refused(capsys, main(["evaluate", f"--workdir={tmp_path / 'none'}"]))
    (tmp_path / "run.json").write_text("{ not json")
    assert "cannot be read as JSON" in refused(capsys, main(["evaluate", f"--workdir={tmp_path}"]))


def test_foreign_files_in_a_folder_are_refused_and_left_alone(train, capsys, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for name, text in (("run.json", "{}"), ("results.json", "[1]"), ("results.json", '{"accuracy": 1}')):
        (run / name).write_text(text)
        assert name in refused(capsys, train(config="configs/nmnist.py:sast"))
        assert "run" in refused(capsys, train())
        assert (run / name).read_text() == text
        (run / name).unlink()


def test_results_without_the_run_that_they_are_of_are_refused(train_pair, pair, capsys):
    (pair / "sast" / "run.json").unlink()
    assert "has results.json but no run.json" in refused(capsys, train_pair("--config.seed=5", name="sast"))


def test_damaged_checkpoint_is_named(run, capsys):
    for file in (run / "checkpoints" / "6" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:10])
    message = refused(capsys, main(["evaluate", f"--workdir={run}"]))
    assert str(run / "checkpoints" / "6") in message


def test_half_of_a_pair_is_not_taken_for_the_whole(pair):
    shutil.rmtree(pair / "sast")
    (pair / "results.json").unlink()
    with pytest.raises(UserError, match=r"pair/sast' is no run"):
        load_run(pair)


def test_cache_that_cannot_be_written_is_a_message(train, capsys, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SAST_JAX_CACHE", str(tmp_path / "file" / "below"))
    assert "SAST_JAX_CACHE" in refused(capsys, train())


def test_workdir_that_is_a_file_or_cannot_be_made_is_refused(capsys, tmp_path):
    (tmp_path / "file").touch()
    for workdir in (tmp_path / "file", tmp_path / "file" / "below"):
        status = main(["train", "--config=configs/digits.py:sast", f"--workdir={workdir}", "--config.num_epochs=1"])
        assert "--workdir" in refused(capsys, status)


@pytest.mark.parametrize(
    "arguments",
    [[], ["trian"], ["train"], ["train", "--config=configs/digits.py"], ["evaluate"], ["evaluate", "--workdir=x", "--what"]],
)
def test_wrong_command_line_shows_its_usage(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert "usage: sast-jax" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "evaluate", "theory", "data", "export", "sweep", "report"])
def test_help_of_each_command_shows_an_example_that_parses(command, capsys):
    with pytest.raises(SystemExit) as error:
        main([command, "--help"])
    assert error.value.code == 0
    (example,) = re.findall(r"^example: sast-jax (.+)$", capsys.readouterr().out, re.M)
    assert example.split()[0] == command
    assert cli._parse(example.split())[0].command == command


def test_table_aligns_its_columns():
    result = {"surrogate_accuracy": 0.9, "hard_accuracy": 0.95, "transfer_gap": -0.05, "num_test": 20}
    lines = format_table({"a": result, "longer": {**result, "wall_time_seconds": 3.4}}).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split() == ["a", "90.0", "%", "95.0", "%", "-5.0", "20", "-", "-"]
    assert format_table({"untested": {"num_test": 0}}).splitlines()[1].split() == ["untested", "-", "-", "-", "0", "-", "-"]


def test_interrupted_command_leaves_a_checkpoint_and_goes_on(trained, train_pair, pair, capsys, monkeypatch):
    shutil.rmtree(pair / "sast")
    advance, steps = Progress.advance, []
    signals = {2: signal.SIGINT, 4: signal.SIGTERM}

    def interrupt(self):
        advance(self)
        steps.append(1)
        if len(steps) in signals:
            os.kill(os.getpid(), signals[len(steps)])

    monkeypatch.setattr(Progress, "advance", interrupt)
    for step in signals:
        assert train_pair(name="sast") == 130
        error = capsys.readouterr().err
        assert error.splitlines()[-1].startswith(f"sast-jax: interrupted: stopped at step {step} of 6")
        stopped = load_run(pair / "sast")
        assert (stopped.step, stopped.results) == (step, None)
    assert train_pair(name="sast") == 0
    error = capsys.readouterr().err
    assert [line.split(",")[0] for line in error.splitlines() if "epoch" in line] == ["sast: epoch 2"]
    assert len(steps) == 6  # No step twice.
    finished, straight = load_run(pair / "sast"), load_run(trained.pair)
    assert finished.results["hard_loss"] == straight.results["hard_loss"]
    assert_trees_equal(finished.params, straight.params)


def interrupt_at_the_second_epoch(command, number):
    """Starts a command, sends it a signal while it trains, and returns what it wrote to standard error and its exit status."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ) as process:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if sum("epoch" in each for each in lines) == 2:
                process.send_signal(number)
                break
        return "".join([*lines, process.stderr.read()]), process.wait(60)


@pytest.mark.parametrize("status", [0, 2, 130, "SIGINT", "SIGTERM"])
def test_process_exits_with_the_status_of_its_command(status):
    # In place of a command that ends so, or that a signal meets before it has anything to save.
    body = f"return {status}" if isinstance(status, int) else f"signal.raise_signal(signal.{status})"
    code = f"import signal\nimport sast_jax.cli as cli\ndef main():\n    {body}\ncli.main = main\ncli.entry_point()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == ((130, "sast-jax: interrupted\n") if isinstance(status, str) else (status, ""))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_process_exits_130_goes_on_and_does_so_again(number, small_nmnist, tmp_path):
    arguments = [*TINY[:-1], "--config.num_epochs=400", f"--config.dataset.root={small_nmnist}", f"--workdir={tmp_path / 'run'}"]
    command = [sys.executable, "-m", "sast_jax", "train", "--config=configs/nmnist.py:sast", *arguments]
    first, last = (interrupt_at_the_second_epoch(command, number) for _ in range(2))
    assert first[1] == last[1] == 130
    assert "sast-jax: interrupted: stopped at step" in first[0]
    assert "Traceback" not in first[0] + last[0]
    assert load_run(tmp_path / "run").results is None
    epochs = [int(line.split("epoch ")[1].split(",")[0]) for line in last[0].splitlines() if "epoch" in line]
    assert epochs[0] > 2


@pytest.mark.slow
def test_command_interrupted_at_any_time_exits_130_without_a_traceback(small_nmnist, tmp_path):
    arguments = [
        "train",
        "--config=configs/nmnist.py:sast",
        f"--workdir={tmp_path / 'run'}",
        f"--config.dataset.root={small_nmnist}",
    ]
    command = [sys.executable, "-m", "sast_jax", *arguments, *TINY[:-1], "--config.num_epochs=400"]
    for tenths in (4, 7, 10, 14, 18, 25, 40):  # In the imports, the reading of the data, compilation, training.
        number = signal.SIGINT if tenths % 2 else signal.SIGTERM
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            time.sleep(tenths / 10)
            process.send_signal(number)
            text = process.stderr.read()
            assert process.wait(60) == 130, (tenths, text)
        assert "sast-jax: interrupted" in text
        assert "Traceback" not in text


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")])
def test_lack_of_memory_is_a_message(train, capsys, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("sast_jax.training.build.make_train_step", fail)
    assert "out of memory" in refused(capsys, train(config="configs/nmnist.py:sast"))


def test_other_errors_of_the_program_itself_are_not_hidden(train, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr("sast_jax.training.build.make_train_step", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        train(config="configs/nmnist.py:sast")


def test_warning_is_a_line_and_a_foreign_one_stays_what_it_is(capsys):
    show_warning(SuspicionWarning("layer 0 is dead"), SuspicionWarning, "file.py", 3)
    assert capsys.readouterr().err == "sast-jax: warning: layer 0 is dead\n"
    show_warning(UserWarning("other"), UserWarning, "file.py", 3)
    assert "file.py:3: UserWarning: other" in capsys.readouterr().err
