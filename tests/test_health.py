"""Training that runs and learns nothing, and data that make its numbers worthless: named, once, with what to do."""

import warnings

import numpy as np
import pytest

from sast_jax import load_run
from sast_jax.config import load_configs
from sast_jax.data import Recordings, batch_indices, load_dataset
from sast_jax.data.checks import check_parts, content_ids
from sast_jax.errors import SuspicionWarning, UserError
from sast_jax.training import read_metrics, train_and_evaluate
from sast_jax.training.build import load_data
from sast_jax.training.health import find_symptoms
from sast_jax.training.session import refuse_too_large
from tests.conftest import write_small_nmnist

HEALTHY = {
    "accuracy": 0.5,
    "gradient_norm": 1.0,
    "gradient_norm_dense_0": 0.1,
    "gradient_norm_readout": 0.9,
    "spike_rate_0": 0.3,
    "above_threshold_0": 0.2,
}


def test_training_that_works_has_no_symptoms(trained):
    assert find_symptoms(HEALTHY) == {}
    for name in ("baseline", "sast"):
        lines = read_metrics(trained.pair / name)
        assert [find_symptoms(line) for line in lines] == [{}, {}]
    assert "warning" not in trained.err


@pytest.mark.slow
def test_longer_training_that_works_has_no_symptoms(tiny, tmp_path):
    train_and_evaluate(tiny("sast"), tmp_path)  # Warnings are errors.
    assert all(find_symptoms(line) == {} for line in read_metrics(tmp_path))


@pytest.mark.parametrize(
    ("metrics", "name", "message"),
    [
        ({"above_threshold_0": 0.0}, "above_threshold_0", "layer 0 is dead.*network.init_gain"),
        ({"above_threshold_0": 1.0}, "above_threshold_0", "layer 0 is saturated.*network.threshold"),
        ({"gradient_norm": 1e5}, "exploding", r"explodes: its norm is 1\.0e\+05.*learning_rate"),
        ({"gradient_norm": 1e-9}, "vanishing", r"vanishes: its norm is 1\.0e-09 at an accuracy of 50.0%.*network.slope"),
        ({"gradient_norm_dense_0": 1e-8}, "vanishing dense_0", r"vanishes in dense_0: .*1\.0e-08, elsewhere 9\.0e-01"),
    ],
)
def test_each_symptom_is_named_with_what_to_do(metrics, name, message):
    symptoms = find_symptoms(HEALTHY | metrics)
    assert list(symptoms) == [name]
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(symptoms[name])


def test_gradient_that_is_small_because_all_is_learnt_is_no_symptom():
    assert find_symptoms(HEALTHY | {"gradient_norm": 1e-9, "accuracy": 1.0}) == {}


