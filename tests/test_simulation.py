import contextlib
import gzip

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sast_jax import SpikingMLP, data
from sast_jax.config import load_configs
from sast_jax.data import camera, gestures, images, recorded, simulated
from sast_jax.data.camera import Camera
from sast_jax.errors import UserError

recorders = pytest.mark.parametrize("recorder", [simulated.DIGITS, simulated.NMNIST], ids=["digits", "nmnist"])


def blob():
    y, x = np.mgrid[:8, :8]
    return np.exp(-((x - 3) ** 2 + (y - 4) ** 2) / 4)


@pytest.mark.parametrize("is_refractory", [False, True])
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_events_of_a_pixel_agree_with_following_it_alone(is_refractory, seed):
    rng = np.random.default_rng(seed)
    # In multiples of 1/64 nothing is rounded, so that a change of just the threshold is one for both.
    seen = (np.round(64 * rng.normal(0, 1, (2, 6, 2, 3)).cumsum(1)) / 64).astype(np.float32)
    thresholds = (np.round(64 * rng.uniform(0.3, 0.9, (2, 3))) / 64).astype(np.float32)
    counts = camera.count_changes(seen, thresholds, is_refractory=is_refractory)
    for i, y, x in np.ndindex(2, 2, 3):
        reference = seen[i, 0, y, x]
        for step in range(5):
            now, threshold, count = seen[i, step + 1, y, x], thresholds[y, x], 0
            while abs(now - reference) >= threshold and not (is_refractory and count):
                sign = 1 if now > reference else -1
                count += sign
                reference = now if is_refractory else reference + sign * threshold
            assert counts[i, step, y, x] == count


