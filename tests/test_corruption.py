import re
from math import erfc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sast_jax import data
from sast_jax.data import CORRUPTIONS, corrupt
from sast_jax.data.corruption import HOT_PIXEL_RATE, SEVERITIES
from sast_jax.data.events import EVENT_DTYPE

kinds = pytest.mark.parametrize("kind", CORRUPTIONS)
SCENE = {"sensor_size": (20, 30), "duration": 200_000}

ADDING = {"background", "hot_pixels"}
REMOVING = {"drop", "occlusion", "time_crop", "space_jitter"}


def draw(seed, number, *, sensor_size=(20, 30), duration=200_000):
    """Events anywhere, in any order in time."""
    rng = np.random.default_rng(seed)
    events = np.empty(number, EVENT_DTYPE)
    for name, high in (("x", sensor_size[1]), ("y", sensor_size[0]), ("t", duration), ("p", 2)):
        events[name] = rng.integers(0, high, number)
    return events


@kinds
@given(
    seed=st.integers(0, 2**32 - 1),
    number=st.integers(0, 200),
    severity=st.sampled_from(SEVERITIES),
    sensor_size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    duration=st.integers(1, 300_000),
)
@settings(max_examples=60, deadline=None)
def test_result_is_in_order_and_in_place_and_a_function_of_the_seed(kind, seed, number, severity, sensor_size, duration):
    events = draw(seed, number, sensor_size=sensor_size, duration=duration)
    before = events.copy()
    scene = {"sensor_size": sensor_size, "duration": duration}
    result = corrupt(events, kind, severity, seed, **scene)
    np.testing.assert_array_equal(events, before)
    np.testing.assert_array_equal(result, corrupt(events, kind, severity, seed, **scene))
    assert result.dtype == EVENT_DTYPE
    assert not np.shares_memory(result, events)
    assert (np.diff(result["t"]) >= 0).all()
    for name, high in (("x", sensor_size[1]), ("y", sensor_size[0]), ("t", duration), ("p", 2)):
        assert ((result[name] >= 0) & (result[name] < high)).all()


@kinds
@given(seed=st.integers(0, 2**32 - 1), severity=st.sampled_from(SEVERITIES))
@settings(max_examples=30, deadline=None)
def test_each_kind_changes_what_it_says_and_nothing_else(kind, seed, severity):
    events = draw(seed, 300)
    result = corrupt(events, kind, severity, seed, **SCENE)
    number = {"+": kind in ADDING, "-": kind in REMOVING}
    assert number["+"] or len(result) <= len(events)
    assert number["-"] or len(result) >= len(events)
    kept = {
        "drop": ("x", "y", "t", "p"),
        "background": (),
        "time_jitter": ("x", "y", "p"),
        "space_jitter": ("t", "p"),
        "polarity_flip": ("x", "y", "t"),
        "hot_pixels": (),
        "occlusion": ("x", "y", "t", "p"),
        "time_crop": ("x", "y", "t", "p"),
    }[kind]
    if kept:
        before, after = (sorted(array[list(kept)].tolist()) for array in (events, result))
        remaining = iter(before)
        assert all(any(event == other for other in remaining) for event in after)  # After is a sublist of before.
    else:
        remaining = iter(result.tolist())
        assert all(
            any(event == other for other in remaining) for event in events[np.argsort(events["t"], kind="stable")].tolist()
        )


@kinds
def test_events_after_the_end_are_left_out(kind):
    events = draw(0, 400, duration=400_000)
    assert corrupt(events, kind, 1, 0, **SCENE)["t"].max() < SCENE["duration"]


def damage(kind, events, result):
    """How far a recording is from what it was: events lost, added, flipped, or the mean way an event went."""
    if kind in ("drop", "occlusion", "time_crop"):
        return (len(events) - len(result)) / len(events)
    if kind in ADDING:
        return len(result) - len(events)
    if kind == "polarity_flip":
        return np.mean(result["p"] != events["p"])
    if kind == "time_jitter":  # Every event has a pixel of its own.
        by_pixel = [np.argsort(each["y"].astype(int) * 1000 + each["x"]) for each in (events, result)]
        return np.std(result["t"][by_pixel[1]] - events["t"][by_pixel[0]]) / SCENE["duration"]
    at = np.searchsorted(events["t"], result["t"])  # Every event has a time of its own.
    return np.std([result["x"] - events["x"][at], result["y"] - events["y"][at]])


