"""Any config ends in a message, or in a run that is what it says."""

import functools
import json
import math
import string
from pathlib import Path

import ml_collections
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sast_jax.cli import main
from sast_jax.config import SCHEMA, flatten, from_json, load_configs, to_json
from sast_jax.errors import SuspicionWarning, UserError
from sast_jax.training import train_and_evaluate
from tests.conftest import TINY

SPEC = "configs/digits.py:sast"

NUMBERS = st.one_of(
    st.integers(),
    st.floats(),
    st.sampled_from([2**31 - 1, 2**31, 2**63, 10**400, -(10**400), 1e308, 5e-324, math.nan, math.inf, -0.0, 0, 1, 2]),
)
SCALARS = st.one_of(NUMBERS, st.booleans(), st.none(), st.text(max_size=8), st.binary(max_size=4))
VALUES = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=3),
    st.lists(st.integers(1, 9), max_size=3).map(tuple),
    st.dictionaries(st.text(max_size=4), SCALARS, max_size=2),
    st.sampled_from([np.float32(1), np.int64(3), np.zeros(2), {"a": {"b": 1}}, object(), lambda: 0, {1, 2}]),
)
CHOICES = sorted(
    {word for field in SCHEMA.values() if field.type is str for word in field.allowed.removeprefix("one of ").split(", ")}
)
TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(CHOICES),
    NUMBERS.filter(lambda v: not isinstance(v, int) or abs(v) < 10**300).map(str),
    st.text(string.digits + "()[],.-+eE_ ", max_size=12),
    st.sampled_from(
        ["9" * 5000, "(" * 5000, "-" * 5000 + "1", "true", "TRUE", "0x10", "1e400", "١٢", "\udcff", "\0", "__import__('os')"]
    ),
)
KEYS = st.one_of(
    st.sampled_from(sorted(SCHEMA)), st.sampled_from(["sam", "dataset", "variants", "config", ""]), st.text(max_size=6)
)


def checked(config):
    """A config that was accepted holds every field, each of the type and in the range that it promises."""
    flat = flatten(config)
    assert flat.keys() == SCHEMA.keys()
    for key, field in SCHEMA.items():
        assert type(flat[key]) in ((int, float) if field.type is float else (field.type,)), key
        assert field.is_allowed(flat[key]), key
    assert flatten(from_json(json.loads(json.dumps(to_json(config))))) == flat
    return flat


OVERRIDES = st.lists(st.tuples(KEYS, TEXTS), max_size=4)
FIELDS = st.lists(st.tuples(KEYS, VALUES), max_size=4)
MISSING = st.lists(st.sampled_from(sorted(SCHEMA)), max_size=2)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.floats(), st.text(max_size=6)),
    lambda each: (
        st.lists(each, max_size=3)
        | st.dictionaries(
            st.one_of(
                st.text(max_size=6), st.sampled_from(["sam", "dataset", "config", "variants", "seed", "items", "lock", "a.b"])
            ),
            each,
            max_size=3,
        )
    ),
)


@functools.cache
def base():
    return load_configs(SPEC)[""]


def check_overrides(pairs):
    overrides = [f"{key}={text}" for key, text in pairs]
    before = flatten(base())
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sast_jax.config.warn", lambda message: None)
            flat = checked(load_configs(SPEC, overrides, with_data=False)[""])
    except UserError as error:
        message = str(error)
    else:
        message = ""
    if message:
        assert any(text.partition("=")[0] in message for text in overrides)
        return
    last = {override.partition("=")[0]: override.partition("=")[2] for override in overrides}
    for key, value in flat.items():
        if key not in last:
            assert value == before[key]
        elif SCHEMA[key].type is str:
            assert value == last[key]
        elif SCHEMA[key].type in (int, float):
            assert value == SCHEMA[key].type(last[key])


