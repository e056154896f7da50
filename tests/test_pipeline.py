import errno
import functools
import itertools
import json
import resource
import signal
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sast_jax.config import load_configs
from sast_jax.data import (
    DESCENT,
    PERTURBATION,
    Batch,
    Prefetch,
    Recordings,
    batch_indices,
    cache,
    make_augment,
    make_take,
    take_batch,
)
from sast_jax.errors import UserError
from sast_jax.training import train_and_evaluate


@given(
    batch_size=st.sampled_from([4, 8, 12]),
    process_count=st.sampled_from([1, 2, 4]),
    step=st.integers(0, 40),
    seed=st.integers(0, 9),
)
@settings(deadline=None)
def test_shares_of_all_hosts_are_the_batch_of_one(batch_size, process_count, step, seed):
    arguments = {"seed": 0, "stream": PERTURBATION, "step": step}
    shares = [
        batch_indices(50, batch_size, **arguments, process_index=i, process_count=process_count) for i in range(process_count)
    ]
    assert {len(share) for share in shares} == {batch_size // process_count}
    np.testing.assert_array_equal(np.concatenate(shares), batch_indices(50, batch_size, **arguments))


def test_shares_that_would_be_unequal_are_refused():
    with pytest.raises(ValueError, match="3 hosts cannot share a batch of 8"):
        batch_indices(50, 8, seed=0, stream=DESCENT, step=0, process_index=0, process_count=3)
    with pytest.raises(ValueError, match="there is no host 2"):
        batch_indices(50, 8, seed=0, stream=DESCENT, step=0, process_index=2, process_count=2)


def test_generators_of_streams_and_epochs_have_sequences_of_their_own():
    # The increment of PCG64 selects one of its 2^127 sequences: no two of these generators walk along the same one.
    seeds = itertools.product((0, 1, 2**32 - 1), (DESCENT, PERTURBATION), range(300))
    states = [np.random.default_rng(seed).bit_generator.state["state"] for seed in seeds]
    increments = {state["inc"] for state in states}
    assert len(increments) == len(states) == 3 * 2 * 300


def test_batch_of_a_stream_does_not_depend_on_what_was_drawn_before():
    def draw(stream, step):
        return batch_indices(40, 8, seed=3, stream=stream, step=step).tolist()

    alone = {(stream, step): draw(stream, step) for step in range(12) for stream in (DESCENT, PERTURBATION)}
    backwards = {(stream, step): draw(stream, step) for step in reversed(range(12)) for stream in (PERTURBATION, DESCENT)}
    assert alone == backwards
    orders = [[alone[stream, step] for step in range(12)] for stream in (DESCENT, PERTURBATION)]
    assert not any(first == second for first in orders[0] for second in orders[1])


def test_recordings_on_device_and_host_give_the_same_batches(recordings):
    indices = np.array([5, 0, 3])
    expected = take_batch(recordings, indices)
    for limit in (None, 0):
        batch = make_take(recordings, max_resident_bytes=limit)(indices)
        assert isinstance(batch, Batch)
        for got, wanted in zip(batch, expected, strict=True):
            assert isinstance(got, jax.Array)
            assert got.dtype == wanted.dtype
            np.testing.assert_array_equal(got, wanted)


def test_recordings_that_do_not_fit_stay_on_the_host(recordings, monkeypatch):
    put = []
    monkeypatch.setattr(jax, "device_put", lambda tree: put.append(sum(leaf.nbytes for leaf in jax.tree.leaves(tree))) or tree)
    size = recordings.frames.nbytes
    make_take(recordings, max_resident_bytes=size - 1)
    assert put == []
    make_take(recordings, max_resident_bytes=size)
    assert put == [size + recordings.labels.nbytes]


@given(asked=st.lists(st.integers(0, 9), min_size=1, max_size=12), depth=st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_prefetched_function_is_what_it_was_at_any_step_in_any_order(asked, depth):
    with Prefetch(lambda step: step * step, num_steps=10, depth=depth) as fetch:
        assert [fetch(step) for step in asked] == [step * step for step in asked]


def test_prefetch_works_ahead_but_not_beyond_the_last_step():
    drawn, done = [], threading.Event()

    def draw(step):
        drawn.append(step)
        if step == 3:
            done.set()
        return step

    with Prefetch(draw, num_steps=5, depth=2) as fetch:
        assert fetch(1) == 1
        assert done.wait(10)
        assert drawn == [1, 2, 3]
        assert fetch(4) == 4
    assert drawn == [1, 2, 3, 4]


def test_error_while_prefetching_surfaces_at_its_step():
    def draw(step):
        if step == 1:
            raise UserError("step 1 is bad")
        return step

    with Prefetch(draw, num_steps=3) as fetch:
        assert fetch(0) == 0
        with pytest.raises(UserError, match="step 1 is bad"):
            fetch(1)
        assert fetch(2) == 2


def test_training_from_host_memory_equals_training_from_device_memory(trained, tmp_path, monkeypatch):
    config, from_device = trained.config(), json.loads((trained.pair / "sast/results.json").read_text())
    monkeypatch.setattr("sast_jax.data.loading.RESIDENT_BYTES", 0)
    assert train_and_evaluate(config, tmp_path / "host")["surrogate_loss"] == from_device["surrogate_loss"]


def test_augmentation_changes_what_is_learnt(trained, tmp_path):
    path, overrides = str(trained.pair / "sast/run.json"), ["augmentation.max_shift=2", "augmentation.drop=0.2"]
    changed = train_and_evaluate(load_configs(path, overrides)[""], tmp_path / "changed")
    assert json.loads((trained.pair / "sast/results.json").read_text())["surrogate_loss"] != changed["surrogate_loss"]


def batch_of(frames):
    return Batch(jnp.asarray(frames, jnp.uint8), np.zeros(frames.shape[1], np.int32), np.ones(frames.shape[1], bool))


@functools.cache
def compiled(**arguments):
    return jax.jit(make_augment(**arguments))


def augmented(frames, *, step=0, stream=DESCENT, binary=False, seed=0, **amounts):
    augment = compiled(**amounts, binary=binary, seed=seed)
    return np.asarray(augment(batch_of(frames), jnp.int32(step), stream).frames)


def test_no_augmentation_is_none():
    assert make_augment(binary=True, seed=0) is None


def test_shift_moves_recordings_as_a_whole_with_every_shift_as_likely():
    frames = np.zeros((2, 400, 9, 9, 2), np.uint8)
    frames[0, :, 4, 4, 0], frames[1, :, 5, 4, 1] = 3, 7
    shifted = augmented(frames, max_shift=2)
    places = [np.argwhere(shifted[:, i]) for i in range(400)]
    assert all(len(place) == 2 for place in places)
    first, second = (np.array([place[k] for place in places]) for k in (0, 1))
    np.testing.assert_array_equal(second - first, np.tile([1, 1, 0, 1], (400, 1)))
    counts = np.bincount((first[:, 1] - 2) * 5 + first[:, 2] - 2, minlength=25)
    assert counts.sum() == 400
    assert counts.min() >= 4  # 16 are expected of each of the 25 shifts, with a deviation of 4.
    edge = np.zeros((1, 200, 3, 3, 2), np.uint8)
    edge[:, :, 0, 0, 0] = 1
    gone = augmented(edge, max_shift=2).sum((0, 2, 3, 4)) == 0
    assert gone.mean() == pytest.approx(1 - (3 / 5) ** 2, abs=0.15)  # Of 5 shifts along each axis 2 move it off the sensor.


def test_drop_and_jitter_have_their_probabilities_and_lose_no_more():
    rng = np.random.default_rng(0)
    frames = (rng.random((6, 8, 20, 20, 2)) < 0.3).astype(np.uint8) * 5
    dropped = augmented(frames, drop=0.3)
    assert set(np.unique(dropped)) == {0, 5}
    assert not dropped[frames == 0].any()
    assert (dropped == 0)[frames > 0].mean() == pytest.approx(0.3, abs=0.02)

    jittered = augmented(frames, time_jitter=0.4)
    np.testing.assert_array_equal(jittered.sum(0, dtype=int), frames.sum(0, dtype=int))
    single = np.zeros((5, 1, 60, 60, 2), np.uint8)
    single[2] = 1
    moved = augmented(single, time_jitter=0.4)
    np.testing.assert_allclose(moved.mean((1, 2, 3, 4)), [0, 0.2, 0.6, 0.2, 0], atol=0.02)


def test_binary_frames_stay_binary_and_counts_saturate():
    full = np.full((4, 2, 6, 6, 2), 255, np.uint8)
    counts = augmented(full, time_jitter=0.9)
    assert counts.max() == 255
    assert counts.min() == 0
    ones = augmented(full // 255, time_jitter=0.9, binary=True)
    assert set(np.unique(ones)) == {0, 1}


def test_augmentation_is_a_function_of_seed_stream_and_step():
    frames = (np.random.default_rng(0).random((3, 4, 8, 8, 2)) < 0.5).astype(np.uint8)

    arguments = [{}, {"seed": 1}, {"stream": PERTURBATION}, {"step": 1}]
    results = [augmented(frames, max_shift=2, drop=0.5, binary=True, **each).tobytes() for each in [*arguments, {}]]
    assert len(set(results[:4])) == 4
    assert results[4] == results[0]


def toy(seed):
    frames = np.random.default_rng(seed).integers(0, 255, (200, 4, 16, 16, 2)).astype(np.uint8)
    return Recordings(frames, np.arange(200, dtype=np.int32), np.array([f"r{i}" for i in range(200)]))


FILL = """
import sys
import numpy as np
from sast_jax.data import Recordings, cache

def toy():
    frames = np.random.default_rng(0).integers(0, 255, (200, 4, 16, 16, 2)).astype(np.uint8)
    return Recordings(frames, np.arange(200, dtype=np.int32), np.array([f"r{i}" for i in range(200)]))

def build_again_and_again():
    checksums = set()
    for round_number in range(30):
        checksums.add(cache.load_or_build({"name": "toy"}, toy).checksum())
        if round_number % 3 == 0:
            for path in cache.cache_dir().glob("toy-*.npz"):
                path.unlink(missing_ok=True)
    return checksums
"""


def test_two_processes_at_once_fill_and_read_one_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SAST_JAX_CACHE", str(tmp_path))
    code = f"{FILL}\nprint(flush=True)\nsys.stdin.readline()\nprint(*build_again_and_again())"
    here = {}
    exec(FILL, here)
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        other.stdout.readline()
        other.stdin.write("\n")
        other.stdin.flush()
        seen = here["build_again_and_again"]()
        assert other.stdout.read().split() == [toy(0).checksum()]
        assert other.wait(60) == 0
    assert seen == {toy(0).checksum()}
    (path,) = tmp_path.iterdir()  # No temporary file is left.
    assert cache._load(path).checksum() == toy(0).checksum()


def test_full_disk_under_the_cache_is_a_message_and_leaves_the_old_file(tmp_path, monkeypatch):
    monkeypatch.setenv("SAST_JAX_CACHE", str(tmp_path))
    cache.load_or_build({"name": "toy"}, lambda: toy(0))
    (path,) = tmp_path.iterdir()
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        with pytest.raises(UserError, match=r"cannot write the cache.*make room there, or set .* SAST_JAX_CACHE") as error:
            cache.load_or_build({"name": "toy", "num_time_steps": 5}, lambda: toy(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert error.value.__cause__.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


def test_damaged_cache_is_named_and_built_anew(recordings, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("SAST_JAX_CACHE", str(tmp_path))
    cache.load_or_build({"name": "toy"}, lambda: recordings)
    assert not caplog.records
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-100])
    assert cache.load_or_build({"name": "toy"}, lambda: recordings).checksum() == recordings.checksum()
    assert f"the cache file {str(path)!r} is damaged" in caplog.text


def test_small_cache_file_cannot_unpack_to_much_memory(recordings, tmp_path, monkeypatch):
    monkeypatch.setenv("SAST_JAX_CACHE", str(tmp_path))
    cache.load_or_build({"name": "toy"}, lambda: recordings)
    (path,) = tmp_path.iterdir()
    bomb = recordings._replace(frames=np.zeros((7, 3000, 4, 4, 2), np.uint8))
    np.savez_compressed(path, checksum=np.array(bomb.checksum()), **bomb._asdict())
    assert path.stat().st_size < 5_000
    assert cache.load_or_build({"name": "toy"}, lambda: recordings).frames.shape == recordings.frames.shape


def test_skipped_files_are_remembered_by_the_cache(recordings, tmp_path, monkeypatch):
    monkeypatch.setenv("SAST_JAX_CACHE", str(tmp_path))
    skipped = recordings._replace(skipped=np.array(["a.bin: holds no events"]))
    built = []
    for _ in range(2):
        loaded = cache.load_or_build({"name": "toy"}, lambda: built.append(1) or skipped)
        assert loaded.skipped.tolist() == ["a.bin: holds no events"]
    assert built == [1]
    assert loaded.checksum() == recordings.checksum()
