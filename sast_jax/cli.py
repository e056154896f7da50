"""The command line: `sast-jax train`, `evaluate` and what is made of their runs."""

# Nothing of jax at the top: a command imports what it needs, and until then Ctrl-C ends the process at once.
import argparse
import contextlib
import functools
import json
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sast_jax import __version__
from sast_jax.allocator import keep_freed_memory
from sast_jax.compilation import keep_compiled
from sast_jax.errors import Interrupted, UserError, refuse, show_warning
from sast_jax.files import local_path
from sast_jax.text import Output, align, printable, printable_lines

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130

_CONFIG_FLAG = "--config."


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0 done, 2 a mistake of the user's, 130 interrupted."""
    args, overrides = _parse(list(sys.argv[1:] if argv is None else argv))
    try:
        for name in ("workdir", "output"):
            if (path := getattr(args, name, None)) is not None:
                setattr(args, name, local_path(path, f"--{name}"))
        import sast_jax.public  # noqa: F401

        _take_back_strictness()
        for number in _SIGNALS:
            if signal.getsignal(number) is _leave:  # From here on there may be something to clean up, or to save.
                signal.signal(number, _interrupt)
        _COMMANDS[args.command](args, overrides)
    except (UserError, OSError) as error:  # The system's own errors name the file: no space, no permission, no such place.
        print(f"sast-jax: error: {printable_lines(str(error))}", file=sys.stderr)
        return EXIT_USER_ERROR
    except (Interrupted, KeyboardInterrupt) as error:
        reason = printable_lines(str(error)) or "the same command goes on from the last checkpoint"
        print(f"sast-jax: interrupted: {reason}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        if not (message := _explain(error)):
            raise
        print(f"sast-jax: error: {printable_lines(message)}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


def _explain(error):
    """The message for an error that is not the program's own fault: memory, or a device that is not there; else nothing."""
    if isinstance(error, MemoryError) or str(error).startswith("RESOURCE_EXHAUSTED"):  # As jax says it, in a RuntimeError.
        return (
            f"out of memory ({str(error)[:200] or 'MemoryError'}); lower batch_size, dataset.num_time_steps or network.features, "
            "or raise num_microbatches"
        )
    import jax

    try:
        jax.devices()
    except Exception as reason:  # A RuntimeError with a reason, or an AssertionError without.
        platforms = os.environ.get("JAX_PLATFORMS", "")
        text = str(reason).partition("\n")[0][:200] or "jax was installed without it, or there is no such device"
        return f"JAX_PLATFORMS: {platforms!r} cannot be used here ({text}); unset it, or set it to cpu"
    return ""


def _take_back_strictness():
    """A user's own code may be strict about dtypes and ranks; the libraries that commands use are not written for it."""
    import jax

    jax.config.update("jax_numpy_dtype_promotion", "standard")
    jax.config.update("jax_numpy_rank_promotion", "allow")


_FIELDS = "Set any field with --config.section.key=VALUE."
_RECORDINGS = "Recordings that have moved: --config.dataset.root=FOLDER."


def _parse(argv):
    parser = argparse.ArgumentParser(
        prog="sast-jax",
        description="Trains spiking networks on smooth spikes and measures what the swap to hard spikes costs.",
        epilog="Each command explains itself: sast-jax COMMAND --help",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"sast-jax {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name, purpose, example, note=""):
        return commands.add_parser(
            name,
            help=purpose,
            description=f"{purpose[0].upper()}{purpose[1:]}.",
            epilog="\n".join(filter(None, [f"example: sast-jax {example}", note])),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def add_config(command, what="a shipped config, as digits, or a file; a variant after a colon, as digits:sast"):
        command.add_argument("--config", required=True, metavar="NAME", help=what)

    def add_workdir(command, what="folder of a run, or of a pair", **options):
        command.add_argument("--workdir", metavar="DIR", help=what, **{"required": True, **options})

    train = add("train", "train a config's runs, or go on with them", "train --config=digits:sast --workdir=runs/sast", _FIELDS)
    add_config(train)
    add_workdir(train, "folder of the run, made if missing")
    train.add_argument("--hosts", metavar="ADDRESS", help="for several hosts: auto under Slurm, else HOST:PORT,INDEX,NUMBER")

    evaluate = add("evaluate", "evaluate a trained run on its test part", "evaluate --workdir=runs/sast --suite=all", _RECORDINGS)
    add_workdir(evaluate)
    suites = "one or more of transfer, calibration, quantization, synops, robustness, with commas; or all (default: transfer)"
    evaluate.add_argument("--suite", default="transfer", metavar="NAMES", help=suites)

    add_workdir(add("theory", "compare the theory's bounds with a trained run", "theory --workdir=runs/sast", _RECORDINGS))

    data = add("data", "prepare, describe or draw a config's data set", "data info --config=nmnist --config.dataset.root=FOLDER")
    actions = "prepare: fill the cache; info: print counts and rates; view: draw a recording"
    data.add_argument("action", choices=("prepare", "info", "view"), help=actions)
    add_config(data)
    add_workdir(data, "where data.json (info) or the picture (view) goes; default for view: here", required=False)
    data.add_argument("--recording", metavar="ID", default="", help="view: which one, as Train/3/00042; default: the first")
    data.add_argument("--format", choices=("png", "gif"), default="png", help="view: strip of frames, or animation")

    export = add("export", "write a trained run as a NIR graph", "export --workdir=runs/sast --output=net.nir")
    add_workdir(export, "folder of a run; of a pair, the last one is taken")
    export.add_argument("--output", required=True, metavar="FILE", help="file to write, as net.nir")
    export.add_argument("--calibration", metavar="METHOD", help="take the thresholds and gains of this method, or of: chosen")

    example = "sweep --config=study_digits_small --workdir=runs/study --processes=2"
    sweep = add(
        "sweep", "train and compare the methods of a study, or go on", example, f"{_FIELDS} It is then fixed, not selected."
    )
    add_config(sweep, "a shipped study, as study_digits, or a file")
    add_workdir(sweep, "folder of the study, made if missing")
    together = "train up to N runs as one program (default: 1 on a CPU, else as many as fit in memory)"
    sweep.add_argument("--together", metavar="N", type=_positive, help=together)
    processes = "train N runs side by side on a CPU, each on its share of the cores"
    sweep.add_argument("--processes", metavar="N", type=_positive, default=1, help=processes)

    add_workdir(add("report", "show all that is known of a run in one HTML file", "report --workdir=runs/sast", _RECORDINGS))
    rest, overrides = _split_overrides(argv)
    return parser.parse_args(rest), overrides


def _positive(text):
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer; got {text!r}")
    return int(text)


def _split_overrides(argv):
    """Takes `--config.key=value` and `--config.key value` out of the arguments."""
    rest, overrides = [], []
    arguments = iter(argv)
    for argument in arguments:
        if not argument.startswith(_CONFIG_FLAG):
            rest.append(argument)
        elif "=" in argument:
            overrides.append(argument.removeprefix(_CONFIG_FLAG))
        else:
            value = next(arguments, None)
            overrides.append(argument.removeprefix(_CONFIG_FLAG) + ("" if value is None else f"={value}"))
    return rest, overrides


def _say(text):
    print(printable_lines(str(text)))


def _train(args, overrides):
    from sast_jax import config as config_lib
    from sast_jax.devices import connect_hosts, is_first_host, split_cpu
    from sast_jax.training import train_variants
    from sast_jax.training.records import RESULTS, read_record

    if args.hosts is not None:
        connect_hosts(args.hosts)
    else:
        split_cpu()
    is_finished = read_record(args.workdir / RESULTS) is not None  # Then its recordings may be gone.
    configs = config_lib.load_configs(args.config, overrides, with_data=not is_finished)
    results = train_variants(configs, args.workdir)
    if is_first_host():
        _say(format_table(results.get("runs", {args.workdir.resolve().name: results})))
        _say(f"\nResults: {args.workdir / RESULTS}")


def _sweep(args, overrides):
    from sast_jax.devices import split_cpu
    from sast_jax.experiments.page import PAGE, find, write_page
    from sast_jax.experiments.sweep import run_study

    split_cpu()
    results = run_study(args.config, overrides, args.workdir, together=args.together, processes=args.processes)
    write_page(results, args.workdir)
    _say("\n".join(find(results)))
    _say(f"\nResults: {args.workdir / PAGE}")


def _evaluate(args, overrides):
    from sast_jax.devices import split_cpu
    from sast_jax.evaluation.suites import evaluate_run, parse_suites, summarize
    from sast_jax.training.records import EVALUATION
    from sast_jax.training.run import run_members

    suites = parse_suites(args.suite)
    split_cpu()
    results: dict[str, Any] = {}
    for name in run_members(args.workdir) or [""]:
        workdir = args.workdir / name
        title = name or workdir.resolve().name
        report = functools.partial(print, f"{printable(title)}:", file=sys.stderr, flush=True)
        results[title] = evaluate_run(workdir, suites, overrides, report)
    if "transfer" in suites:
        _say(format_table({title: result["transfer"] for title, result in results.items()}))
    if suites != ["transfer"]:
        for title, result in results.items():
            for suite, part in result.items():
                _say(f"\n{title}\n{align(summarize(suite, part))}")
        _say(f"\nResults: {', '.join(str(args.workdir / name / EVALUATION) for name in run_members(args.workdir) or [''])}")


def _theory(args, overrides):
    from sast_jax.evaluation.theory import format_statements
    from sast_jax.files import write_json
    from sast_jax.training.records import THEORY
    from sast_jax.training.run import load_run_and_data, run_members
    from sast_jax.training.theory import evaluate_run_theory

    for name in run_members(args.workdir) or [""]:
        workdir = args.workdir / name
        run, _, splits = load_run_and_data(workdir, overrides)
        results = evaluate_run_theory(run, splits)
        write_json(workdir / THEORY, results)
        _say(f"{workdir.resolve().name}, {results['num_recordings']} {results['recordings']} recordings")
        _say(format_statements(results["statements"]) + f"\n\nResults: {workdir / THEORY}")


def _data(args, overrides):
    from sast_jax import config as config_lib
    from sast_jax import inspection
    from sast_jax.data import load_dataset
    from sast_jax.files import cache_dir, write_json

    config = next(iter(config_lib.load_configs(args.config, overrides).values()))
    dataset = config.dataset.to_dict()
    if args.action == "prepare":
        splits = load_dataset(**dataset)
        _say("\n".join([f"{dataset['name']}: {json.dumps(splits.describe())}", *splits.notes, f"kept in {str(cache_dir())!r}"]))
    elif args.action == "info":
        summary = inspection.summarize(**dataset)
        _say(inspection.format_summary(summary))
        if args.workdir is not None:
            write_json(args.workdir / "data.json", summary)
    else:
        name = "-".join([dataset["name"], *filter(None, [args.recording.replace("/", "-")])])
        path = (args.workdir or Path()) / f"{name}.{args.format}"
        _say(f"{inspection.draw_recording(path, args.recording, **dataset)}\n{path}")


def _export(args, overrides):
    from sast_jax.data import sensor_size
    from sast_jax.evaluation.suites import load_calibration
    from sast_jax.nir_export import make_nir_graph, write_nir_graph
    from sast_jax.training.run import load_run

    refuse([f"{text}: export takes no config fields" for text in overrides])
    run = load_run(args.workdir)
    dataset = run.config.dataset
    frames = {"num_time_steps": dataset.num_time_steps, "binary": dataset.binary}
    calibration = None if args.calibration is None else load_calibration(run, args.calibration)
    size = (*sensor_size(dataset.name, dataset.downsample), 2)
    graph = make_nir_graph(run.network, run.params, size, calibration, **frames)
    write_nir_graph(args.output, graph)
    if "warning" in graph.metadata:
        print(f"sast-jax: warning: {printable_lines(graph.metadata['warning'])}", file=sys.stderr)
    _say(f"{args.output}: {' - '.join(graph.nodes)}; dt {graph.metadata['dt']:g}, logits: {graph.metadata['logits']}")


def _report(args, overrides):
    from sast_jax.files import atomic_write
    from sast_jax.report.gather import gather
    from sast_jax.report.page import render

    path = args.workdir / "report.html"
    page = render(gather(args.workdir, overrides))
    with atomic_write(path) as file:
        file.write(page.encode(errors="backslashreplace"))  # A path in the config may be no text.
    _say(path)


_COMMANDS = {
    "train": _train,
    "sweep": _sweep,
    "evaluate": _evaluate,
    "theory": _theory,
    "data": _data,
    "export": _export,
    "report": _report,
}


def format_table(runs: dict[str, dict[str, Any]]) -> str:
    """Returns the table of results by name: accuracies in percent, gap in points, cost where it is known."""
    header = ["run", "surrogate", "hard", "gap", "test samples", "gradients", "seconds"]

    def percent(result, key, template):
        return template.format(100 * result[key]) if key in result else "-"

    rows = [
        [
            name,
            percent(result, "surrogate_accuracy", "{:.1f} %"),
            percent(result, "hard_accuracy", "{:.1f} %"),
            percent(result, "transfer_gap", "{:+.1f}"),
            str(result["num_test"]),
            f"{result['num_gradient_evaluations']:g}" if "num_gradient_evaluations" in result else "-",
            f"{result['wall_time_seconds']:.0f}" if "wall_time_seconds" in result else "-",
        ]
        for name, result in runs.items()
    ]
    return align([header, *rows])


def entry_point() -> None:
    """Entry point of the installed command."""
    for number in _SIGNALS:
        signal.signal(number, _leave)
    sys.unraisablehook = _interrupt_again
    for descriptor in range(3):  # A closed stream's number would go to the next file that is opened.
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)  # type: ignore[assignment]
    warnings.showwarning = show_warning
    keep_freed_memory()
    keep_compiled()
    status = main()
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # All is on disk; what is left is leaving.
    if status:  # A library that was interrupted may crash, or complain, while the interpreter ends in order.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def _leave(number, frame):
    with contextlib.suppress(OSError):
        os.write(2, b"sast-jax: interrupted\n")
    os._exit(EXIT_INTERRUPTED)


def _interrupt(number, frame):
    """Ends the command in order; a second signal ends the process at once, as every file is whole or absent at any time."""
    for each in _SIGNALS:
        signal.signal(each, _leave)
    raise KeyboardInterrupt


def _interrupt_again(unraisable):
    """Python drops an interrupt that falls into a callback, as of jax's in a garbage collection: it is raised once more."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        signal.signal(signal.SIGINT, _interrupt)
        threading.Thread(target=_insist, daemon=True).start()
    else:
        sys.__unraisablehook__(unraisable)


def _insist():
    """Interrupts the main thread until it answers: one that is about to sleep does not see a signal before it wakes."""
    time.sleep(0.05)
    while signal.getsignal(signal.SIGINT) is _interrupt:
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # type: ignore[arg-type]
        time.sleep(0.05)
