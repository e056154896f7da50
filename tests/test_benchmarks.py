"""Every file of `benchmarks/` at work, with tiny sizes and in a folder of its own.

What is measured so means nothing. Tested is that a benchmark runs, that it writes all rows that it promises with numbers in them,
and that it leaves published results alone.
"""

import gzip
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sast_jax.data import simulated
from tests.conftest import gesture_events, write_nmnist_file

FOLDER = Path("benchmarks").resolve()
PUBLISHED = [Path("README.md"), *sorted(Path("docs/results").iterdir()), *sorted((FOLDER / "results").iterdir())]


def load(name):
    """A benchmark as a module, for what it lists."""
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(FOLDER))


LIBRARIES = load("peer_networks").LIBRARIES


def run(name, output, *arguments, **variables):
    """Runs a benchmark and returns what it printed."""
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--small", f"--output={output}", *map(str, arguments)]
    before = [path.read_bytes() for path in PUBLISHED]
    compiled = {"JAX_COMPILATION_CACHE_DIR": str(Path(os.environ["SAST_JAX_CACHE"]) / "benchmarks")}
    environment = os.environ | compiled | {"PYTHONPATH": os.getcwd(), "MPLBACKEND": "agg"} | variables
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [path.read_bytes() for path in PUBLISHED] == before
    return done.stdout


def read(output, name):
    """Returns what was written of a table; all of its numbers are finite and all rows as long as their heading."""

    def refuse(constant):
        raise AssertionError(f"{name}.json holds {constant}")

    results = json.loads((output / f"{name}.json").read_text(), parse_constant=refuse)
    tables = re.findall(r"(?:^\|.*\|\n)+", (output / f"{name}.md").read_text(), re.M)
    assert tables
    for table in tables:
        heading, rule, *rows = table.splitlines()
        assert re.fullmatch(r"(\|---)+\|", rule)
        assert rows
        assert {line.count("|") for line in (heading, *rows)} == {rule.count("|")}
    assert "nan" not in re.findall(r"\w+", " ".join(tables))
    return results, tables


def assert_timed(row):
    low, median, high = row["milliseconds"]
    assert 0 < low <= median <= high
    assert row["ratio"] > 0


