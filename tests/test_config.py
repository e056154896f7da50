import math
import os
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from sast_jax import config as config_lib
from sast_jax.config import SCHEMA, flatten, from_json, load_configs, to_json
from sast_jax.errors import UserError
from sast_jax.training.build import make_network, make_optimizer, make_schedule

FILES = [path for path in sorted(Path("configs").glob("*.py")) if not path.name.startswith(("study_", "best_"))]


def problems_of(spec, *overrides):
    with pytest.raises(UserError) as error:
        load_configs(spec, overrides)
    return str(error.value)


def write_config(tmp_path, body):
    path = tmp_path / "own.py"
    path.write_text(body)
    return str(path)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_shipped_config_has_every_field(path, small_nmnist, small_gestures):
    root = small_gestures if path.stem == "dvs_gesture" else small_nmnist
    for variant in ("", ":baseline", ":sast", ":cheap_sast", ":straight_through"):
        configs = load_configs(f"{path}{variant}", [f"dataset.root={root}"])
        assert list(configs) == (["baseline", "sast"] if not variant else [""])
        for config in configs.values():
            assert flatten(config).keys() == SCHEMA.keys()
            assert config.is_locked
    text = path.read_text()
    assert f"sast-jax train --config={path}" in text
    assert path.stem == "digits" or "configs/digits.py, which explains the fields" in text


def test_shipped_config_is_found_by_name_from_any_folder(monkeypatch, tmp_path):
    by_path = load_configs("configs/digits.py:sast")[""]
    monkeypatch.chdir(tmp_path)
    assert load_configs("digits:sast")[""].to_dict() == by_path.to_dict()
    assert "shipped one by name: best_gestures, best_nmnist, digits" in problems_of("digitz")
    Path("digits").write_text("")  # A path of that name comes first.
    assert "must end in .py" in problems_of("digits")


def test_every_field_is_explained_in_the_config_of_digits():
    text = Path("configs/digits.py").read_text()
    for key in SCHEMA:
        assert re.search(rf"^    config\.{re.escape(key)} = .+  # .+", text, re.M), key


def test_variants_are_what_they_are_called():
    configs = {name: load_configs(f"configs/digits.py:{name}")[""] for name in ("baseline", "sast", "straight_through")}
    assert {name: (config.mode, config.sam.rho > 0) for name, config in configs.items()} == {
        "baseline": ("surrogate", False),
        "sast": ("surrogate", True),
        "straight_through": ("straight_through", False),
    }


def test_small_variant_of_dvs_gesture_is_a_pair_and_less_network(small_gestures):
    override = [f"dataset.root={small_gestures}"]
    pair = load_configs("configs/dvs_gesture.py:small", override)
    assert {name: config.sam.rho > 0 for name, config in pair.items()} == {"small_baseline": False, "small_sast": True}
    full = load_configs("configs/dvs_gesture.py:sast", override)[""]
    assert len(pair["small_sast"].network.features) < len(full.network.features)
    assert pair["small_sast"].dataset.downsample > full.dataset.downsample
    assert load_configs("configs/dvs_gesture.py:small_straight_through", override)[""].mode == "straight_through"


def test_pixels_that_cannot_be_joined_and_a_duration_are_refused():
    text = problems_of("configs/digits.py:sast", "dataset.downsample=4", "dataset.duration=0.2")
    assert "dataset.downsample: must divide the 34 pixels of digits; got 4" in text
    assert "dataset.duration: recordings of digits have one length, so it must be 0, all of it; got 0.2" in text
    text = problems_of("configs/digits.py:sast", "dataset.downsample=17", "network.pool_size=2")
    assert "leaves nothing of 2 pixels" in text


def test_override_sets_a_field_of_each_type():
    config = load_configs(
        "configs/digits.py:sast",
        ["sam.rho=1e-1", "network.features=4,5,6", "dataset.binary=false", "network.reset=subtract", "seed=7", "network.slope=4"],
    )[""]
    assert config.sam.rho == 0.1
    assert config.network.features == (4, 5, 6)
    assert config.dataset.binary is False
    assert config.network.reset == "subtract"
    assert config.seed == 7
    assert type(config.network.slope) is float
    assert load_configs("configs/digits.py:sast", ["network.features=9", "sam.rho=1", "sam.rho=2"])[""].network.features == (9,)