def check_config_dict(pairs, missing):
    values = to_json(base())

    def returned(variant):
        config = ml_collections.ConfigDict(values, type_safe=False)
        for key in missing:
            section, _, name = key.rpartition(".")
            target = config[section] if section else config
            if name in target:
                del target[name]
        for key, value in pairs:
            section, _, name = key.rpartition(".")
            target = config[section] if section in config and isinstance(config[section], ml_collections.ConfigDict) else config
            target[name or "x"] = value
        return config

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sast_jax.config._load_get_config", lambda path: returned)
        try:
            configs = load_configs("file.py", with_data=False)
        except UserError:
            return
        for config in configs.values():
            checked(config)


def check_json(value):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sast_jax.config.read_json", lambda path: value)
        patch.setattr(Path, "is_file", lambda self: True)
        with pytest.raises(UserError):
            load_configs("file.json", with_data=False)


@settings(max_examples=100, deadline=None)
@given(OVERRIDES)
def test_any_overrides_are_taken_or_refused_and_touch_nothing_else(pairs):
    check_overrides(pairs)


@settings(max_examples=100, deadline=None)
@given(FIELDS, MISSING)
def test_any_config_dict_is_taken_or_refused(pairs, missing):
    check_config_dict(pairs, missing)


@settings(max_examples=100, deadline=None)
@given(JSON)
def test_any_json_is_taken_or_refused(value):
    check_json(value)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(OVERRIDES, FIELDS, MISSING, JSON)
def test_any_overrides_config_dict_and_json_are_taken_or_refused(overrides, pairs, missing, value):
    check_overrides(overrides)
    check_config_dict(pairs, missing)
    check_json(value)


@pytest.mark.parametrize(
    "body",
    [
        "import sys; sys.exit(0)",
        "raise SystemExit('x')",
        "def get_config(variant=''): raise SystemExit(3)",
        "def get_config(): pass",
        "def get_config(variant=''): return get_config(variant)",
        "from ml_collections import ConfigDict\ndef get_config(variant=''):\n    c = ConfigDict()\n    c.c = c\n    return c",
        "from ml_collections import FrozenConfigDict\ndef get_config(variant=''): return FrozenConfigDict({'a': 1})",
        "from ml_collections import ConfigDict\ndef get_config(variant=''): return ConfigDict({'variants': 5})",
        "from ml_collections import ConfigDict\ndef get_config(variant=''): return ConfigDict({'variants': ('../../outside',)})",
        "from ml_collections import ConfigDict\ndef get_config(variant=''): return ConfigDict({'variants': {'a': 1}})",
        "import numpy\nfrom ml_collections import ConfigDict\n"
        "def get_config(variant=''): return ConfigDict({'variants': ('a', 'b'), 'seed': numpy.zeros(2)})",
        "\0",
        "def",
        "# -*- coding: nonsense -*-",
    ],
)
def test_odd_config_file_is_a_message(tmp_path, body, capsys):
    path = tmp_path / "own.py"
    path.write_text(body)
    assert main(["train", f"--config={path}", f"--workdir={tmp_path / 'run'}"]) == 2
    captured = capsys.readouterr().err
    assert captured.startswith("sast-jax: error: ")
    assert "own.py" in captured
    assert not (tmp_path / "run").exists()
    assert not (tmp_path.parent / "outside").exists()


def test_json_config_is_that_of_a_run_takes_overrides_and_runs_no_code(trained, run, tmp_path):
    fields = [*trained.fields, f"dataset.root={trained.data}"]
    config = load_configs("configs/nmnist.py:sast", fields)[""]
    for name in ("run.json", "results.json"):
        assert load_configs(str(run / name)) == {"": config}
    path = tmp_path / "own.json"
    path.write_text(json.dumps(to_json(config)))
    assert load_configs(str(path), ["seed=5"])[""].seed == 5
    (own,) = load_configs(str(path)).values()
    assert checked(own) == flatten(config)
    assert [type(value) for value in flatten(own).values()] == [type(value) for value in flatten(config).values()]
    results = (run / "results.json").read_text()
    assert train_and_evaluate(own, run) == json.loads(results)  # Which is finished, so it is the same run.
    with pytest.raises(UserError, match="a JSON file has no variants"):
        load_configs(f"{path}:sast")
    path.write_text(json.dumps({**to_json(config), "seed": "import os"}))
    with pytest.raises(UserError, match="seed: must be an integer"):
        load_configs(str(path))
    path.write_text("{")
    with pytest.raises(UserError, match=r"own\.json"):
        load_configs(str(path))


