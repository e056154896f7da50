"""The command line: `sast-jax train` and `sast-jax evaluate`."""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sast_jax import config as config_lib
from sast_jax.allocator import keep_freed_memory
from sast_jax.errors import UserError, refuse
from sast_jax.evaluation.transfer import evaluate_transfer, make_eval_step
from sast_jax.files import write_json
from sast_jax.training import train_variants
from sast_jax.training.build import load_data
from sast_jax.training.interruption import Interrupted
from sast_jax.training.loop import EVALUATION_BATCH_SIZE, refuse_non_finite
from sast_jax.training.run import RESULTS, load_run, read_json, register, run_members

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130

_CONFIG_FLAG = "--config."


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0 done, 2 a mistake of the user's, 130 interrupted."""
    args, overrides = _parse(list(sys.argv[1:] if argv is None else argv))
    try:
        _COMMANDS[args.command](args, overrides)
    except (UserError, OSError) as error:  # The system's own errors name the file: no space, no permission, no such place.
        print(f"sast-jax: error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except (Interrupted, KeyboardInterrupt) as error:
        print(f"sast-jax: interrupted: {error or 'the same command goes on from the last checkpoint'}", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def _parse(argv):
    parser = argparse.ArgumentParser(
        prog="sast-jax",
        description="Trains spiking networks through smooth spikes and reports what the swap to hard spikes costs.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser("train", help="train the run or runs of a config, or go on with them", allow_abbrev=False)
    train.add_argument("--config", required=True, metavar="FILE[:VARIANT]", help="config file, as configs/digits.py:sast")
    train.add_argument("--workdir", required=True, metavar="DIR", type=Path, help="folder of the run, made if missing")
    train.epilog = "Any field can be set: --config.section.key=VALUE, as --config.sam.rho=0.1"
    evaluate = commands.add_parser("evaluate", help="evaluate a trained run on its test part", allow_abbrev=False)
    evaluate.add_argument("--workdir", required=True, metavar="DIR", type=Path, help="folder of a run, or of a pair")
    evaluate.epilog = "Where the recordings lie now can be set: --config.dataset.root=FOLDER"
    rest, overrides = _split_overrides(argv)
    return parser.parse_args(rest), overrides


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


def _train(args, overrides):
    is_finished = read_json(args.workdir / RESULTS) is not None  # Then its recordings may be gone.
    configs = config_lib.load_configs(args.config, overrides, with_data=not is_finished)
    results = train_variants(configs, args.workdir)
    print(format_table(results.get("runs", {args.workdir.resolve().name: results})))
    print(f"\nResults: {args.workdir / RESULTS}")


def _evaluate(args, overrides):
    results: dict[str, Any] = {}
    for name in run_members(args.workdir) or [""]:
        workdir = args.workdir / name
        run = load_run(workdir)
        config = run.config.copy_and_resolve_references().unlock()
        elsewhere = [text for text in overrides if text.partition("=")[0] not in ("dataset.root", "dataset.download")]
        refuse([f"{text}: evaluate takes only dataset.root and dataset.download from the command line" for text in elsewhere])
        refuse(config_lib.apply_overrides(config, overrides) + config_lib.find_problems(config))
        splits = load_data(config)
        register(workdir, config, splits.describe())
        transfer = evaluate_transfer(make_eval_step(run.network), run.params, splits.test, EVALUATION_BATCH_SIZE)
        refuse_non_finite([transfer], run.step, workdir)
        results[name or workdir.resolve().name] = {**transfer, "num_test": len(splits.test.labels)}
        write_json(workdir / "evaluation.json", {"transfer": results[name or workdir.resolve().name]})
    print(format_table(results))


_COMMANDS = {"train": _train, "evaluate": _evaluate}


def format_table(runs: dict[str, dict[str, Any]]) -> str:
    """Returns the table of results by name: accuracies in percent, gap in points, cost where it is known."""
    header = ["run", "surrogate", "hard", "gap", "test samples", "gradients", "seconds"]
    rows = [
        [
            name,
            f"{100 * result['surrogate_accuracy']:.1f} %",
            f"{100 * result['hard_accuracy']:.1f} %",
            f"{100 * result['transfer_gap']:+.1f}",
            str(result["num_test"]),
            f"{result['num_gradient_evaluations']:g}" if "num_gradient_evaluations" in result else "-",
            f"{result['wall_time_seconds']:.0f}" if "wall_time_seconds" in result else "-",
        ]
        for name, result in runs.items()
    ]
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    template = "  ".join(f"{{:{'<' if column == 0 else '>'}{width}}}" for column, width in enumerate(widths))
    return "\n".join(template.format(*row) for row in [header, *rows])


def entry_point() -> None:
    """Entry point of the installed command."""
    keep_freed_memory()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # Where training does not handle it, as Ctrl-C.
    sys.exit(main())
