r"""What memory is worth on gestures: the network of the config, one without memory, and one that sees frames in random order.

    python benchmarks/memory.py --seeds=0,1,2

Without memory, decay and readout decay are 0 and the reset is to zero: the logits are a mean over frames of a function of
one frame. The third network is the first, trained and tested on recordings whose frames are each shuffled in time. All are
trained straight-through and tested with hard spikes, on persons they have not seen. Writes `benchmarks/results/memory.json` and
`.md`, and the table into `docs/results/simulation.md`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from publish import Parser, publish
from transfer_gap import cell, numbers

from sast_jax.allocator import keep_freed_memory
from sast_jax.config import load_configs
from sast_jax.data import DESCENT, batch_indices, evaluation_batches, take_batch
from sast_jax.data.gestures import CLASSES
from sast_jax.experiments.statistics import summarize
from sast_jax.training import init_state
from sast_jax.training.build import build_train_step, load_data, make_network, make_optimizer, make_projection
from sast_jax.training.run import environment

CONDITIONS = {
    "memory": "with memory, as configs/gestures.py",
    "none": "without memory: decay 0",
    "shuffled": "with memory, frames in random order",
}
WITHOUT_MEMORY = ["network.decay=0", "network.readout_decay=0", "network.reset=zero"]
SMALL = ("network.features=4,4", "dataset.num_time_steps=4", "num_epochs=1")
CIRCLES = [label for label, name in enumerate(CLASSES) if name.endswith("clockwise")]


def shuffled(recordings, seed):
    """Recordings whose frames are each in another random order."""
    rng = np.random.default_rng(seed)
    return recordings._replace(frames=np.stack([frames[rng.permutation(len(frames))] for frames in recordings.frames]))


def run(condition, seed, overrides):
    """Trains and tests one network."""
    own = WITHOUT_MEMORY if condition == "none" else []
    config = load_configs("configs/gestures.py:straight_through", [*overrides, *own, f"seed={seed}"])[""]
    splits = load_data(config)
    train, test = splits.train, splits.test
    if condition == "shuffled":
        train, test = shuffled(train, (seed, 0)), shuffled(test, (seed, 1))
    num_train = len(train.labels)
    num_steps = config.num_epochs * (num_train // config.batch_size)
    network = make_network(config, splits.num_classes)
    tx = make_optimizer(config, num_steps, make_projection(config, network))
    state = init_state(network, tx, take_batch(train, np.arange(1)).frames, seed=seed)
    train_step = build_train_step(config, network, num_steps)
    for step in range(num_steps):
        indices = batch_indices(num_train, config.batch_size, seed=seed, stream=DESCENT, step=step)
        state, _ = train_step(state, take_batch(train, indices), None)

    apply = jax.jit(lambda frames: network.apply({"params": state.params}, frames.astype(jnp.float32), "hard").logits)
    logits = np.concatenate([np.asarray(apply(batch.frames))[batch.mask] for batch in evaluation_batches(test, 66)])
    is_circle = np.isin(test.labels, CIRCLES)
    # Each circling class and the same arm's other way round are neighbours.
    label = test.labels[is_circle]
    other = np.array(CIRCLES)[np.array([CIRCLES.index(each) ^ 1 for each in label])]
    circle_logits = logits[is_circle]
    rows = np.arange(len(label))
    return {
        "accuracy": 100 * float(np.mean(logits.argmax(1) == test.labels)),
        "direction": 100 * float(np.mean(circle_logits[rows, label] > circle_logits[rows, other])),
        "num_train": num_train,
        "num_test": len(test.labels),
        "num_steps": num_steps,
    }


def main():
    """Trains, and writes the table."""
    keep_freed_memory()
    parser = Parser(__doc__)
    parser.add_argument("--seeds", type=numbers, default=(0, 1, 2))
    args, rest = parser.parse_known_args()
    overrides = [*(SMALL if args.small else ()), *(text.removeprefix("--config.") for text in rest)]

    runs = {}
    for seed in args.seeds:
        for condition in CONDITIONS:
            runs.setdefault(condition, []).append(run(condition, seed, overrides))
            print(condition, seed, runs[condition][-1], flush=True)
    methods = {
        name: {key: summarize([each[key] for each in found]) for key in ("accuracy", "direction")} for name, found in runs.items()
    }
    one = runs["memory"][0]
    lines = ["| network | accuracy, % | clockwise told from counter-clockwise, % |", "|---|---|---|"]
    lines += [
        f"| {title} | {cell(methods[name], 'accuracy')} | {cell(methods[name], 'direction')} |"
        for name, title in CONDITIONS.items()
    ]
    text = (
        f"Mean ± standard error over seeds {', '.join(map(str, args.seeds))}, listed below it; {one['num_train']} training and "
        f"{one['num_test']} test recordings of other persons, {one['num_steps']} steps, straight-through, hard spikes. Chance is "
        f"{100 / len(CLASSES):.0f} % and, for the direction of a circle, 50 %."
    )
    results = {"seeds": args.seeds, "overrides": overrides, "environment": environment(), "methods": methods, **one}
    publish("memory", results, "\n".join(lines) + f"\n\n{text}\n", args.output)


if __name__ == "__main__":
    main()
