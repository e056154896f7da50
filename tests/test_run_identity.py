"""What binds the files of a run together, and what of jax's settings belongs to it."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from sast_jax import load_run
from sast_jax.cli import main
from sast_jax.config import SCHEMA, find_problems, from_json, load_configs, to_json, with_defaults
from sast_jax.data import make_augment
from sast_jax.data.batches import Batch
from sast_jax.errors import UserError
from sast_jax.evaluation import suites
from sast_jax.evaluation.suites import evaluate_run, load_calibration
from sast_jax.files import write_json
from sast_jax.networks import SpikingConvNet, SpikingMLP
from sast_jax.randomness import make_key
from sast_jax.training import train_and_evaluate
from tests.conftest import TINY, assert_trees_equal, write_small_nmnist


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Finished runs of seeds 0 and 1, by their names, and the config of the first."""
    folder = tmp_path_factory.mktemp("trained")
    root = write_small_nmnist(folder / "data")
    configs = {}
    for seed in (0, 1):
        overrides = [*TINY, f"dataset.root={root}", "num_epochs=1", f"seed={seed}"]
        configs[seed] = load_configs("configs/nmnist.py:baseline", overrides)[""]
        train_and_evaluate(configs[seed], folder / f"seed{seed}")
    return folder, configs[0]


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the run of seed 0."""
    return shutil.copytree(trained[0] / "seed0", tmp_path / "run")


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("field", "value", "was"), [("decay", 0.5, 0.9), ("threshold", 2.0, 1.0), ("reset", "subtract", "'zero'")]
)
@pytest.mark.parametrize("command", ["evaluate", "export", "theory"])
def test_edited_config_of_a_run_is_refused_by_what_it_was_trained_with(run, tmp_path, capsys, command, field, value, was):
    edit(run / "run.json", lambda content: content["config"]["network"].update({field: value}))
    output = [f"--output={tmp_path / 'net.nir'}"] if command == "export" else []
    assert main([command, f"--workdir={run}", *output]) == 2
    message = capsys.readouterr().err
    assert f"checkpoints/3' is of another run than '{run / 'run.json'}' says" in message
    assert f"network.{field}: there {was}, now {value!r}" in message
    assert not (tmp_path / "net.nir").exists()


def test_edited_config_of_a_run_is_not_gone_on_with(trained, run):
    (run / "results.json").unlink()
    edit(run / "run.json", lambda content: content["config"]["optimizer"].update(learning_rate=0.5))
    config = ml_collections.ConfigDict(to_json(trained[1]))
    config.optimizer.learning_rate = 0.5
    with pytest.raises(UserError, match=r"is of another run.*\n.*optimizer.learning_rate: there .*, now 0.5"):
        train_and_evaluate(from_json(config.to_dict()), run)


@pytest.mark.parametrize("name", ["results.json", "checkpoints"])
def test_file_of_a_run_of_another_seed_is_refused(trained, run, name):
    other = trained[0] / "seed1" / name
    shutil.rmtree(run / name) if other.is_dir() else (run / name).unlink()
    shutil.copytree(other, run / name) if other.is_dir() else shutil.copy(other, run / name)
    before = (run / "results.json").read_bytes()
    with pytest.raises(UserError, match=rf"{name}.* is of another run.*\n  seed: .* 1, .* 0"):
        load_run(run)
    if name == "results.json":
        with pytest.raises(UserError, match="the results have 1, the run 0"):
            train_and_evaluate(trained[1], run)
    assert (run / "results.json").read_bytes() == before


def test_results_on_other_recordings_are_refused(trained, run):
    edit(run / "results.json", lambda content: content.update(data_checksum="0" * 64))
    with pytest.raises(UserError, match=r"results.json: is of another run.*\n  its recordings are others"):
        train_and_evaluate(trained[1], run)


def test_run_of_an_earlier_version_says_less_and_is_read(trained, run):
    edit(run / "results.json", lambda content: content.pop("data_checksum"))
    edit(run / "run.json", lambda content: content.pop("settings"))
    meta = run / "checkpoints" / "3" / "meta" / "metadata"
    edit(meta, lambda content: [content.pop(key) for key in ("step", "config", "data")])
    assert_trees_equal(load_run(run).params, load_run(trained[0] / "seed0").params)
    assert train_and_evaluate(trained[1], run)["num_test"] == 20


def test_moved_recordings_are_no_other_run(trained, run, tmp_path):
    shutil.copytree(trained[0] / "data", tmp_path / "moved", copy_function=shutil.copy2)
    assert main(["evaluate", f"--workdir={run}", f"--config.dataset.root={tmp_path / 'moved'}"]) == 0


def test_suites_evaluated_at_once_all_stay(trained, run, monkeypatch):
    names = ["first", "second", "third"]  # Of no suite, so that their results may be anything.
    together = threading.Barrier(len(names))

    def make(name):
        def evaluate(subject):
            together.wait(60)  # All have read what there is before any writes.
            return {"name": name}

        return evaluate

    monkeypatch.setattr(suites, "SUITES", {name: make(name) for name in names})
    threads = [threading.Thread(target=evaluate_run, args=(run, [name])) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    written = json.loads((run / "evaluation.json").read_text())
    assert {name: written.get(name) for name in names} == {name: {"name": name} for name in names}


def test_updates_by_many_processes_all_stay(tmp_path):
    code = (
        "import sys, json, pathlib\nfrom sast_jax.files import update_json, read_json\npath = pathlib.Path(sys.argv[1])\n"
        "for i in range(30):\n    update_json(path, lambda: [*read_json(path), sys.argv[2]])\n"
    )
    path = tmp_path / "evaluation.json"
    write_json(path, [])
    processes = [subprocess.Popen([sys.executable, "-c", code, path, name]) for name in "abc"]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert sorted(json.loads(path.read_text())) == sorted("abc" * 30)
    assert [each.name for each in tmp_path.iterdir()] == ["evaluation.json"]


MEASURED = dict.fromkeys(("accuracy", "loss", "ece", "temperature", "scaled_loss", "scaled_ece"), 0.5)
CALIBRATION = {"methods": {"none": MEASURED}, "chosen": "none", "surrogate": MEASURED}
SYNOPS = {
    **dict.fromkeys(("effective_acs", "effective_macs", "event_acs", "dense"), 1.0),
    **{"num_test": 20, "activation_sparsity": None, "layers": {}},
}


def test_evaluation_of_other_weights_is_not_taken(trained, run):
    (run / "evaluation.json").write_text(json.dumps({"step": 3, "weights": "0" * 64, "calibration": CALIBRATION}))
    with pytest.raises(UserError, match="the run has none at its step 3"):
        load_calibration(load_run(run), "chosen")
    evaluate_run(run, ["transfer"])
    assert "calibration" not in json.loads((run / "evaluation.json").read_text())


def test_evaluation_of_an_earlier_version_is_kept(trained, run):
    (run / "evaluation.json").write_text(json.dumps({"step": 3, "synops": SYNOPS}))
    evaluate_run(run, ["transfer"])
    assert {"step", "weights", "synops", "transfer"} == json.loads((run / "evaluation.json").read_text()).keys()


OPTIONAL = [key for key, field in SCHEMA.items() if field.default is not None]


@pytest.mark.parametrize("value", [{"value": 0.5}, {}, {"a": {"b": 1}}])
def test_field_given_as_an_object_is_refused_also_where_it_may_be_left_out(trained, value):
    for key in SCHEMA:
        config = to_json(trained[1])
        section, _, name = key.rpartition(".")
        (config[section] if section else config)[name] = value
        with pytest.raises(UserError) as error:
            from_json(config, heading="x")
        assert str(error.value) == f"x\n  {key}: must be {SCHEMA[key].allowed}; got an object of fields"


def test_fields_that_may_be_left_out_have_their_defaults(trained):
    config = to_json(trained[1])
    for key in OPTIONAL:
        section, _, name = key.rpartition(".")
        (config[section] if section else config).pop(name)
    for section in [name for name, value in config.items() if value == {}]:
        assert to_json(from_json(config)) == to_json(from_json({k: v for k, v in config.items() if k != section}))
    read = to_json(from_json(config))
    for key in OPTIONAL:
        section, _, name = key.rpartition(".")
        default = SCHEMA[key].default
        assert (read[section] if section else read)[name] == (list(default) if isinstance(default, tuple) else default)


@pytest.mark.parametrize("value", [3, None, "x", [1]])
def test_section_that_is_no_object_is_refused_by_name(trained, value):
    config = with_defaults(ml_collections.ConfigDict({**to_json(trained[1]), "spikes": value}))
    problems = find_problems(config, with_data=False)
    assert "spikes: there is no such field" in problems[0]
    assert any(problem.startswith("spikes.finish: is missing") for problem in problems)


def test_empty_object_of_an_unknown_name_is_refused(trained):
    with pytest.raises(UserError, match="networks: there is no such field"):
        from_json({**to_json(trained[1]), "networks": {}})


@pytest.mark.parametrize("network", [SpikingConvNet(3, features=(2, 3), kernel_size=3), SpikingMLP(3, features=(4,))])
def test_weights_are_float32_under_any_setting_of_jax(network):
    frames = np.zeros((2, 1, 8, 8, 2), np.uint8)
    expected = jax.jit(network.init)(make_key(0), frames)
    with jax.enable_x64(True):
        params = jax.jit(network.init)(make_key(0), frames)
        output = jax.jit(network.apply)(params, frames)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}
    assert output.logits.dtype == jnp.float32
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), params, expected)


def test_random_numbers_do_not_depend_on_the_default_of_keys(monkeypatch):
    augment = make_augment(max_shift=2, time_jitter=0.2, drop=0.2, binary=False, seed=3)
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 9, (3, 2, 8, 8, 2)).astype(np.uint8)
    batch = Batch(jnp.asarray(frames), jnp.zeros(2, jnp.int32), jnp.ones(2, bool))
    expected = augment(batch, 5, 0).frames
    before = jax.config.jax_default_prng_impl
    jax.config.update("jax_default_prng_impl", "rbg")
    try:
        assert str(jax.random.key_impl(make_key(0))) == "threefry2x32"
        np.testing.assert_array_equal(augment(batch, 5, 0).frames, expected)
    finally:
        jax.config.update("jax_default_prng_impl", before)


def test_no_key_of_the_package_is_of_the_default_kind():
    found = []
    for folder, _, names in os.walk("sast_jax"):
        for name in [name for name in names if name.endswith(".py") and name != "randomness.py"]:
            with open(os.path.join(folder, name), encoding="utf-8") as file:
                found += re.findall(r"^(?!.*>>>).*jax\.random\.(?:key|PRNGKey)\(.*", file.read(), re.M)
    assert found == []


@pytest.mark.parametrize(
    ("name", "value", "was", "now"),
    [
        ("jax_threefry_partitionable", False, True, False),
        ("jax_default_matmul_precision", "bfloat16", None, "bfloat16"),
        ("jax_random_seed_offset", 7, 0, 7),
        ("jax_enable_x64", True, False, True),
    ],
)
def test_run_is_not_gone_on_with_under_settings_that_change_its_numbers(trained, run, name, value, was, now):
    (run / "results.json").unlink()
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        with pytest.raises(UserError, match="was begun with other settings of jax") as error:
            train_and_evaluate(trained[1], run)
        assert f"{name}: the run has {was}, jax now {now!r} ({name.upper()})" in str(error.value)
        assert_trees_equal(load_run(run).params, load_run(trained[0] / "seed0").params)
    finally:
        jax.config.update(name, before)
    assert train_and_evaluate(trained[1], run)["num_test"] == 20
