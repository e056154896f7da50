"""The theory's report of a run."""

from typing import Any

from sast_jax.data import Splits
from sast_jax.evaluation.theory import NUM_RECORDINGS, evaluate_theory
from sast_jax.training.run import Run


def evaluate_run_theory(run: Run, splits: Splits) -> dict[str, Any]:
    """Returns what `theory.json` holds: `recordings` measured (validation, or test if there are none) and the `statements`."""
    part = "validation" if len(splits.validation.labels) else "test"
    recordings = getattr(splits, part)
    config, optimizer = run.config, run.config.optimizer
    covered = {
        "exact gradient (surrogate mode, all spikes smooth)": config.mode == "surrogate"
        and not (config.spikes.hard_share or config.spikes.finish),
        "independent perturbation batch": not config.sam.rho or config.sam.perturbation == "independent",
        "perturbation of length rho at most": not config.sam.rho or config.sam.adaptive == "none",
        "plain SGD": False,  # The optimizers there are have momentum, or adapt to the gradient.
        "batches drawn anew each step": False,  # They are shuffled once an epoch.
    }
    statements = evaluate_theory(
        run.network,
        run.params,
        recordings,
        rho=config.sam.rho,
        max_count=1 if config.dataset.binary else int(max(part.frames.max(initial=1) for part in splits[:3])),
        covered=covered,
    )
    return {
        "step": run.step,
        "recordings": part,
        "num_recordings": min(NUM_RECORDINGS, len(recordings.labels)),
        "optimizer": optimizer.name,
        "certified_margin": config.certified.margin,
        "statements": [statement._asdict() | {"tightness": statement.tightness} for statement in statements],
    }
