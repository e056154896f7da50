"""What a command does when it is interrupted, or when nobody reads what it prints."""

import os
import subprocess
import sys
import time
import zlib

import pytest

from sast_jax.compilation import remove_cut_off
from sast_jax.config import load_configs
from sast_jax.experiments.sweep import _Sweep
from sast_jax.text import Output
from sast_jax.training.build import num_gradients
from tests.conftest import TINY

INTERRUPTED = """
import gc, os, signal, sys, time
from sast_jax import cli
import sast_jax.public

def command(args, overrides):
    {body}

cli._COMMANDS["report"] = command
sys.argv = ["sast-jax", "report", "--workdir=."]
cli.entry_point()
"""


def run(body, tmp_path, **options):
    environment = {**os.environ, "SAST_JAX_CACHE": str(tmp_path), "JAX_ENABLE_COMPILATION_CACHE": "false"}
    command = [sys.executable, "-c", INTERRUPTED.format(body=body)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=60, **options)


def test_interrupt_that_falls_into_a_garbage_collection_ends_the_command(tmp_path):
    body = """
    def collect(phase, info):
        gc.callbacks.clear()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)  # The interrupt is raised here, where Python drops it.
    gc.callbacks.append(collect)
    gc.collect()
    time.sleep(20)
    print("went on")"""
    done = run(body, tmp_path)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.startswith("sast-jax: interrupted")
    assert "Traceback" not in done.stderr


def test_second_interrupt_ends_the_process_at_once(tmp_path):
    body = """
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(20)
    finally:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(20)"""
    done = run(body, tmp_path)
    assert (done.returncode, done.stderr) == (130, "sast-jax: interrupted\n")


@pytest.mark.parametrize("number", [1, 2])
def test_command_goes_on_when_nobody_reads_what_it_prints(tmp_path, number):
    body = f"""
    os.close({number})
    for stream in (sys.stdout, sys.stderr):
        print("x" * 100_000, file=stream, flush=True)
    open({str(tmp_path / "done")!r}, "x").close()"""
    assert run(body, tmp_path).returncode == 0
    assert (tmp_path / "done").exists()


def test_reader_that_leaves_early_is_no_error(tmp_path):
    script = INTERRUPTED.format(body='for _ in range(10_000): print("x" * 100)')
    environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    process.stdout.readline()
    process.stdout.close()
    error = process.stderr.read()
    process.stderr.close()
    assert (process.wait(60), error) == (0, b"")


def test_full_device_drops_what_is_printed():
    with open("/dev/full", "w") as full:
        output = Output(full)
        output.write("lost\n")
        output.flush()
        output.write("also\n")
        output.flush()


def test_missing_platform_is_one_line(tmp_path):
    environment = {**os.environ, "JAX_PLATFORMS": "cuda", "SAST_JAX_CACHE": str(tmp_path)}
    command = [sys.executable, "-m", "sast_jax", "train", "--config=configs/digits.py:sast", f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=120)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("sast-jax: ")]
    assert lines[-1].startswith("sast-jax: error: JAX_PLATFORMS: 'cuda' cannot be used here (")
    assert "Traceback" not in done.stderr


def test_compiled_program_cut_off_by_a_kill_is_removed_once(tmp_path):
    whole = zlib.compress(os.urandom(5000))
    for name, content in (("a-cache", whole), ("b-cache", whole[:3000]), ("c-cache", b""), ("d-cache", b"(\xb5/\xfd zstd")):
        (tmp_path / name).write_bytes(content)
    now = time.time()
    assert remove_cut_off(tmp_path, now) == 0  # They may be being written.
    assert remove_cut_off(tmp_path, now + 60) == 2
    assert sorted(path.name for path in tmp_path.glob("*-cache")) == ["a-cache", "d-cache"]
    (tmp_path / "a-cache").write_bytes(b"x")
    os.utime(tmp_path / "a-cache", (now, now))
    assert remove_cut_off(tmp_path, now + 120) == 0  # Looked at before.


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), 200.0),
        (("sam.every_steps=4",), 125.0),
        (("sam.start=0.5",), 150.0),
        (("sam.perturbation_batch_size=2",), 120.0),
        (("sam.perturbation=noise",), 100.0),
        (("sam.rho=0",), 100.0),
    ],
)
def test_cost_of_a_run_counts_rare_late_and_small_perturbations(overrides, expected, small_nmnist):
    config = load_configs("configs/nmnist.py:sast", [*TINY, f"dataset.root={small_nmnist}", *overrides])[""]
    assert num_gradients(config, 100) == pytest.approx(expected)
    assert _Sweep._cost(config) == pytest.approx(10 * expected)


def test_sweep_says_before_its_runs_that_figures_cannot_be_drawn(monkeypatch, tmp_path, capsys):
    from sast_jax.experiments import sweep

    monkeypatch.setattr(sweep.importlib.util, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="figures need matplotlib"), pytest.raises(ValueError, match="there is no file"):
        sweep.run_study(tmp_path / "none.py", [], tmp_path / "run")
