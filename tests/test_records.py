"""Files of a run folder that were edited or damaged: each is refused by name, or does no harm."""

import copy
import json
import shutil

import pytest

from sast_jax.cli import main
from sast_jax.errors import UserError
from sast_jax.evaluation.suites import evaluate_run, load_calibration
from sast_jax.training import load_run, read_metrics, train_and_evaluate
from sast_jax.training.records import EVALUATION, FILES, METRICS, RESULTS, RUN, RUNS, THEORY, read_record

WRONG = [None, True, -3, 1.5e300, "x", [], {}, [[1]], {"value": 0.5}]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A run with all that the commands write, and what it was made with."""
    from sast_jax.config import load_configs
    from tests.conftest import TINY, write_small_nmnist

    folder = tmp_path_factory.mktemp("evaluated")
    root = write_small_nmnist(folder / "data")
    config = load_configs("configs/nmnist.py:sast", [*TINY, f"dataset.root={root}", "num_epochs=1"])[""]
    train_and_evaluate(config, folder / "run")
    evaluate_run(folder / "run", ["transfer", "calibration"])
    (folder / "run" / THEORY).write_text(json.dumps(SHORT_THEORY))
    return folder / "run"


SHORT_THEORY = {
    **{"step": 3, "recordings": "validation", "num_recordings": 10, "optimizer": "adam", "certified_margin": 0.0},
    "statements": [
        {
            **{"layer": "dense_0", "statement": "contraction", "assumption": "kappa < 1", "holds": True, "vacuous": False},
            **{"measured": 0.5, "bound": 1.0, "tightness": 0.5},
        }
    ],
}


@pytest.fixture(scope="module")
def wholly_evaluated(evaluated, tmp_path_factory):
    """The same with all suites, and the theory as the command writes it."""
    run = shutil.copytree(evaluated, tmp_path_factory.mktemp("wholly") / "run")
    evaluate_run(run, ["quantization", "synops", "robustness"])
    assert main(["theory", f"--workdir={run}"]) == 0
    return run


@pytest.fixture
def run(evaluated, tmp_path):
    return shutil.copytree(evaluated, tmp_path / "run")


def paths_of(value, path=()):
    """The path of everything in a JSON value; of a list its first entry, of an object of many names the first two."""
    yield path
    if isinstance(value, list):
        yield from paths_of(value[0], (*path, 0)) if value else ()
    elif isinstance(value, dict):
        for key in value:
            yield from paths_of(value[key], (*path, key))


def changed(value, path, new):
    value = copy.deepcopy(value)
    if not path:
        return new
    target = value
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = new
    return value


def test_what_the_commands_write_is_what_is_read(evaluated):
    for name in (RUN, RESULTS, EVALUATION, THEORY):
        assert read_record(evaluated / name) == json.loads((evaluated / name).read_text())
    assert len(read_metrics(evaluated)) == 1


@pytest.mark.parametrize(
    ("name", "path", "new", "message"),
    [
        (RESULTS, ("hard_accuracy",), -3, "hard_accuracy: must be a number from 0 to 1; got -3"),
        (RESULTS, ("surrogate_accuracy",), True, "surrogate_accuracy: must be a number from 0 to 1; got True"),
        (RESULTS, ("num_test",), 2.5, "num_test: must be an integer from 0; got 2.5"),
        (RESULTS, ("wall_time_seconds",), "long", "wall_time_seconds: must be a number from 0; got 'long'"),
        (RUN, ("data", "num_classes"), 0, "data: num_classes: must be a size; got 0"),
        (RUN, ("environment",), [], r"environment: must be an object; got \[\]"),
        (RUNS, (), ["../outside"], "must be a list of names of folders"),
        (EVALUATION, ("calibration", "chosen"), "other", "calibration: chosen: must be one of the methods"),
        (EVALUATION, ("transfer", "confusion", "hard"), [1], r"transfer: confusion: hard: \[0\] must be a list"),
        (EVALUATION, ("transfer", "layer_swap", "prefix"), [], "transfer: layer_swap: prefix: must be a list of at least 1"),
        (EVALUATION, ("robustness",), {"num_test": 1}, "robustness: severities is missing"),
        (THEORY, ("statements", 0, "measured"), "much", r"statements: \[0\] measured: must be a finite number; got 'much'"),
    ],
)
def test_field_of_another_type_or_range_is_named(run, name, path, new, message):
    value = json.loads((run / name).read_text()) if (run / name).exists() else None
    (run / name).write_text(json.dumps(changed(value, path, new)))
    with pytest.raises(UserError, match=rf"{name}: is damaged or not of sast-jax: {message}"):
        read_record(run / name)


@pytest.mark.parametrize("text", ["NaN", "Infinity", "1e999", "-1e400"])
def test_number_that_is_not_finite_is_refused_in_every_file(run, text):
    for name in (RUN, RESULTS, EVALUATION, THEORY):
        content = (run / name).read_text()
        (run / name).write_text(content[: content.rindex("}")].rstrip() + f', "more": {text}}}')
        with pytest.raises(UserError, match=rf"{name}: cannot be read as JSON"):
            read_record(run / name)
    with (run / METRICS).open("a") as file:
        file.write(f'{{"step": 9, "epoch": 9, "loss": {text}}}\n')
    with pytest.raises(UserError, match="line 2 is damaged"):
        read_metrics(run)


def test_only_a_last_line_without_an_end_counts_as_cut_off(run):
    whole = (run / METRICS).read_text()
    (run / METRICS).write_text(whole + '{"step": 6, "epo')
    assert len(read_metrics(run)) == 1
    (run / METRICS).write_text(whole + '{"step": 6, "epo\n')
    with pytest.raises(UserError, match="line 2 is damaged"):
        read_metrics(run)


def test_calibration_of_other_layers_is_not_taken_by_position(run):
    value = read_record(run / EVALUATION)
    method = value["calibration"]["methods"][value["calibration"]["chosen"]]
    loaded = load_run(run)
    assert len(load_calibration(loaded, "chosen").gains) == 1
    for wrong in ([1.0, 2.0, 3.0], -1.0, []):
        changed_file = copy.deepcopy(value)
        changed_file["calibration"]["methods"][value["calibration"]["chosen"]]["gains"] = {"dense_0": wrong}
        (run / EVALUATION).write_text(json.dumps(changed_file))
        with pytest.raises(UserError, match="gains of dense_0 must be a positive number, or 8, one per channel"):
            load_calibration(loaded, "chosen")
    method["gains"] = {"other_0": next(iter(method["gains"].values()))}
    (run / EVALUATION).write_text(json.dumps(value))
    with pytest.raises(UserError, match="thresholds and gains of 'chosen' must be of the layers dense_0"):
        load_calibration(loaded, "chosen")


def test_report_of_a_run_without_a_test_part_shows_what_there_is(run):
    value = json.loads((run / RESULTS).read_text())
    for key in ("surrogate_accuracy", "hard_accuracy", "transfer_gap", "surrogate_loss", "hard_loss"):
        del value[key]
    (run / RESULTS).write_text(json.dumps(value | {"num_test": 0}))
    (run / EVALUATION).unlink()
    assert main(["report", f"--workdir={run}"]) == 0
    assert "What the swap costs" in (run / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", [RUN, RESULTS, EVALUATION, THEORY])
def test_any_field_of_any_type_ends_in_one_message_or_does_no_harm(wholly_evaluated, tmp_path, name, capsys, monkeypatch):
    run = shutil.copytree(wholly_evaluated, tmp_path / "run")
    monkeypatch.setattr("sast_jax.report.gather._show", lambda *_: "not shown")  # It takes seconds, and reads no record.
    original = json.loads((run / name).read_text())
    taken = 0
    for path in paths_of(original):
        if path[:1] == ("config",) and len(path) > 2:
            continue  # What a config may hold is fuzzed elsewhere.
        for new in WRONG:
            (run / name).write_text(json.dumps(changed(original, path, new)))
            status = main(["report", f"--workdir={run}"])
            error = capsys.readouterr().err
            assert status in (0, 2), (path, new)
            assert "Traceback" not in error
            assert status == 0 or name in error or "the files of run in" in error or "config" in error, (path, new, error)
            taken += 1
    assert taken > 50
    assert FILES.keys() >= {name}
