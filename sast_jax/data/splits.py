"""Which samples train, which choose, which test: random parts with the classes in proportion, persons kept together."""

import numpy as np

from sast_jax.errors import UserError


def split(
    indices: np.ndarray,
    labels: np.ndarray,
    num_second: int,
    *,
    seed: int,
    what: str = "num_second",
    groups: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Splits samples in two at random, each class in proportion.

    Args:
        indices: Samples to split.
        labels: Labels of all samples, not only of these.
        num_second: Size of the second part, less than the number of samples.
        seed: Non-negative seed.
        what: Name of `num_second` in messages.
        groups: Groups of all samples that stay together, as the persons who made them. If there are several, whole ones are
            drawn until they hold at least `num_second` samples; classes are then in the proportion of the groups.

    Returns:
        The sorted indices of the first and of the second part.

    Raises:
        UserError: If the first part would be empty.
    """
    if not 0 <= num_second < len(indices):
        raise UserError(f"dataset.{what}: must be 0 to {len(indices) - 1}, as there are {len(indices)} samples; got {num_second}")
    if groups is not None and len(np.unique(groups[indices])) > 1:
        return _split_groups(indices, groups, num_second, seed, what)
    order = _in_proportion(indices, labels, seed)
    return np.sort(order[num_second:]), np.sort(order[:num_second])


def _in_proportion(indices, labels, seed):
    """The samples in a random order of which any stretch holds the classes in proportion."""
    shuffled = np.random.default_rng(seed).permutation(indices)
    # Samples are ranked by their position within their class, as a share of it.
    rank = np.empty(len(shuffled))
    for label in np.unique(labels[shuffled]):
        members = labels[shuffled] == label
        rank[members] = (np.arange(members.sum()) + 0.5) / members.sum()
    return shuffled[np.argsort(rank, kind="stable")]


def take_fold(
    indices: np.ndarray,
    labels: np.ndarray,
    *,
    number: int,
    num_folds: int,
    seed: int,
    groups: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Cuts samples into folds at random, each class in proportion, and splits one fold from the others.

    Args:
        indices: Samples to cut.
        labels: Labels of all samples, not only of these.
        number: Which fold, from 0.
        num_folds: Number of folds, at least 2. Their sizes differ by one sample, or one group, at most.
        seed: Non-negative seed.
        groups: As of `split`.

    Returns:
        The sorted indices of the other folds and of this one.

    Raises:
        UserError: If there are fewer samples, or groups, than folds.
    """
    if groups is not None and len(names := np.unique(groups[indices])) > 1:
        what, units, order = "persons", groups[indices], np.random.default_rng(seed).permutation(names)
    else:
        what, units, order = "samples", indices, _in_proportion(indices, labels, seed)
    if len(order) < num_folds:
        raise UserError(f"dataset.fold: {len(order)} {what} cannot make {num_folds} folds; take fewer")
    is_in_fold = np.isin(units, np.array_split(order, num_folds)[number])
    return np.sort(indices[~is_in_fold]), np.sort(indices[is_in_fold])


def _split_groups(indices, groups, num_second, seed, what):
    names, group = np.unique(groups[indices], return_inverse=True)
    sizes = np.bincount(group)
    order = np.random.default_rng(seed).permutation(len(names))
    num_groups = int(np.searchsorted(np.cumsum(sizes[order]), num_second)) + 1 if num_second else 0
    if num_groups == len(names):
        raise UserError(f"dataset.{what}: {num_second} samples take all {len(names)} persons; take less")
    is_second = np.isin(group, order[:num_groups])
    return indices[~is_second], indices[is_second]
