import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from sast_jax import Calibration, load_run
from sast_jax.cli import format_table, main
from sast_jax.errors import SuspicionWarning, UserError, show_warning
from sast_jax.evaluation.suites import SUITES
from sast_jax.training.build import load_data
from tests.conftest import write_nmnist_file

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


def test_train_prints_both_accuracies_and_the_gap_of_the_pair_and_evaluate_finds_them_again(train, capsys, tmp_path):
    assert train() == 0
    table = capsys.readouterr().out
    assert main(["evaluate", f"--workdir={tmp_path / 'run'}"]) == 0
    again = capsys.readouterr().out
    runs = json.loads((tmp_path / "run" / "results.json").read_text())["runs"]
    for text, lines in ((table, table.splitlines()[1:3]), (again, again.splitlines()[1:3])):
        assert text.splitlines()[0].split() == ["run", "surrogate", "hard", "gap", "test", "samples", "gradients", "seconds"]
        for line, (name, run) in zip(lines, runs.items(), strict=True):
            cells = line.split()
            assert cells[0] == name
            assert [cells[1], cells[3]] == [f"{100 * run[f'{mode}_accuracy']:.1f}" for mode in ("surrogate", "hard")]
            assert float(cells[5]) == pytest.approx(100 * run["transfer_gap"], abs=0.051)
    evaluation = json.loads((tmp_path / "run" / "sast" / "evaluation.json").read_text())
    assert evaluation["transfer"]["hard_accuracy"] == runs["sast"]["hard_accuracy"]


def test_finished_run_is_reported_again(train, capsys):
    assert train(config="configs/nmnist.py:sast") == 0
    first = capsys.readouterr()
    assert train(config="configs/nmnist.py:sast") == 0
    second = capsys.readouterr()
    assert second.out == first.out
    assert "epoch" in first.err
    assert not second.err


def test_recordings_that_moved_are_found_by_evaluate(train, capsys, small_nmnist, tmp_path):
    assert train(config="configs/nmnist.py:sast") == 0
    small_nmnist.rename(tmp_path / "moved")
    capsys.readouterr()
    assert "does not exist" in refused(capsys, main(["evaluate", f"--workdir={tmp_path / 'run'}"]))
    assert main(["evaluate", f"--workdir={tmp_path / 'run'}", f"--config.dataset.root={tmp_path / 'moved'}"]) == 0
    capsys.readouterr()
    message = refused(capsys, main(["evaluate", f"--workdir={tmp_path / 'run'}", "--config.sam.rho=1"]))
    assert "only dataset.root, dataset.download and dataset.images can be set" in message


def test_suites_are_gathered_in_one_file_until_the_weights_change(train, capsys, tmp_path):
    assert train(config="configs/nmnist.py:sast") == 0
    run = tmp_path / "run"
    capsys.readouterr()
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
def test_all_suites_agree_on_what_they_share(train, capsys, tmp_path):
    assert train(config="configs/nmnist.py:sast") == 0
    run = tmp_path / "run"
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


def test_folder_of_another_config_or_kind_is_refused(train, capsys, tmp_path):
    assert train(config="configs/nmnist.py:sast") == 0
    capsys.readouterr()
    before = (tmp_path / "run" / "results.json").read_text()
    message = refused(capsys, train("--config.num_epochs=3", config="configs/nmnist.py:sast"))
    assert "num_epochs: the run has 2, the config 3" in message
    assert "is a single run" in refused(capsys, train())
    assert (tmp_path / "run" / "results.json").read_text() == before


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
    assert train(config="configs/nmnist.py:sast") == 0
    (run / "run.json").unlink()
    capsys.readouterr()
    assert "has results.json but no run.json" in refused(capsys, train("--config.seed=5", config="configs/nmnist.py:sast"))


def test_finished_run_is_reported_though_its_recordings_are_gone(train, capsys, small_nmnist):
    assert train() == 0
    table = capsys.readouterr().out
    small_nmnist.rename(small_nmnist.parent / "gone")
    assert train() == 0
    assert capsys.readouterr().out == table


def test_damaged_checkpoint_is_named(train, capsys, tmp_path):
    assert train(config="configs/nmnist.py:sast") == 0
    for file in (tmp_path / "run" / "checkpoints" / "6" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:10])
    capsys.readouterr()
    message = refused(capsys, main(["evaluate", f"--workdir={tmp_path / 'run'}"]))
    assert str(tmp_path / "run" / "checkpoints" / "6") in message


def test_half_of_a_pair_is_not_taken_for_the_whole(train, tmp_path):
    assert train() == 0
    shutil.rmtree(tmp_path / "run" / "sast")
    (tmp_path / "run" / "results.json").unlink()
    with pytest.raises(UserError, match=r"run/sast' is no run"):
        load_run(tmp_path / "run")


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


def test_table_aligns_its_columns():
    result = {"surrogate_accuracy": 0.9, "hard_accuracy": 0.95, "transfer_gap": -0.05, "num_test": 20}
    lines = format_table({"a": result, "longer": {**result, "wall_time_seconds": 3.4}}).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split() == ["a", "90.0", "%", "95.0", "%", "-5.0", "20", "-", "-"]
    assert format_table({"untested": {"num_test": 0}}).splitlines()[1].split() == ["untested", "-", "-", "-", "0", "-", "-"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_command_writes_a_checkpoint_exits_130_and_goes_on(number, small_nmnist, tmp_path):
    arguments = [*TINY[:-1], "--config.num_epochs=400", f"--config.dataset.root={small_nmnist}"]
    command = [sys.executable, "-m", "sast_jax", "train", "--config=configs/nmnist.py:sast", f"--workdir={tmp_path / 'run'}"]
    with subprocess.Popen([*command, *arguments], stderr=subprocess.PIPE, text=True, env=os.environ) as process:
        for line in process.stderr:
            if "epoch 2," in line:
                process.send_signal(number)
                break
        rest = process.stderr.read()
        assert process.wait(60) == 130
    assert "sast-jax: interrupted: stopped at step" in rest
    assert "Traceback" not in rest
    stopped = load_run(tmp_path / "run")
    assert stopped.results is None
    # The same command goes on: with another number of epochs it would be another run.
    with subprocess.Popen([*command, *arguments], stderr=subprocess.PIPE, text=True, env=os.environ) as process:
        first = next(line for line in process.stderr if "epoch" in line)
        time.sleep(0.1)
        process.send_signal(number)
        process.stderr.read()
        assert process.wait(60) == 130
    assert int(first.split("epoch ")[1].split(",")[0]) > 2


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
