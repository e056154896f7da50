r"""Whether other libraries see what the hard network sees in an exported graph, on the test recordings of trained runs.

    python benchmarks/nir_readers.py runs/nmnist/baseline runs/nmnist/sast

Each run is exported, read back by NumPy alone (the tests' simulator), by snnTorch and by norse with the functions they have for
it, and run on all test recordings. Libraries are those of the extra `interop`; a missing one is left out. Writes
`benchmarks/results/nir_readers.json` and `.md`, and the table into its page.
"""

import contextlib
import importlib.metadata
import importlib.util
import io
import sys
import tempfile
from pathlib import Path

import nir
import numpy as np
from publish import ROOT, Parser, publish

from sast_jax import load_run
from sast_jax.data import evaluation_batches, sensor_size
from sast_jax.evaluation.outputs import BATCH_SIZE, apply
from sast_jax.nir_export import DT, make_nir_graph, write_nir_graph
from sast_jax.training.build import load_data

sys.path.insert(0, str(ROOT))
from tests.nir_simulator import simulate

READERS = {"numpy": "NumPy, from NIR's equations"}
READERS |= {name: title for name, title in (("snntorch", "snnTorch"), ("norse", "norse")) if importlib.util.find_spec(name)}


def read_with_numpy(graph, frames):
    """Returns the spikes of each layer `[T, B, C, H, W]` and the output over time."""
    outputs = simulate(graph, frames)
    in_order = [name for _, name in graph.edges]
    return [outputs[name] for name in in_order if isinstance(graph.nodes[name], nir.LIF)], outputs["output"]


def read_with_torch(library):
    """Returns the same function for a library, by its own import."""

    def read(graph, frames):
        import torch

        with contextlib.redirect_stdout(io.StringIO()):  # snnTorch prints all numbers of a graph.
            if library == "snntorch":
                from snntorch.import_nir import import_from_nir

                net = import_from_nir(graph)
            else:
                import norse.torch

                net = norse.torch.from_nir(graph, dt=DT)
        spikes, outputs, state = {}, [], None
        for name, module in net.named_modules():
            if name.endswith("_LIF"):
                keep = spikes.setdefault(name, []).append
                module.register_forward_hook(lambda _, __, out, keep=keep: keep(out[0] if type(out) is tuple else out))
        with torch.no_grad():
            for frame in torch.tensor(frames, dtype=torch.float32):
                output, state = net(frame, state)
                outputs.append(output)
        return [torch.stack(each).numpy() for each in spikes.values()], torch.stack(outputs).numpy()

    return read


def compare(workdir):
    """Returns, by reader, the numbers of recordings, of equal decisions, of spikes compared and of those that differ."""
    run = load_run(workdir)
    if run.config.network.readout != "leaky" or run.config.network.reset != "zero":
        raise SystemExit(f"{workdir}: snnTorch and norse read a mean readout and reset zero")
    size = sensor_size(run.config.dataset.name, run.config.dataset.downsample)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.nir"
        write_nir_graph(path, make_nir_graph(run.network, run.params, (*size, 2)))
        rows = {}
        for name in READERS:
            read = read_with_numpy if name == "numpy" else read_with_torch(name)
            counts = np.zeros(5, int)
            for batch in evaluation_batches(load_data(run.config).test, BATCH_SIZE):
                ours = apply(run.network, run.params, batch.frames, "hard")
                spikes, outputs = read(nir.read(path), np.moveaxis(batch.frames, -1, 2))
                pairs = list(zip(map(np.asarray, ours.spikes), spikes, strict=True))
                same = [np.moveaxis(a, -1, 2) == b if a.ndim == 5 else a == b for a, b in pairs]
                equal = [each.reshape(*each.shape[:2], -1).all(axis=(0, 2))[batch.mask] for each in same]
                decided = np.asarray(ours.logits).argmax(-1) == outputs.mean(0).argmax(-1)
                counts += [
                    batch.mask.sum(),
                    decided[batch.mask].sum(),
                    np.all(equal, axis=0).sum(),
                    sum(each[:, batch.mask].size for each in same),
                    sum((~each[:, batch.mask]).sum() for each in same),
                ]
            keys = ("recordings", "equal_decisions", "equal_recordings", "spikes", "different_spikes")
            rows[name] = dict(zip(keys, counts.tolist(), strict=True))
            print(workdir, name, rows[name], file=sys.stderr, flush=True)
    return rows


def markdown(results):
    """The results of all runs together as a table."""
    lines = [
        "| reader | recordings | same decision | all spikes the same | outputs that differ, of all neurons and steps |",
        "|---|---|---|---|---|",
    ]
    for name, title in READERS.items():
        total = {
            key: sum(rows[name][key] for rows in results["runs"].values()) for key in results["runs"][results["first"]][name]
        }
        version = f" {results['versions'][name]}" if name in results["versions"] else ""
        lines.append(
            f"| {title}{version} | {total['recordings']} | {total['equal_decisions']} | {total['equal_recordings']} | "
            f"{total['different_spikes']} of {total['spikes'] / 1e6:.1f} million |"
        )
    text = (
        f"All test recordings of {len(results['runs'])} trained runs ({', '.join(results['runs'])}). Both sides compute in "
        "float32 (NumPy in float64), each in its order: a potential within rounding of the threshold goes either way, and what "
        "follows from it in that recording with it."
    )
    return "\n".join(lines) + f"\n\n{text}\n"


def main():
    """Compares, and writes the table."""
    parser = Parser(__doc__)
    parser.add_argument("workdirs", nargs="+", type=Path, help="folders of trained runs")
    args = parser.parse_args()
    workdirs = args.workdirs
    if len({workdir.name for workdir in workdirs}) < len(workdirs):
        parser.error("rows are named by the runs' folders, which must differ in name")
    runs = {workdir.name: compare(workdir) for workdir in workdirs}
    versions = {name: importlib.metadata.version(name) for name in ("nir", *READERS) if name != "numpy"}
    results = {"first": next(iter(runs)), "runs": runs, "versions": versions}
    publish("nir_readers", results, markdown(results), args.output)


if __name__ == "__main__":
    main()