def separate_events(seed):
    """One event per pixel and time, in order of time."""
    rng = np.random.default_rng(seed)
    events = np.zeros(600, EVENT_DTYPE)
    events["y"], events["x"] = np.divmod(rng.permutation(600), 30)
    events["t"] = np.sort(rng.choice(SCENE["duration"], 600, replace=False))
    events["p"] = rng.integers(0, 2, 600)
    return events


def rounded_deviation(deviation):
    """Standard deviation of a normal number rounded to an integer."""
    edges = np.arange(1, 30) - 0.5  # The square of |k| is the sum of its steps, 2 k - 1.
    return np.sqrt(sum((2 * k - 1) * erfc(edge / deviation / np.sqrt(2)) for k, edge in enumerate(edges, 1)))


@kinds
def test_damage_grows_with_severity_and_is_as_strong_as_stated(kind):
    mean = []
    for severity in SEVERITIES:
        recordings = [separate_events(seed) for seed in range(40)]
        results = [corrupt(events, kind, severity, (7, seed), **SCENE) for seed, events in enumerate(recordings)]
        mean.append(np.mean([damage(kind, *pair) for pair in zip(recordings, results, strict=True)]))
    assert (np.diff(mean) > 0).all(), mean
    strengths = np.array(CORRUPTIONS[kind].strengths)
    expected = {
        "background": strengths * 600 * 0.2,
        "hot_pixels": np.ceil(strengths * 600) * HOT_PIXEL_RATE * 0.2,
        "occlusion": np.round(strengths * 20) / 20 * np.round(strengths * 30) / 30,
        "space_jitter": [rounded_deviation(20 * strength) for strength in strengths],
    }.get(kind, strengths)
    weak = slice(3) if kind in ("time_jitter", "space_jitter") else slice(5)  # The border cuts off strong jitter.
    np.testing.assert_allclose(np.array(mean)[weak], expected[weak], rtol=0.12, atol=0.03)


def test_table_in_the_docstring_lists_every_strength():
    rows = re.findall(r"^\s*(\w+)  .*?((?:\s+[\d.]+){5})$", corrupt.__doc__, re.M)
    table = {name: tuple(map(float, numbers.split())) for name, numbers in rows if name != "kind"}
    assert table == {kind: corruption.strengths for kind, corruption in CORRUPTIONS.items()}


def test_unknown_kind_and_severity_are_refused():
    with pytest.raises(ValueError, match=r"corruption must be one of drop, .*got 'rain'"):
        corrupt(draw(0, 3), "rain", 1, 0, **SCENE)
    with pytest.raises(ValueError, match=r"severity must be 1 to 5; got 6"):
        corrupt(draw(0, 3), "drop", 6, 0, **SCENE)


def load(name, root, **more):
    # As many steps of digits as in other tests, which are simulated once.
    own = {"num_test": 60, "num_validation": 20} if name == "digits" else {"num_validation": 10, "root": str(root)}
    return data.load_dataset(name, num_time_steps=10 if name == "digits" else 4, binary=False, **own, **more)


@pytest.mark.parametrize("name", ["nmnist", "digits"])
def test_corruption_touches_the_frames_of_the_test_part_alone(name, small_nmnist, monkeypatch):
    clean, corrupted, again = (load(name, small_nmnist, corruption=each) for each in (None, ("drop", 3), ("drop", 3)))
    for part in ("train", "validation"):
        assert getattr(clean, part).checksum() == getattr(corrupted, part).checksum()
    assert corrupted.test.labels.tolist() == clean.test.labels.tolist()
    assert corrupted.test.ids.tolist() == clean.test.ids.tolist()
    assert corrupted.test.checksum() == again.test.checksum()
    assert (corrupted.test.frames <= clean.test.frames).all()
    lost = 1 - corrupted.test.frames.sum(dtype=int) / clean.test.frames.sum(dtype=int)
    assert lost == pytest.approx(0.4, abs=0.02)


def test_corruption_of_a_recording_depends_on_its_own_id_alone(small_nmnist):
    before = load("nmnist", small_nmnist, corruption=("background", 2)).test
    (small_nmnist / "Test/0/00001.bin").unlink()
    after = load("nmnist", small_nmnist, corruption=("background", 2)).test
    np.testing.assert_array_equal(after.frames, before.frames[before.ids != "Test/0/00001"])