@given(seed=st.integers(0, 2**32 - 1), is_refractory=st.booleans())
@settings(max_examples=20, deadline=None)
def test_events_have_the_counts_of_their_step_and_pixel(seed, is_refractory):
    rng = np.random.default_rng(seed)
    counts = rng.integers(-1, 2, (5, 3, 4)).astype(np.int8) * (1 if is_refractory else 3)
    events = camera.emit(counts, Camera(0.3, noise_rate=0.0, step=100, is_refractory=is_refractory), rng)
    assert (np.diff(events["t"]) >= 0).all()
    found = np.zeros(counts.shape, int)
    np.add.at(found, (events["t"] // 100, events["y"], events["x"]), 2 * events["p"].astype(int) - 1)
    np.testing.assert_array_equal(found, counts)


@recorders
def test_simulated_recording_depends_on_seed_position_and_its_image_alone(recorder):
    shown = np.stack([blob(), blob().T, blob()[::-1]])
    first = list(simulated.simulate_saccades(shown, seed=3, recorder=recorder))
    other = list(simulated.simulate_saccades(np.stack([shown[0], shown[0], shown[2]]), seed=3, recorder=recorder))
    np.testing.assert_array_equal(first[0], other[0])
    np.testing.assert_array_equal(first[2], other[2])
    assert len(first[1]) != len(other[1]) or (first[1] != other[1]).any()
    (alone,) = simulated.simulate_saccades(shown, seed=3, recorder=recorder, indices=np.array([2]))
    np.testing.assert_array_equal(first[2], alone)
    assert (first[0][:20] != next(iter(simulated.simulate_saccades(shown, seed=4, recorder=recorder)))[:20]).any()


@recorders
def test_simulated_recording_has_the_form_of_an_n_mnist_recording(recorder):
    (events,) = simulated.simulate_saccades(blob()[None], seed=0, recorder=recorder)
    assert (np.diff(events["t"]) >= 0).all()
    assert events["t"].min() >= 0
    assert events["t"].max() < recorder.duration
    assert all(events[axis].min() >= 0 and events[axis].max() <= 33 for axis in "xy")
    assert 1_000 < len(events) < 15_000
    assert 0.3 < events["p"].mean() < 0.7


@recorders
def test_still_and_uniform_scene_shows_noise_alone(recorder):
    recordings = list(simulated.simulate_saccades(np.zeros((40, 8, 8)), seed=0, recorder=recorder))
    expected = recorder.camera.noise_rate * 34 * 34 * recorder.duration * 1e-6
    mean = np.mean([len(events) for events in recordings])
    assert mean == pytest.approx(expected, abs=5 * np.sqrt(expected / 40))


def test_edge_that_brightens_emits_one_event_per_threshold_of_log():
    shown = np.ones((1, 40, 40), np.float32)
    shifts = np.zeros((1, 3, 2))
    # The image fills the middle 24 pixels; moved right by 1, the column it enters goes from dark to bright.
    shifts[0, 1:, 0] = 1.0
    seen = simulated._see(shown, shifts, simulated.DIGITS)
    counts = camera.count_changes(seen, np.full((34, 34), 0.5, np.float32))
    assert counts.shape == (1, 2, 34, 34)
    dark = simulated.DIGITS.dark_current
    rise = np.log((1.0 + dark) / dark)
    assert counts[0].max() == int(rise / 0.5)
    assert counts[0].min() == -int(rise / 0.5)
    assert not counts[0, 1].any()


def test_slow_pixels_approach_what_they_see_with_their_time_constant():
    shifts = np.zeros((1, 6, 2))
    shifts[0, 1:, 0] = 3.0
    fast = simulated.NMNIST._replace(time_constant=0.0)
    before, *_, after = simulated._see(blob()[None].astype(np.float32), shifts, fast)[0]
    slow = simulated._see(blob()[None].astype(np.float32), shifts, simulated.NMNIST)[0]
    for n, seen in enumerate(slow):
        share = np.exp(-n * simulated.NMNIST.camera.step / simulated.NMNIST.time_constant)
        np.testing.assert_allclose(seen, after + share * (before - after), atol=1e-5)


def test_fitted_recorder_counts_what_real_recordings_count(nmnist_root):
    folder = nmnist_root.parent / "MNIST"
    if not folder.is_dir():
        pytest.skip("needs MNIST's files in $SAST_JAX_DATA/MNIST")
    assert simulated.NMNIST.duration == recorded.NMNIST_DURATION
    ids = sorted(file.relative_to(nmnist_root).with_suffix("").as_posix() for file in nmnist_root.glob("Test/*/*.bin"))[::4]
    real = list(recorded.read_events("nmnist", nmnist_root, ids))
    shown = images.load_mnist(folder, "train").pixels[[int(name.rpartition("/")[2]) - 1 for name in ids]] / np.float32(255)
    own = list(simulated.simulate_saccades(shown, seed=0, recorder=simulated.NMNIST))

    def count(recordings):
        binning = {"sensor_size": (34, 34), "num_time_steps": 10, "duration": simulated.NMNIST.duration}
        return np.stack([data.bin_events(events, **binning) for events in recordings]).astype(float)

    real, own = count(real), count(own)
    assert own.sum() / real.sum() == pytest.approx(1, abs=0.05)
    assert np.corrcoef(own.sum((1, 2, 3, 4)), real.sum((1, 2, 3, 4)))[0, 1] > 0.95
    assert own[..., 1].sum() / own.sum() == pytest.approx(0.5, abs=0.01)
    # Polarities and movement are those of the real ones: inverted or mirrored, recordings would not be alike.
    alike = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(own, real, strict=True)]
    assert np.mean(alike) > 0.6
    assert np.mean([np.corrcoef(a[..., ::-1].ravel(), b.ravel())[0, 1] for a, b in zip(own, real, strict=True)]) < 0.3


def write_idx(path, array):
    raw = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


@pytest.fixture
def small_mnist(tmp_path):
    """A folder in MNIST's layout with 40 training and 12 test images; one part packed, the other not."""
    folder = tmp_path / "MNIST"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for part, number, ending in (("train", 40, ".gz"), ("t10k", 12, "")):
        shown = np.zeros((number, 28, 28), np.uint8)
        shown[:, 8:20, 8:20] = rng.integers(0, 256, (number, 12, 12))
        write_idx(folder / f"{part}-images-idx3-ubyte{ending}", shown)
        write_idx(folder / f"{part}-labels-idx1-ubyte{ending}", np.arange(number) % 10)
    return folder


def load_images(folder, **more):
    return data.load_dataset("digits", num_time_steps=4, images=str(folder), **{"num_validation": 5, **more})


def test_images_are_shown_as_n_mnist_in_the_parts_of_their_files(small_mnist):
    splits = load_images(small_mnist, image_range=(10, 40), binary=False)
    assert [len(part.labels) for part in (splits.train, splits.validation, splits.test)] == [25, 5, 12]
    assert sorted([*splits.train.ids, *splits.validation.ids]) == [f"train/{i:05d}" for i in range(10, 40)]
    assert all(int(name[-5:]) % 10 == label for name, label in zip(splits.train.ids, splits.train.labels, strict=True))
    assert splits.test.ids.tolist() == [f"t10k/{i:05d}" for i in range(12)]
    shown = images.load_mnist(small_mnist, "train").pixels / np.float32(255)
    index = int(splits.train.ids[0][-5:])
    (events,) = simulated.simulate_saccades(shown, seed=0, recorder=simulated.NMNIST, indices=np.array([index]))
    binning = {"sensor_size": (34, 34), "num_time_steps": 4, "duration": 310_000}
    np.testing.assert_array_equal(splits.train.frames[0], data.bin_events(events, **binning))


def test_recording_of_an_image_does_not_depend_on_the_range(small_mnist):
    few, all_of_them = load_images(small_mnist, image_range=(30, 40)), load_images(small_mnist, num_validation=0)
    for name, frames in zip(few.train.ids, few.train.frames, strict=True):
        np.testing.assert_array_equal(frames, all_of_them.train.frames[all_of_them.train.ids == name][0])
    np.testing.assert_array_equal(few.test.frames, all_of_them.test.frames)


def test_images_can_be_corrupted_as_any_events(small_mnist):
    clean, corrupted = (load_images(small_mnist, corruption=each) for each in (None, ("occlusion", 5)))
    assert corrupted.train.checksum() == clean.train.checksum()
    assert corrupted.test.frames.sum() < 0.9 * clean.test.frames.sum()


def test_wrong_images_are_a_message_that_names_field_or_file(small_mnist, tmp_path):
    with pytest.raises(UserError, match=r"dataset.images: .*nowhere.* has no train-images-idx3-ubyte"):
        load_images(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"dataset.image_range: there are 40 training images.*got 41"):
        load_images(small_mnist, image_range=(0, 41))
    with pytest.raises(UserError, match=r"dataset.num_test: digits brings its own test part"):
        load_images(small_mnist, num_test=5)
    with pytest.raises(UserError, match=r"dataset.images: only digits"):
        data.load_dataset("gestures", num_time_steps=4, num_validation=0, images=str(small_mnist))
    write_idx(small_mnist / "t10k-labels-idx1-ubyte", np.arange(11))
    with pytest.raises(UserError, match=r"has 12 images but 11 labels of t10k"):
        load_images(small_mnist)


@given(seed=st.integers(0, 2**32 - 1), packed=st.booleans(), cut=st.floats(0, 1), flip=st.booleans())
@settings(max_examples=60, deadline=None)
def test_damaged_image_file_gives_its_array_or_a_message_and_nothing_else(tmp_path_factory, seed, packed, cut, flip):
    folder = tmp_path_factory.mktemp("idx")
    name = f"t10k-labels-idx1-ubyte{'.gz' if packed else ''}"
    write_idx(folder / "t10k-images-idx3-ubyte", np.zeros((9, 2, 2)))
    write_idx(folder / name, np.arange(9))
    raw = bytearray((folder / name).read_bytes())
    position = np.random.default_rng(seed).integers(len(raw))
    raw[position] ^= 1 << int(seed % 8) if flip else 0
    (folder / name).write_bytes(bytes(raw[: int(cut * len(raw)) if not flip else len(raw)]))
    with contextlib.suppress(UserError):
        assert images.load_mnist(folder, "t10k").pixels.shape == (9, 2, 2)


def config_problem(*overrides):
    with pytest.raises(UserError) as error:
        load_configs("configs/digits.py:sast", overrides)
    return str(error.value)


def test_config_says_what_images_go_with(small_mnist):
    assert "dataset.image_range: needs dataset.images" in config_problem("dataset.image_range=1,5")
    assert "dataset.image_range: must be a first number and one past the last" in config_problem("dataset.image_range=5,1")
    assert "dataset.num_test: with dataset.images MNIST brings its own test part" in config_problem(
        f"dataset.images={small_mnist}"
    )
    load_configs("configs/digits.py:sast", [f"dataset.images={small_mnist}", "dataset.num_test=0", "dataset.image_range=1,5"])


def test_circle_backwards_in_time_is_the_circle_the_other_way_round():
    phase = np.linspace(0, 2 * np.pi, 50)
    for side in ("right", "left"):
        hands = [gestures._hands(f"{side} arm {way}clockwise", phase, 1.1, None) for way in ("", "counter-")]
        np.testing.assert_allclose(hands[0][::-1], hands[1], atol=1e-9)


def test_clockwise_is_as_the_camera_sees_it():
    hands = gestures._hands("right arm clockwise", np.array([0.0, 0.1]), 1.0, None)
    lowest, after = hands[:, 0]
    assert after[0] < lowest[0] < 0  # From the lowest point to the left, where the right arm is.


def test_the_opposite_light_inverts_every_polarity_and_nothing_else():
    contrasts = [lighting.contrast for lighting in gestures.LIGHTINGS]
    assert sorted(contrasts) == sorted(-contrast for contrast in contrasts)
    person = gestures._Person.draw(np.random.default_rng(0))
    hands, sway = gestures._move(person, 3, np.random.default_rng(1))
    thresholds = camera.draw_thresholds(gestures.CAMERA, gestures.SENSOR_SIZE, 0)
    counts = [
        camera.count_changes(gestures._render(person, hands, sway, lighting)[None], thresholds)
        for lighting in gestures.LIGHTINGS[:2]
    ]
    assert np.abs(counts[0]).sum() > 100
    np.testing.assert_array_equal(counts[0], -counts[1])


def test_recordings_of_gestures_depend_on_seed_and_index_alone_and_move():
    indices = np.arange(22)
    first = list(gestures.simulate_gestures(seed=1, indices=indices))
    (again,) = gestures.simulate_gestures(seed=1, indices=np.array([7]))
    np.testing.assert_array_equal(first[7], again)
    for events in first:
        assert (np.diff(events["t"]) >= 0).all()
        assert 0 <= events["t"].min() <= events["t"].max() < gestures.DURATION
        assert 600 < len(events) < 20_000
        assert 0.3 < events["p"].mean() < 0.7
    (other,) = gestures.simulate_gestures(seed=2, indices=np.array([7]))
    assert len(other) != len(again) or (other != again).any()


def test_gestures_are_split_by_person_with_every_class(monkeypatch):
    monkeypatch.setattr(gestures, "NUM_PERSONS", 4)
    monkeypatch.setattr(gestures, "FIRST_TEST_PERSON", 3)
    splits = data.load_dataset("gestures", num_time_steps=5, num_validation=44, seed=4)
    parts = (splits.train, splits.validation, splits.test)
    assert [len(part.labels) for part in parts] == [88, 44, 44]
    persons = [{name.partition("/")[0] for name in part.ids} for part in parts]
    assert sum(map(len, persons)) == len(set().union(*persons)) == 4
    assert persons[2] == {"person03"}
    for part in parts:
        assert len(set(np.bincount(part.labels, minlength=11))) == 1
    assert splits.train.frames.shape[1:] == (5, 32, 32, 2)


@pytest.mark.parametrize(
    ("fields", "is_memoryless"),
    [
        ({"decay": 0.0}, True),
        ({"decay": 0.0, "readout": "rate"}, True),
        ({"decay": 0.0, "reset": "none"}, True),
        ({"decay": 0.0, "reset": "subtract"}, False),  # The threshold is taken off one step later.
        ({"decay": 0.0, "readout_decay": 0.5}, False),
        ({"decay": 0.5}, False),
    ],
)
def test_network_without_memory_does_not_see_the_order_of_frames(fields, is_memoryless):
    network = SpikingMLP(3, features=(8, 8), **fields)
    rng = np.random.default_rng(0)
    frames = (rng.random((6, 2, 4, 4, 2)) < 0.3).astype(np.float32)
    sizes = {"dense_0": (32, 8), "dense_1": (8, 8), "readout": (8, 3)}
    weights = {
        name: {"kernel": (4 * rng.normal(size=size) / np.sqrt(size[0])).astype(np.float32), "bias": np.zeros(size[1], np.float32)}
        for name, size in sizes.items()
    }

    @jax.jit
    def logits(frames):
        return {mode: network.apply({"params": weights}, frames, mode).logits for mode in ("hard", "surrogate")}

    forward, backward = logits(frames), logits(frames[::-1])
    for mode in forward:
        assert np.allclose(forward[mode], backward[mode], atol=1e-4) == is_memoryless, mode
