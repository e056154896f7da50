"""Times of events against the duration of their frames: of any integer type, and what is said of those that do not fit."""

import json

import numpy as np
import pytest

from sast_jax import cli
from sast_jax.data import bin_events, corrupt, load_dataset
from sast_jax.data.events import EVENT_DTYPE
from sast_jax.errors import SuspicionWarning
from tests.conftest import write_nmnist_file


def events_at(times, dtype=np.int64):
    """Events of one pixel, one at each time."""
    return np.array([(0, 0, t, 1) for t in times], np.dtype([("x", np.int16), ("y", np.int16), ("t", dtype), ("p", np.int8)]))


def spread(scale=1, start=0):
    """3,000 events over a second, whose clock ticks `scale` times a microsecond from `start` on."""
    return events_at((np.arange(3000) * 1_000_000 // 3000 * scale + start).astype(np.int64))


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int64, np.uint64])
def test_event_at_nine_of_ten_seconds_lands_in_frame_900_of_1000(dtype):
    frames = bin_events(events_at([9_000_000], dtype), sensor_size=(1, 1), num_time_steps=1000, duration=10_000_000)
    assert np.argwhere(frames).tolist() == [[900, 0, 0, 1]]


def test_narrow_types_and_boolean_polarities_count_as_wide_ones():
    narrow = np.dtype([("p", bool), ("t", np.uint16), ("y", np.uint8), ("x", np.uint8)])  # In an order of its own.
    events = np.array([(True, 65_000, 200, 250), (False, 3, 0, 7)], narrow)
    frames = bin_events(events, sensor_size=(255, 255), num_time_steps=1000, duration=65_536, downsample=5)
    assert np.argwhere(frames).tolist() == [[0, 0, 1, 0], [991, 40, 50, 1]]
    kept = corrupt(events, "polarity_flip", 1, seed=3, sensor_size=(255, 255), duration=65_536)
    assert kept.dtype == EVENT_DTYPE
    assert [kept[name].tolist() for name in "xyt"] == [[7, 250], [0, 200], [3, 65_000]]


@pytest.mark.parametrize(
    ("events", "error", "message"),
    [
        (np.zeros((3, 4)), TypeError, r"events must be a structured array with the fields x, y, t \(microseconds\), p"),
        (events_at([0.5], np.float32), TypeError, "event t must be integers in microseconds; got float32"),
        (events_at([-1]), ValueError, "event t must be 0 or more; got -1 to -1"),
    ],
)
def test_what_are_no_events_is_named(events, error, message):
    for call in (
        lambda: bin_events(events, sensor_size=(1, 1), num_time_steps=1, duration=10),
        lambda: corrupt(events, "drop", 1, 0, sensor_size=(1, 1), duration=10),
    ):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize(
    "change", [{"duration": 0}, {"num_time_steps": 0}, {"duration": 2**62}], ids=["no duration", "no steps", "beyond 64 bits"]
)
def test_frames_without_length_or_beyond_64_bits_are_refused(change):
    with pytest.raises(ValueError, match="num_time_steps and duration must be positive integers whose product is at most"):
        bin_events(events_at([1]), sensor_size=(1, 1), **{"num_time_steps": 2, "duration": 10, **change})


@pytest.mark.parametrize(
    ("events", "seen", "advice"),
    [
        (spread(start=1_000_000), "0 of 3,000 events .* at 1,000,000 to 1,999,666 us", "subtract the first time"),
        (spread(start=10**9), "0 of 3,000 events .* at 1,000,000,000 to 1,000,999,666 us", "subtract the first time"),
        (events_at([1_000_000]), "0 of 1 events", "subtract the first time"),
        (spread(1000), "3 of 3,000 events .* at 0 to 999,666,000 us", "convert them, or set duration=999666001"),
        (spread(1000, 10**18), "0 of 3,000 events", "convert them, or set duration="),
        (events_at(np.arange(3000) // 3), "3,000 of 3,000 .* at 0 to 999 us, all in the first 0.1 % of it", "set duration=1000"),
        (events_at(np.zeros(20, int)), "20 of 20 .* at 0 to 0 us, all in the first 0.0001 % of it", "convert them"),
    ],
    ids=["clock at 1 s", "clock at 10^9", "one event", "nanoseconds", "nanoseconds of a clock", "milliseconds", "seconds"],
)
def test_times_that_do_not_fit_are_told_with_what_to_set(events, seen, advice):
    with pytest.warns(SuspicionWarning, match=f"bin_events: {seen}.*Times must be in microseconds.*{advice}"):
        bin_events(events, sensor_size=(1, 1), num_time_steps=10, duration=1_000_000)


@pytest.mark.parametrize(
    "events",
    [spread(), spread(3), events_at([]), events_at([5, 6]), events_at([999_999]), events_at(np.arange(10) * 2_300)],
    ids=["even", "longer", "none", "few at the start", "one at the end", "2.3 % of it"],
)
def test_times_that_fit_are_told_nothing(events):
    bin_events(events, sensor_size=(1, 1), num_time_steps=10, duration=1_000_000)


@pytest.fixture
def late_nmnist(small_nmnist):
    """Recordings of which one has a clock that started a second before it."""
    write_nmnist_file(small_nmnist / "Train/3/00001.bin", [(3, 3, 1_000_000 + 100 * i, 1) for i in range(500)])
    return small_nmnist


REMARK = "1 of 60 recordings, as Train/3/00001: 0 of 500 events are within the duration of 310,000 us"


def test_info_prepare_and_training_name_a_recording_outside_its_frames(late_nmnist, tmp_path, capsys, caplog):
    from sast_jax.config import load_configs
    from sast_jax.training.build import load_data

    overrides = [f"dataset.root={late_nmnist}", "dataset.num_time_steps=4", "dataset.num_validation=10"]
    flags = [f"--config.{each}" for each in overrides]
    for action in ("prepare", "info"):  # The second from the cache.
        assert cli.main(["data", action, "--config=configs/nmnist.py", f"--workdir={tmp_path}", *flags]) == 0
        assert REMARK in capsys.readouterr().out
    assert REMARK in " ".join(json.loads((tmp_path / "data.json").read_text())["notes"])
    load_data(load_configs("configs/nmnist.py:sast", [*overrides, "batch_size=10"])[""])  # As `train` begins.
    assert REMARK in caplog.text


def test_files_in_another_unit_are_told_which_field_sets_the_duration(small_gestures):
    for file in small_gestures.rglob("*.npy"):
        columns = np.load(file)
        columns[:, 3] *= 1000  # Microseconds, where milliseconds are read.
        np.save(file, columns)
    load = {"root": str(small_gestures), "num_time_steps": 4, "num_validation": 0, "downsample": 4}
    (note,) = load_dataset("dvs_gesture", duration=0.9, **load).notes
    assert note.startswith("44 of 44 recordings, as ibmGestureTest/user24_led/0: ")
    assert "Times must be in milliseconds (.npy) or microseconds (.aedat)" in note
    assert "or set dataset.duration=89" in note
    assert not load_dataset("dvs_gesture", duration=0.0, **load).notes  # Frames as long as each recording.