def test_all_problems_are_told_at_once_with_what_is_allowed():
    text = problems_of(
        "configs/digits.py:sast",
        "sam.roh=0.1",
        "sam.rho=-1",
        "network.decay=1.5",
        "network.reset=soft",
        "batch_size=ten",
        "num_epochs=2.5",
        "network.features=12,x",
        "optimizer.learning_rate=nan",
        "dataset.binary=perhaps",
        "learning_rate=0.1",
        "seed",
    )
    for line in (
        "sam.roh: there is no such field; did you mean sam.rho?",
        "sam.rho: must be a finite number >= 0; got -1.0",
        "network.decay: must be a finite number from 0 to 1; got 1.5",
        "network.reset: must be one of zero, subtract, none; got 'soft'",
        "batch_size: must be an integer from 1 to 2147483647; got 'ten'",
        "num_epochs: must be an integer from 1 to 2147483647; got '2.5'",
        "network.features: must be integers from 1 to 65536, as 12,32; got '12,x'",
        "optimizer.learning_rate: must be a finite number above 0; got nan",
        "dataset.binary: must be true or false; got 'perhaps'",
        "learning_rate: there is no such field; did you mean optimizer.learning_rate?",
        "seed: has no value; write --config.seed=VALUE",
    ):
        assert line in text, line
    assert "11 problems" in text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["network.features=()"], "a conv network needs at least one convolution"),
        (["network.pool_size=40"], "network.pool_size: 40, 2 times over, leaves nothing of 34 pixels"),
        (["network.features=2,2,2,2,2,2"], "leaves nothing of 34 pixels"),
        (["network.features=100000"], "must be integers from 1 to 65536"),
        (["network.features={[]}"], "must be integers from 1 to 65536"),
        (["dataset.num_test=0"], "digits needs at least 1 test sample"),
        (["optimizer.weight_decay=0.1"], "only adamw has one"),
        (["num_microbatches=3"], "batch_size: must be a multiple of num_microbatches, 3; got 32"),
        (["sam.perturbation=same", "sam.perturbation_batch_size=8"], "it must be 0; got 8"),
        (["dataset.name=nmnist", "dataset.root=/nowhere"], "'/nowhere' does not exist"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(overrides, message):
    assert message in problems_of("configs/digits.py:sast", *overrides)


def test_fields_of_the_pair_that_make_the_difference_are_kept():
    configs = load_configs("configs/digits.py", ["sam.rho=0.7", "num_epochs=3"])
    assert [(config.sam.rho, config.num_epochs) for config in configs.values()] == [(0.0, 3), (0.7, 3)]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("x = 1", "does not define get_config"),
        ("import nothing_of_that_name", "could not be run: ModuleNotFoundError"),
        ("def get_config(variant=''): return {}", "must return an ml_collections.ConfigDict; got dict"),
        ("def get_config(variant=''): raise KeyError('x')", "KeyError: 'x'"),
        ("import ml_collections\ndef get_config(variant=''): return ml_collections.ConfigDict()", "seed: is missing"),
        (
            "from ml_collections import ConfigDict, config_dict\n"
            "def get_config(variant=''): return ConfigDict({'seed': config_dict.required_placeholder(int)})",
            "RequiredValueError",
        ),
        (
            "import ml_collections\ndef get_config(variant=''): return ml_collections.ConfigDict({'sam': {'rhoo': 1}})",
            "sam.rhoo: there is no such field; did you mean sam.rho?",
        ),
    ],
)
def test_config_file_that_is_none_is_refused(tmp_path, body, message):
    assert message in problems_of(write_config(tmp_path, body))


def test_missing_file_and_unknown_variant_are_named(tmp_path):
    assert "there is no file 'none.py'" in problems_of("none.py")
    assert "there is no file 'none.py'" in problems_of("none.py:sast")
    (tmp_path / "config.txt").touch()
    assert "must end in .py and define get_config" in problems_of(str(tmp_path / "config.txt"))
    assert "must be one of baseline, sast, cheap_sast, straight_through" in problems_of("configs/digits.py:other")