@pytest.mark.parametrize(
    ("spec", "overrides", "told"),
    [
        ("baseline", ["sam.adaptive=element", "seed=1"], "sam.adaptive: without effect"),
        (
            "sast",
            ["network.kind=mlp", "network.kernel_size=3", "network.pool_size=3"],
            "network.kernel_size, network.pool_size: ",
        ),
        ("sast", ["network.readout=rate", "network.readout_decay=0.5"], "network.readout_decay: without effect"),
        ("", ["sam.adaptive=element"], None),  # The second of the pair uses it.
        ("sast", ["sam.adaptive=element", "network.kernel_size=5"], None),
    ],
)
def test_override_that_changes_nothing_is_told(spec, overrides, told):
    if told is None:
        load_configs(f"configs/digits.py:{spec}".rstrip(":"), overrides)
    else:
        with pytest.warns(SuspicionWarning, match=told):
            load_configs(f"configs/digits.py:{spec}", overrides)


def test_more_steps_than_are_counted_are_refused(tiny, tmp_path):
    with pytest.raises(UserError, match="num_epochs: 2147483647 of them are 6442450941 steps; at most 2147483647 are counted"):
        train_and_evaluate(tiny("sast", "num_epochs=2147483647"), tmp_path)


EXTREMES = {
    "network.threshold": ["5e-324", "1e-30", "1e38"],
    "network.slope": ["5e-324", "1e38"],
    "network.init_gain": ["5e-324", "1000"],
    "network.decay": ["0", "1", "5e-324"],
    "sam.rho": ["5e-324", "1e-30", "1e38"],
    "sam.every_steps": ["2147483647"],
    "sam.start": ["1", "5e-324"],
    "optimizer.learning_rate": ["5e-324", "1e38"],
    "optimizer.name": ["sgd", "adamw"],
    "network.family": ["logistic", "fast_sigmoid"],
    "network.reset": ["subtract", "none"],
    "network.readout": ["rate"],
    "network.features": ["()", "1"],
    "checkpoint_every_epochs": ["2147483647"],
    "evaluate_every_epochs": ["2147483647"],
    "dataset.num_time_steps": ["1"],
    "seed": [str(2**32 - 1)],
    "mode": ["straight_through"],
    "network.kind": ["conv"],
}


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(
    st.lists(
        st.sampled_from(sorted(EXTREMES)).flatmap(lambda key: st.tuples(st.just(key), st.sampled_from(EXTREMES[key]))),
        min_size=1,
        max_size=5,
        unique_by=lambda pair: pair[0],
    )
)
@pytest.mark.filterwarnings("ignore::sast_jax.errors.SuspicionWarning")
def test_extreme_configs_end_in_a_message_or_in_finite_results(small_nmnist, tmp_path_factory, capsys, pairs):
    workdir = tmp_path_factory.mktemp("run") / "run"
    fields = dict(field.split("=") for field in [*TINY, f"dataset.root={small_nmnist}", "num_epochs=1", "network.features=4"])
    flags = [f"--config.{key}={value}" for key, value in (fields | dict(pairs)).items()]
    status = main(["train", "--config=configs/nmnist.py:sast", f"--workdir={workdir}", *flags])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    if status == 0:
        results = json.loads((workdir / "results.json").read_text())
        assert all(math.isfinite(results[key]) for key in ("surrogate_loss", "hard_loss", "transfer_gap"))
    else:
        assert status == 2
        assert captured.err.splitlines()[-1].strip()
        assert not (workdir / "results.json").exists()