def test_sick_run_warns_once_and_goes_on(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("sast_jax.training.health.EXPLODING_GRADIENT", 1e-30)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train_and_evaluate(tiny("baseline", "network.threshold=1e4", "num_epochs=2"), tmp_path)
    texts = [str(each.message) for each in caught if each.category is SuspicionWarning]
    for message in ("layer 0 is dead", "the gradient explodes"):
        (text,) = [text for text in texts if message in text]
        assert text.startswith("epoch 1 of")
    assert load_run(tmp_path).step == 6


def test_share_of_potentials_above_threshold_is_the_rate_of_hard_spikes(tiny, tmp_path):
    config = tiny("straight_through", "num_epochs=1")
    train_and_evaluate(config, tmp_path)
    (line,) = read_metrics(tmp_path)
    assert 0 < line["above_threshold_0"] == line["spike_rate_0"] < 1
    norms = [value for key, value in line.items() if key.startswith("gradient_norm_")]
    assert len(norms) == 2
    assert max(norms) <= line["gradient_norm"] <= sum(norms)


@pytest.mark.parametrize("accident", ["streams", "contents"])
def test_perturbation_batch_that_is_the_descent_batch_by_accident_is_told(tiny, tmp_path, monkeypatch, accident, small_nmnist):
    if accident == "streams":  # As if both were drawn with the same seed.
        monkeypatch.setattr(
            "sast_jax.training.session.batch_indices", lambda *args, stream, **kwargs: batch_indices(*args, stream=0, **kwargs)
        )
    else:  # Other files, the same frames.
        for file in small_nmnist.glob("Train/*/*.bin"):
            file.write_bytes((small_nmnist / "Train/0/00000.bin").read_bytes())
    config = tiny("sast", "num_epochs=2", "dataset.num_validation=0")
    with pytest.warns(SuspicionWarning, match=r"frames of the descent batch in 4 of 4 steps.*sam.perturbation=same") as caught:
        train_and_evaluate(config, tmp_path / "run")
    assert len([each for each in caught if "descent batch" in str(each.message)]) == 1


def parts(**changes):
    rng = np.random.default_rng(0)
    made = {}
    for name, number in (("training", 6), ("validation", 2), ("test", 3)):
        ids = np.array([f"{name}{i}" for i in range(number)])
        made[name] = Recordings(rng.integers(0, 5, (number, 2, 3, 3, 2)).astype(np.uint8), np.arange(number, dtype=np.int32), ids)
    return {name: part._replace(**changes.get(name, {})) for name, part in made.items()}


def test_sound_parts_pass():
    check_parts(parts(), 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test": {"labels": np.array([0, 6, 1])}}, "test: labels must be 0 to 5; 'test1' has 6"),
        (
            {"training": {"labels": np.array([0, 1, -1, -2, 4, 5])}},
            "training: labels must be .*'training2' and 1 more has -1",
        ),
        ({"test": {"ids": np.array(["a", "training3", "b"])}}, "'training3' is in training and validation and test"),
        ({"training": {"ids": np.array(["a", "a", "b", "c", "d", "e"])}}, "'a' is in .*or twice in one"),
        (
            {"validation": {"frames": np.full((2, 2, 3, 3, 2), np.nan)}},
            "frames must be finite numbers; those of 'valid",
        ),
    ],
)
def test_leaks_and_damage_are_refused_by_name(changes, message):
    with pytest.raises(UserError, match=message):
        check_parts(parts(**changes), 6)


def test_copies_under_other_names_are_told():
    training = parts()["training"]
    copy = {"test": {"frames": training.frames[[5, 0, 0]]}}
    with pytest.warns(SuspicionWarning, match="3 of 3 test recordings have the same frames as a training recording, as 'test0'"):
        check_parts(parts(**copy), 6)


def test_contents_are_equal_only_for_equal_frames(recordings):
    ids = content_ids(recordings)
    assert len(set(ids.tolist())) == len(recordings.labels)
    changed = recordings.frames.copy()
    changed[0, 0, 0, 0, 0] ^= 1
    changed[2] = changed[1]
    again = content_ids(recordings._replace(frames=changed))
    assert again[0] != ids[0]
    assert again[2] == again[1] == ids[1]


def test_recording_copied_from_train_to_test_is_told_at_loading(tiny, small_nmnist):
    (small_nmnist / "Test/3/00000.bin").write_bytes((small_nmnist / "Train/3/00001.bin").read_bytes())
    with pytest.warns(SuspicionWarning, match="1 of 20 test recordings have the same frames as a .*'Test/3/00000'"):
        load_data(tiny("sast", "dataset.num_validation=0"))


def test_shipped_data_sets_do_not_leak():
    config = load_configs("configs/digits.py:sast")[""]
    load_data(config)  # Warnings are errors.


def test_real_recordings_do_not_leak(nmnist_root):
    splits = load_dataset("nmnist", num_time_steps=10, num_validation=100, root=str(nmnist_root))
    check_parts({"training": splits.train, "validation": splits.validation, "test": splits.test}, 10)


def test_network_that_does_not_fit_in_memory_is_refused_before_it_is_made(tmp_path):
    root = write_small_nmnist(tmp_path / "data")
    overrides = [f"dataset.root={root}", "network.kind=mlp", "network.features=65536,65536,65536", "dataset.num_time_steps=1"]
    config = load_configs("configs/nmnist.py:sast", [*overrides, "batch_size=2", "dataset.num_validation=0"])[""]
    with pytest.raises(UserError, match=r"network.features: weights and optimizer state need \d+\.\d GiB; this machine has"):
        train_and_evaluate(config, tmp_path / "run")
    refuse_too_large({})