def test_wrong_types_in_a_file_are_found(tmp_path):
    text = Path("configs/digits.py").read_text()
    text = text.replace("config.batch_size = ", 'config.batch_size = "many"  #').replace(
        "config.sam.rho = 0", "config.sam.rho = True  #"
    )
    path = write_config(tmp_path, text.replace("config.network.features = (", "config.network.features = (0, "))
    found = problems_of(f"{path}:sast", "dataset.root=elsewhere")
    assert "batch_size: must be an integer from 1 to 2147483647; got 'many'" in found
    assert "network.features: must be integers from 1 to 65536, as 12,32; got (0, " in found


def test_section_that_is_none_is_named_and_may_be_overridden(tmp_path):
    path = write_config(
        tmp_path, "import ml_collections\ndef get_config(variant=''): return ml_collections.ConfigDict({'dataset': 'digits'})"
    )
    assert "dataset: there is no such field" in problems_of(path)
    assert "dataset.root: is missing" in problems_of(path, "dataset.name=digits")


def test_config_survives_json():
    config = load_configs("configs/digits.py:sast")[""]
    assert from_json(to_json(config)) == config
    with pytest.raises(UserError, match="seed: is missing"):
        from_json({key: value for key, value in to_json(config).items() if key != "seed"})


def test_network_takes_its_fields_from_the_config():
    overrides = ["network.decay=0.5", "network.features=3,4", "network.reset=none", "network.kernel_size=3"]
    network = make_network(load_configs("configs/digits.py:sast", overrides)[""], 7)
    assert (network.decay, network.features, network.reset, network.kernel_size, network.num_classes) == (
        0.5,
        (3, 4),
        "none",
        3,
        7,
    )
    mlp = make_network(load_configs("configs/digits.py:sast", ["network.kind=mlp"])[""], 7)
    assert not hasattr(mlp, "kernel_size")


def test_learning_rate_falls_to_zero_over_the_run_or_stays(float64):
    params = jnp.zeros(2)
    sizes = {}
    for schedule in ("cosine", "constant"):
        overrides = ["optimizer.name=sgd", "optimizer.learning_rate=1", f"optimizer.schedule={schedule}"]
        tx = make_optimizer(load_configs("configs/digits.py:baseline", overrides)[""], 4)
        state, update = tx.init(params), jax.jit(tx.update)
        sizes[schedule] = []
        for _ in range(5):
            updates, state = update(jnp.array([1.0, 0.0]), state, params)
            sizes[schedule].append(-float(updates[0]))
    momentum = [1.0, 1.9, 2.71, 3.439, 4.0951]
    assert sizes["constant"] == pytest.approx(momentum)
    assert sizes["cosine"] == pytest.approx([m * float(optax.cosine_decay_schedule(1.0, 4)(i)) for i, m in enumerate(momentum)])
    assert sizes["cosine"][4] == pytest.approx(0.0, abs=1e-7)


def test_edited_config_file_is_read_anew_however_soon(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    path = tmp_path / "mine.py"
    text = Path("configs/digits.py").read_text()
    for seed in (1, 2):
        path.write_text(text.replace("config.seed = 0", f"config.seed = {seed}"))
        os.utime(path, (1e9, 1e9))
        assert load_configs(f"{path}:sast")[""].seed == seed


def test_learning_rate_rises_over_the_warmup_and_falls_over_the_rest():
    def sizes(warmup, schedule):
        overrides = ["optimizer.learning_rate=0.5", f"optimizer.warmup={warmup}", f"optimizer.schedule={schedule}"]
        rate = make_schedule(load_configs("configs/digits.py:baseline", overrides)[""], 10)
        return jax.jit(jax.vmap(rate))(np.arange(11)).tolist() if callable(rate) else [rate] * 11

    falling = [0.25 * (1 + math.cos(math.pi * step / 6)) for step in range(7)]
    assert sizes(0.4, "cosine") == pytest.approx([0, 0.125, 0.25, 0.375, *falling], abs=1e-6)
    assert sizes(0.31, "constant") == pytest.approx([0, 0.125, 0.25, 0.375, *[0.5] * 7])
    assert sizes(1, "cosine") == pytest.approx([0.05 * step for step in range(11)])
    assert sizes(0, "constant") == [0.5] * 11


def test_flat_paths_cover_nested_sections():
    nested = ml_collections.ConfigDict({"a": 1, "b": {"c": (2,), "d": {"e": 3}}})
    assert config_lib.flatten(nested) == {"a": 1, "b.c": (2,), "b.d.e": 3}