def assert_accuracies(methods):
    """Methods by name, as `transfer_gap.summary` makes them."""
    for row in methods.values():
        surrogate, hard, gap = (row[key]["mean"] for key in ("surrogate", "hard", "gap"))
        assert 0 <= min(surrogate, hard) <= max(surrogate, hard) <= 100
        assert gap == pytest.approx(surrogate - hard, abs=1e-3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of runs on simulated digits by three methods, and the folder where `transfer_gap.py` wrote its table."""
    folder, output = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("transfer_gap")
    few = ("--config.dataset.num_test=60", "--config.dataset.num_validation=60")
    config = ("--config=configs/digits.py", f"--workdir={folder}", "--seeds=0", *few)
    run("transfer_gap", output, *config, "--rhos=0.2", "--selection-seeds=0")
    return folder, output, config


def write_idx(path, array):
    path.write_bytes(gzip.compress(bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with MNIST's files, N-MNIST recordings of their first images, and DVS128 Gesture recordings; small and made up."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    (root / "MNIST").mkdir()
    for part, number in (("train", 1064), ("t10k", 20)):
        shown = np.zeros((number, 28, 28), np.uint8)
        shown[:, 6:22, 6:22] = rng.integers(0, 2, (number, 4, 4)).repeat(4, 1).repeat(4, 2) * 255
        write_idx(root / "MNIST" / f"{part}-images-idx3-ubyte.gz", shown)
        write_idx(root / "MNIST" / f"{part}-labels-idx1-ubyte.gz", (np.arange(number) % 10).astype(np.uint8))
        if part == "train":
            images = shown[:20] / np.float32(255)
    for index, events in enumerate(simulated.simulate_saccades(images, seed=1, recorder=simulated.NMNIST)):
        columns = (events[key].tolist() for key in "xytp")
        part = "Train" if index < 10 else "Test"
        write_nmnist_file(root / "NMNIST" / part / str(index % 10) / f"{index + 1:05d}.bin", zip(*columns, strict=True))
    for user in (1, 7):
        folder = root / "DVSGesture" / "ibmGestureTrain" / f"user{user:02d}_led"
        folder.mkdir(parents=True)
        for label in range(11):
            x, y, t, p = zip(*gesture_events(100 * user + label), strict=True)
            np.save(folder / f"{label}.npy", np.array([x, y, p, np.array(t) / 1000], np.float32).T)
    return root


@pytest.mark.slow
def test_allocator_compares_three_settings(tmp_path):
    run("allocator", tmp_path)
    results, (table,) = read(tmp_path, "allocator")
    ((kinds),) = results["workloads"].values()
    assert kinds.keys() == {"train", "sast"}
    for rows in kinds.values():
        assert len(rows) == 3
        assert rows["freed memory kept"]["ratio"] == 1
        for row in rows.values():
            assert_timed(row)
    assert table.count("\n") == 2 + 3


@pytest.mark.slow
def test_convolution_is_timed_in_every_kind_and_equal(tmp_path):
    run("convolution", tmp_path)
    results, _ = read(tmp_path, "convolution")
    libraries = {"jax.lax", "sast_jax"} | ({"PyTorch"} if importlib.util.find_spec("torch") else set())
    for rows in results["layers"].values():
        assert rows.keys() == libraries
        for row in rows.values():
            assert row.keys() == {"forward", "weight gradient", "image gradient"}
            for timed in row.values():
                assert_timed(timed)


@pytest.mark.slow
def test_inference_and_evaluation_are_timed(tmp_path):
    run("inference", tmp_path)
    results, (table,) = read(tmp_path, "inference")
    ((kinds),) = results["workloads"].values()
    assert {kind: len(rows) for kind, rows in kinds.items()} == {"inference": 3, "evaluation in both modes": 2}
    for rows in kinds.values():
        assert next(iter(rows.values()))["ratio"] == 1
        for row in rows.values():
            assert_timed(row)
    assert table.count("\n") == 2 + 5


@pytest.mark.slow
def test_lif_is_timed_in_every_way_over_a_floor(tmp_path):
    run("lif", tmp_path)
    results, (table,) = read(tmp_path, "lif")
    ((rows, floor),) = results["workloads"].values()
    assert rows.keys() >= load("lif").WAYS.keys()
    for row in rows.values():
        for kind in ("forward", "gradient"):
            assert_timed(row[kind])
            assert floor[kind] > 0
    assert rows["lif"]["gradient"]["ratio"] == 1
    assert table.count("\n") == 2 + len(rows) + 1


@pytest.mark.slow
def test_train_step_has_a_row_for_each_candidate(tmp_path):
    run("train_step", tmp_path)
    results, tables = read(tmp_path, "train_step")
    module = load("train_step")
    for rows, candidates in zip(results["workloads"].values(), (module.CONV, module.DENSE), strict=True):
        assert len(rows) == len(candidates) + 1
        assert rows.keys() > candidates.keys()
        for row in rows.values():
            assert_timed(row)
            assert row["compile_seconds"] > 0
    assert len(tables) == 2


@pytest.mark.slow
def test_many_runs_are_compared_with_one(tmp_path):
    run("many_runs", tmp_path)
    results, (table,) = read(tmp_path, "many_runs")
    assert results["workloads"].keys() == load("many_runs").WORKLOADS.keys()
    for rows in results["workloads"].values():
        assert [row["runs"] for row in rows] == [1, 2]
        assert rows[0]["ratio"] == 1
        for row in rows:
            assert min(row[key] for key in ("milliseconds_per_run", "ratio", "bytes", "fitting", "compile_seconds")) > 0
    assert table.count("\n") == 2 + 8


@pytest.mark.slow
def test_gpu_measures_all_of_it_on_any_device(tmp_path):
    run("gpu", tmp_path)
    results, tables = read(tmp_path, "gpu")
    assert results["missing"] == {}
    assert results["first_step"]["first_step_seconds"] > 0
    conv, dense = results["workloads"].values()
    assert len(conv) == 4 + 3 + 2 + 2  # Train steps, inference, SAST steps, and those of pixels in pairs.
    assert len(dense) == 4 + 3 + 2
    for row in [*conv.values(), *dense.values()]:
        assert_timed(row)
        assert row["bytes"] > 0
    assert [len(rows) for rows in results["many_runs"].values()] == [2, 2]
    assert len(tables) == 2


@pytest.mark.slow
def test_startup_times_imports_and_trainings(tmp_path):
    run("startup", tmp_path)
    results, (table,) = read(tmp_path, "startup")
    assert len(results["seconds"]) == 3 + 2
    assert all(min(values) > 0 for values in results["seconds"].values())
    assert table.count("\n") == 2 + 5


@pytest.mark.slow
def test_convergence_stays_below_its_bound(tmp_path):
    run("convergence", tmp_path)
    results, _ = read(tmp_path, "convergence")
    assert results["num_steps"] == [16, 64]
    assert results["largest_curvature_measured"] <= results["smoothness"]
    assert results["variants"].keys() == {"independent", "same", "constant"}
    for name in ("independent", "constant"):
        row = results["variants"][name]
        assert all(0 < mean < bound for mean, bound in zip(row["mean"], row["bound"], strict=True))
    assert (tmp_path / "convergence.png").stat().st_size > 10_000


@pytest.mark.slow
def test_memory_over_time_is_less_in_chunks(tmp_path):
    run("memory_over_time", tmp_path)
    results, (table,) = read(tmp_path, "memory_over_time")
    rows = {(row["num_time_steps"], row["time_chunk"]): row for row in results["rows"]}
    assert rows.keys() == {(4, 0), (4, 2), (9, 0), (9, 3)}
    assert rows[9, 3]["temporary_bytes"] < rows[9, 0]["temporary_bytes"] < rows[9, 0]["peak_bytes"]
    assert table.count("\n") == 2 + 2
    assert (tmp_path / "memory_over_time.png").stat().st_size > 10_000


@pytest.mark.slow
def test_determinism_compares_places_and_pythons(tmp_path):
    run("determinism", tmp_path, f"--pythons={sys.executable}")
    results, _ = read(tmp_path, "determinism")
    again, one_thread, python = results["places"].values()
    assert again["equal"] == python["equal"] == [True]
    assert again["relative_difference"] == [0.0]
    assert one_thread["relative_difference"][0] < 1e-2


@pytest.mark.slow
def test_soak_watches_memory_time_and_compilations(tmp_path):
    run("soak", tmp_path)
    results, (table,) = read(tmp_path, "soak")
    assert table.count("\n") == 2 + 2
    for row in results["runs"].values():
        assert [step for step, *_ in row["epochs"]] == [104, 208, 312, 416]
        assert min(row["megabytes"]) > 50
        assert min(row["processor_seconds_per_epoch"]) > 0
        assert row["compiled_later"] <= 1 < row["compiled_in_first_epoch"]
    assert (tmp_path / "soak.png").stat().st_size > 10_000


@pytest.mark.slow
def test_memory_trains_three_networks_on_gestures(tmp_path):
    run("memory", tmp_path, "--seeds=0")
    results, (table,) = read(tmp_path, "memory")
    assert results["methods"].keys() == {"memory", "none", "shuffled"}
    for row in results["methods"].values():
        assert 0 <= row["accuracy"]["mean"] <= 100
        assert 0 <= row["direction"]["mean"] <= 100
    assert table.count("\n") == 2 + 3


@pytest.mark.slow
def test_transfer_gap_selects_a_radius_and_compares_methods(trained):
    _, output, _ = trained
    results, (table,) = read(output, "transfer_gap_digits")
    assert results["selection"].keys() == {"0.2"}
    assert results["rho"] == 0.2
    assert results["methods"].keys() == {"baseline", "sast", "straight_through"}
    assert_accuracies(results["methods"])
    gradients = {name: row["gradient_evaluations"]["mean"] for name, row in results["methods"].items()}
    assert gradients["sast"] == 2 * gradients["baseline"]
    assert table.count("\n") == 2 + 3
    assert (output / "transfer_gap_digits.png").stat().st_size > 10_000


@pytest.mark.slow
def test_axes_has_all_settings_and_the_whole_map(trained, tmp_path):
    run("axes", tmp_path, *trained[2], "--rho=0.2", "--slopes=2,5", "--rhos=0,0.2")
    results, (table,) = read(tmp_path, "axes_digits")
    assert results["settings"].keys() == load("axes").SETTINGS.keys()
    for rows in results["settings"].values():
        assert rows.keys() == {"baseline", "sast"}
        assert_accuracies(rows)
    assert table.count("\n") == 2 + 9
    grid, _ = read(tmp_path, "slope_rho_digits")
    assert {slope: list(rows) for slope, rows in grid.items()} == {"2": ["0", "0.2"], "5": ["0", "0.2"]}
    for rows in grid.values():
        assert_accuracies(rows)
    assert (tmp_path / "slope_rho_digits.png").stat().st_size > 10_000


@pytest.mark.slow
def test_certified_rows_contract_where_they_say_so(trained, tmp_path):
    run("certified", tmp_path, *trained[2], "--rho=0.2")
    results, (table,) = read(tmp_path, "certified_digits")
    _, free, slope, decay, capped = (row["contraction_factor"] for row in results["rows"].values())
    assert max(slope, decay) <= 1 - results["margin"] < free == capped
    for row in results["rows"].values():
        assert_accuracies({name: row[name] for name in ("baseline", "sast")})
    assert table.count("\n") == 2 + 5


@pytest.mark.slow
def test_cheaper_sast_costs_what_its_schedules_say(trained, tmp_path):
    run("cheaper_sast", tmp_path, *trained[2], "--rho=0.2", "--schedules=half_batch,every_4,last_quarter,warm_start_plain")
    results, (table,) = read(tmp_path, "cheaper_sast_digits")
    names = ["baseline", "sast", "half_batch", "every_4", "last_quarter", "warm_start_plain"]
    assert list(results["methods"]) == list(results["cost_ratios"]) == names
    assert_accuracies(results["methods"])
    gradients = {name: row["gradient_evaluations"]["mean"] for name, row in results["methods"].items()}
    ratios = [gradients[name] / gradients["baseline"] for name in names]
    np.testing.assert_allclose(ratios, [1, 2, 1.5, 1.25, 1.25, 2], atol=0.02)
    assert all(min(each) > 0 for each in results["cost_ratios"].values())
    assert table.count("\n") == 2 + 6


@pytest.mark.slow
def test_deployment_has_every_suite(trained, tmp_path):
    run("deployment", tmp_path, *trained[2], "--rho=0.2")
    results, tables = read(tmp_path, "deployment_digits")
    assert results["evaluations"].keys() == {"baseline", "sast", "straight_through"}
    for (evaluation,) in results["evaluations"].values():
        assert evaluation.keys() == {"transfer", "calibration", "quantization", "synops", "robustness"}
    assert len(tables) == 6  # Calibration has two, accuracy and confidence.
    assert "equals the NumPy reference bit for bit: yes" in (tmp_path / "deployment_digits.md").read_text()
    _, (table,) = read(tmp_path, "deployment_summary_digits")
    assert table.count("\n") == 2 + 3
    assert all(title in table for title in ("hard, calibrated", "INT8", "corrupted", "operations"))


@pytest.mark.slow
def test_precision_compares_bfloat16_with_float32(trained, tmp_path):
    run("precision", tmp_path, *trained[2])
    results, (table,) = read(tmp_path, "precision_digits")
    assert list(results["methods"]) == ["baseline float32", "baseline bfloat16", "sast float32", "sast bfloat16"]
    assert_accuracies(results["methods"])
    assert table.count("\n") == 2 + 4


@pytest.mark.slow
def test_gap_predictors_measures_all_of_finished_runs(trained, tmp_path):
    (tmp_path / "unfinished").mkdir()
    folders = sorted(trained[0].glob("*-seed0*"))[:4]
    said = run("gap_predictors", tmp_path, tmp_path / "unfinished", *folders)
    assert "unfinished: not finished, left out" in said
    results, (table,) = read(tmp_path, "gap_predictors_digits")
    assert [row["run"] for row in results["runs"]] == [folder.name for folder in folders]
    for row in results["runs"]:
        finished = json.loads((trained[0] / row["run"] / "results.json").read_text())
        assert row["transfer_gap"] == finished["transfer_gap"]
        assert row["curvature"] > 0
        assert row["validation_gap"] == finished["validation"]["transfer_gap"]
    assert table.count("\n") == 2 + len(load("gap_predictors").PREDICTORS)
    assert (tmp_path / "gap_predictors_digits.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("library", ["numpy", "snntorch", "norse"])
def test_nir_readers_agree_on_all_recordings(trained, tmp_path, library):
    if library != "numpy":
        pytest.importorskip(library)
    run("nir_readers", tmp_path, trained[0] / "baseline-seed0")
    results, (table,) = read(tmp_path, "nir_readers")
    row = results["runs"]["baseline-seed0"][library]
    assert row["recordings"] == 60
    assert row["equal_decisions"] >= 59
    assert row["different_spikes"] < 1e-3 * row["spikes"]
    assert table.count("\n") == 2 + len(results["runs"]["baseline-seed0"])


@pytest.mark.slow
def test_calibration_compares_recordings_of_the_same_images(data, tmp_path):
    arguments = (f"--images={data / 'MNIST'}", f"--root={data / 'NMNIST'}")
    run("calibration", tmp_path, *arguments)
    results, (table,) = read(tmp_path, "calibration")
    assert results["num_recordings"] == 20
    # What is compared was made by the recorder `nmnist`, with other noise.
    near, far = results["compare"]["nmnist"], results["compare"]["digits"]
    assert all(near[key] < far[key] for key in ("profile", "map", "occupancy"))
    assert near["pixel_correlation"] > far["pixel_correlation"]
    assert table.count("\n") == 2 + 8 + 7
    assert (tmp_path / "calibration.png").stat().st_size > 10_000
    found = run("calibration", tmp_path, *arguments, "--fit=1").splitlines()
    assert [float(line.split()[0]) for line in found] == sorted((float(line.split()[0]) for line in found), reverse=True)
    assert "Recorder(" in found[0]


@pytest.mark.slow
def test_sim_to_real_trains_on_images_and_tests_on_recordings(data, tmp_path):
    arguments = (f"--workdir={tmp_path / 'runs'}", f"--images={data / 'MNIST'}", f"--root={data / 'NMNIST'}", "--seeds=0")
    run("sim_to_real", tmp_path, "--config=configs/nmnist.py", *arguments, "--image-range=1000,1064")
    results, (table,) = read(tmp_path, "sim_to_real")
    assert results["data"] == {"num_train": 64, "num_validation": 0, "num_test": 20}
    assert results["num_real"] == 20
    assert results["num_steps"] == 2
    assert results["methods"].keys() == results["real"].keys() == {"baseline", "sast", "straight_through"}
    assert_accuracies(results["methods"])
    assert_accuracies(results["real"])
    assert str(tmp_path) not in (tmp_path / "sim_to_real.json").read_text()
    assert table.count("\n") == 2 + 3


@pytest.mark.slow
def test_pipeline_compares_five_ways_of_loading(data, tmp_path):
    pytest.importorskip("grain")
    run("pipeline", tmp_path, SAST_JAX_DATA=str(data))
    results, tables = read(tmp_path, "pipeline")
    assert len(results["workloads"]) == len(tables) == 2
    for rows in results["workloads"].values():
        assert len(rows) == 5
        assert rows["sast_jax, frames on the device"]["ratio"] == 1
        for row in rows.values():
            assert min(row["batches_per_second"], row["ratio"]) > 0
            assert 0 <= min(row["waiting_percent"]) <= max(row["waiting_percent"]) <= 100


@pytest.fixture(scope="module")
def peers(tmp_path_factory):
    """What `peers.py` wrote of two networks."""
    output = tmp_path_factory.mktemp("peers")
    run("peers", output)
    _, (table,) = read(output, "peers")
    assert table.count("\n") == 2 + 2
    (path,) = output.glob("peers_cpu_*.json")
    return read(output, path.stem)[0]["workloads"].values()


@pytest.mark.slow
@pytest.mark.parametrize(("library", "package"), [(name, package) for name, (_, package) in LIBRARIES.items()])
def test_peers_and_their_networks_answer_on_equal_weights(library, package, peers):
    for workload in peers:
        row = workload["rows"][library]
        if not importlib.util.find_spec(package):
            assert row["error"] == "not installed"
            pytest.skip(f"{package} is not installed")
        kinds = ("train", "infer") if library == "norse" else ("train", "sast", "infer")
        assert row["compile_seconds"].keys() == {*kinds}
        for kind in kinds:
            assert_timed(row[kind] | {"ratio": row[kind]["ratio"][1]})
            assert row["compile_seconds"][kind] >= 0  # Rounded to hundredths.
        if library in ("sast_jax", "plain PyTorch", "plain PyTorch, torch.compile", "SpikingJelly", "slax"):
            assert max(row["difference"].values()) < 1e-3
        assert min(workload["floor"]["gigaflops"], workload["floor"]["gigabytes_per_second"]) > 0


def test_publish_writes_pages_only_for_the_published_results(tmp_path, monkeypatch):
    publish, page = load("publish"), tmp_path / "page.md"
    for name, value in {"ROOT": tmp_path, "RESULTS": tmp_path / "results", "PAGES": (page,)}.items():
        monkeypatch.setattr(publish, name, value)
    text = "before\n<!-- begin some -->\nold\n<!-- end some -->\nafter\n"
    page.write_text(text)
    args, rest = publish.Parser("What it is.\n\nMore.").parse_known_args(["--small", "--config.seed=1"])
    assert args.output == tmp_path / "runs" / "small"
    assert rest == ["--config.seed=1"]
    publish.publish("some", {"rows": [1]}, "new\n", args.output)
    assert page.read_text() == text
    assert json.loads((args.output / "some.json").read_text()) == {"rows": [1]}
    publish.publish("some", {}, "new\n", publish.Parser("What it is.").parse_args([]).output)
    assert page.read_text() == text.replace("old", "new")
    assert (tmp_path / "results" / "some.md").read_text() == "new\n"


def test_turns_alternate_and_are_compared_round_by_round():
    turns, order = load("turns"), []
    seconds = turns.take_turns({name: lambda name=name: order.append(name) for name in "ab"}, 3)
    assert "".join(order) == "ababab"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}
    row = turns.compare(np.array([2.0, 4.0, 9.0]), np.array([1.0, 2.0, 3.0]))
    assert row == {"milliseconds": [3000.0, 4000.0, 6500.0], "ratio": 2.0}
    assert turns.show(row, 0) == "4000 (3000 - 6500) | 2.00"


def test_every_benchmark_has_a_test():
    names = {path.stem for path in FOLDER.glob("*.py")}
    tests = [name.removeprefix("test_") for name in globals() if name.startswith("test_")]
    tested = {max((name for name in names if test.startswith(f"{name}_")), key=len, default="") for test in tests}
    assert tested - {""} == names - {"peer_networks"}  # The processes of `peers`.
