"""Sharpness-aware minimisation as one link of an `optax.chain`, placed before any optimizer."""

import sys
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sast_jax.numeric import check_range, wide_dtype

Adaptive = Literal["element", "filter"]

ADAPTIVE: tuple[Adaptive, ...] = ("element", "filter")

Ascent = Literal["global", "per_device"]

ASCENTS: tuple[Ascent, ...] = ("global", "per_device")
"""Whose gradient perturbs where a batch is spread over devices: see `sast_jax.training.make_train_step`."""


class SamState(NamedTuple):
    """State of `sam`.

    Attributes:
        count: Number of updates so far, int32; the argument of a `rho` schedule and of `active`.
        aux: What `grad_fn` returned beside the gradient at the last active update; `None` unless `sam(aux=...)` asks for it.
        sharpness: LookSAM's component of the last active update, shaped as the weights; `None` unless `sam(reuse=...)` asks.
    """

    count: jax.Array  # type: ignore[assignment]
    aux: Any = None
    sharpness: Any = None


def sam(
    rho: float | jax.Array | Callable[[jax.Array], jax.Array],
    *,
    normalize: bool = True,
    adaptive: Adaptive | None = None,
    mask: Any = None,
    active: Callable[[jax.Array], jax.Array] | None = None,
    reuse: float | None = None,
    gsam: float | None = None,
    aux: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces a gradient by the gradient at a perturbed point.

    .. math:: \epsilon = \rho\, \frac{T^2 g'}{\|T g'\|_2}, \qquad g = \nabla L_B(w + \epsilon), \qquad T = 1

    The update takes the *perturbation gradient* :math:`g' = \nabla L_{B'}(w)` and, as `grad_fn`, the gradient function of the
    descent batch :math:`B`; it returns :math:`g`, which the rest of the chain treats like any gradient. The caller draws the
    two batches: independently for the setting of the convergence proof, `B' = B` for ordinary SAM, or a smaller `B'`.
    All perturbed weights count as one vector (global norm), and no copy of them is stored. At :math:`g' = 0` there is no
    direction to climb and :math:`\epsilon = 0`. Perturbed weights have the dtype of the weights: in bfloat16 a component
    below half a unit in the last place of its weight is rounded away, so keep weights in float32. The parts below combine freely.

    Args:
        rho: Radius :math:`\rho \ge 0`, a number or a schedule from the update count to a number. At 0 the update is
            `grad_fn(params)`, so the chain is its base optimizer.
        normalize: If `False`, :math:`\epsilon = \rho\, T^2 g'` (unnormalised SAM; Andriushchenko and Flammarion 2022).
        adaptive: ASAM's :math:`T`, which makes the perturbation independent of the weights' scale (Kwon et al. 2021).
            `element`: :math:`T = |w|`; no constant is added, so a weight of 0 is not perturbed. `filter`: for arrays of two
            or more axes the norm of each filter, that is of each slice of the last axis (flax's layout), for others
            :math:`|w|`.
        mask: Which weights are perturbed (the others are trained, but not perturbed): a tree of booleans shaped as the
            weights or a prefix of it, or a function from the weights to such a tree.
        active: Function from the update count to a boolean: whether this update perturbs. When it does not, the incoming
            gradient passes through as if `sam` were not in the chain, and `grad_fn` is not called: the update costs one gradient.
            `lambda count: count % 5 == 0` is every 5th step, `lambda count: count >= 900` the last part of training.
        reuse: Weight :math:`\alpha \ge 0` of LookSAM (Liu et al. 2022). At an active update the part of :math:`g` orthogonal to
            :math:`g'` is kept as :math:`g_v`; an inactive one returns :math:`g' + \alpha (\|g'\| / \|g_v\|)\, g_v`.
        gsam: Weight :math:`\alpha \ge 0` of GSAM (Zhuang et al. 2022): :math:`g - \alpha\, g'_\perp`, with
            :math:`g'_\perp` the part of :math:`g'` orthogonal to :math:`g`, lowers the gap between perturbed and plain loss.
        aux: If given, `grad_fn` returns `(gradient, aux)`, and the state keeps the aux of the last active update (as its
            loss); this is an example of it, for its shapes and types, and its value before the first. `jax.value_and_grad`
            returns the loss first: write `lambda params: jax.value_and_grad(loss)(params, batch)[::-1]` and `aux=0.0`.

    Returns:
        A transformation whose `update(perturbation_grads, state, params, grad_fn=...)` returns the gradient at the perturbed
        weights. Further keyword arguments are accepted and ignored, as chained transformations share them.

    Raises:
        ValueError: If a concrete `rho`, `reuse` or `gsam` is negative or not finite, or `adaptive` is unknown; at init or
            update if `params` or `grad_fn` is missing, or if `sam` stands where its result would be wrong: inside
            `optax.masked`, `optax.multi_transform`, `optax.MultiSteps` or `optax.apply_if_finite`, or behind another link;
            if a gradient has not the structure and shapes of the weights, or the aux not those of its example.

    Example:
        >>> tx = optax.chain(sam(rho=0.1), optax.sgd(1.0))
        >>> params = jnp.array([3.0, 4.0])
        >>> grad_fn = jax.grad(lambda w: 0.5 * jnp.sum(w**2))
        >>> updates, _ = tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)
        >>> print(updates.round(2))
        [-3.06 -4.08]

    References:
        Foret, Kleiner, Mobahi, Neyshabur. Sharpness-Aware Minimization for Efficiently Improving Generalization. ICLR 2021.
        Independent perturbation batch: Nicholson, arXiv:2603.18039.
        Andriushchenko, Flammarion. Towards Understanding Sharpness-Aware Minimization. ICML 2022.
        Kwon, Kim, Park, Choi. ASAM: Adaptive Sharpness-Aware Minimization. ICML 2021, equation 5.
        Liu, Mai, Chen, Hsieh, You. Towards Efficient and Scalable Sharpness-Aware Minimization. CVPR 2022, algorithm 1.
        Zhuang et al. Surrogate Gap Minimization Improves Sharpness-Aware Training. ICLR 2022, algorithm 1.
    """
    for name, value in (("rho", rho), ("reuse", reuse), ("gsam", gsam)):
        if value is not None and not callable(value):
            check_range(name, value, "a finite number >= 0")
    if adaptive is not None and adaptive not in ADAPTIVE:
        raise ValueError(f"adaptive must be None or one of {', '.join(ADAPTIVE)}; got {adaptive!r}")
    if reuse is not None and active is None:
        raise ValueError("reuse needs active: it says what the updates do that do not perturb")
    # A function given to `optax.inject_hyperparams` is taken for a schedule and arrives here as its value.
    is_value = isinstance(mask, (bool, jax.Array)) and jnp.ndim(mask) == 0
    if (active is not None and not callable(active)) or is_value:
        raise ValueError(
            "active must be a function, and mask a tree or a function; through optax.inject_hyperparams write "
            'inject_hyperparams(sam, static_args=("active", "mask"))(...)'
        )

    def init_fn(params):
        _refuse_partial_tree(params)
        for frame in _optax_callers():
            wrapper = frame.f_code.co_qualname.partition(".")[0]
            if wrapper in _WRONG_AROUND:
                raise ValueError(f"optax.{wrapper} around sam {_WRONG_AROUND[wrapper]}")
        sharpness = jax.tree.map(lambda w: jnp.zeros(w.shape, wide_dtype(w)), params) if reuse is not None else None
        return SamState(
            jnp.zeros([], jnp.int32), jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(leaf)), aux), sharpness
        )

    def update_fn(updates, state, params=None, *, grad_fn=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError("sam needs the weights: call update(perturbation_grads, state, params, grad_fn=...)")
        if grad_fn is None:
            raise ValueError(
                "sam needs the gradient function of the descent batch: call update(perturbation_grads, state, params, "
                "grad_fn=lambda params: jax.grad(loss)(params, descent_batch)). flax's TrainState.apply_gradients does not pass "
                "grad_fn on: call state.tx.update and optax.apply_updates yourself"
            )
        _refuse_partial_tree(params)
        # `optax.chain` and `optax.named_chain` collect the states of the links before this one in a local of that name.
        combining = sys.modules[optax.chain.__module__].__dict__
        if any(frame.f_globals is combining and frame.f_locals.get("new_state") for frame in _optax_callers()):
            raise ValueError(
                "sam must be the first link of its chain: what comes before it would change the direction of the perturbation "
                "and be lost for the descent; write chain(sam(...), add_decayed_weights(...), ...)"
            )
        if not _is_gradient(updates, params):
            raise ValueError(
                f"perturbation_grads must be floating-point numbers shaped as the weights, {_describe(params)}; got "
                f"{_describe(updates)}"
            )
        climb = jax.tree.map(lambda g: g.astype(wide_dtype(g)), updates)

        def perturb():
            radius = rho(state.count) if callable(rho) else rho
            point = perturb_weights(params, climb, radius, normalize=normalize, adaptive=adaptive, mask=mask)
            descent, new_aux = _split_output(_call(grad_fn, point), params, state.aux)
            new_aux = jax.tree.map(lambda old, new: jnp.asarray(new, old.dtype), state.aux, new_aux)
            wide = jax.tree.map(lambda g: g.astype(wide_dtype(g)), descent)
            sharpness = _reject(wide, climb) if reuse is not None else None
            if gsam is not None:
                descent = jax.tree.map(lambda g, c: (g - gsam * c).astype(g.dtype), descent, _reject(climb, wide))
            return descent, new_aux, sharpness

        def pass_through():
            if reuse is None:
                return updates, state.aux, None
            unit = optax.tree.scale(1 / _at_least_tiny(optax.tree.norm(state.sharpness)), state.sharpness)
            length = reuse * optax.tree.norm(climb)
            reused = jax.tree.map(lambda g, c, v: (c + length * v).astype(g.dtype), updates, climb, unit)
            return reused, state.aux, state.sharpness

        result = perturb() if active is None else jax.lax.cond(active(state.count), perturb, pass_through)
        gradient, new_aux, sharpness = result
        return gradient, SamState(optax.safe_increment(state.count), new_aux, sharpness)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def perturb_weights(
    params: Any,
    direction: Any,
    rho: float | jax.Array,
    *,
    normalize: bool = True,
    adaptive: Adaptive | None = None,
    mask: Any = None,
) -> Any:
    """Returns the weights moved by `rho` in a direction, as `sam` moves them along a gradient.

    Args:
        params: Weights.
        direction: Gradient, or any tree shaped as the weights.
        rho: Radius, >= 0.
        normalize: As in `sam`.
        adaptive: As in `sam`.
        mask: As in `sam`.
    """
    step = _direction(direction, params, normalize=normalize, adaptive=adaptive, mask=mask)
    return jax.tree.map(lambda w, e: (w + rho * e).astype(w.dtype), params, step)


def _at_least_tiny(norm):
    return jnp.maximum(norm, jnp.finfo(norm.dtype).tiny)


def _direction(grads, params, *, normalize, adaptive, mask):
    """T^2 g' / ||T g'||, or T^2 g' if not normalised; zero where masked, and everywhere if g' is."""
    if mask is not None:
        keep = mask(params) if callable(mask) else mask
        grads = jax.tree.map(lambda k, part: jax.tree.map(lambda g: jnp.where(k, g, 0), part), keep, grads)
    if normalize:
        # Scaled by the largest entry first: the squares of a small gradient underflow.
        grads = optax.tree.scale(1 / _at_least_tiny(optax.tree.norm(grads, ord="inf")), grads)
    scale = jax.tree.map(lambda w: _scale(w, adaptive), params) if adaptive else None
    scaled = jax.tree.map(jnp.multiply, scale, grads) if adaptive else grads
    if normalize:
        scaled = optax.tree.scale(1 / _at_least_tiny(optax.tree.norm(scaled)), scaled)
    return jax.tree.map(jnp.multiply, scale, scaled) if adaptive else scaled


def _scale(weights, adaptive):
    """ASAM's T for one array of weights."""
    size = jnp.abs(weights.astype(wide_dtype(weights)))
    if adaptive == "element" or weights.ndim < 2:
        return size
    return jnp.sqrt(jnp.sum(jnp.square(size), axis=tuple(range(weights.ndim - 1)), keepdims=True))


def _reject(a, b):
    """The part of `a` that is orthogonal to `b`."""
    share = optax.tree.vdot(a, b) / _at_least_tiny(optax.tree.vdot(b, b))
    return jax.tree.map(lambda x, y: x - share * y, a, b)


def _call(grad_fn, params):
    try:
        return grad_fn(params)
    except Exception as error:
        error.add_note(
            "sam called grad_fn with weights of the structure that update received. If this is not the structure that grad_fn "
            "takes, a wrapper around sam changed it, as optax.flatten does: let the wrapper hold the optimizer alone, "
            "chain(sam(...), flatten(optimizer))."
        )
        raise


def _split_output(output, params, aux):
    """Returns gradient and aux of what `grad_fn` returned, checked: a loss would otherwise be broadcast to all weights."""
    has_aux = aux is not None
    if has_aux and not (isinstance(output, tuple) and len(output) == 2):
        raise ValueError(f"grad_fn must return (gradient, aux), as sam was given aux; got {_describe(output)}")
    gradient, new_aux = output if has_aux else (output, None)
    if not _is_gradient(gradient, params):
        raise ValueError(
            f"grad_fn must return {'(gradient, aux) with a' if has_aux else 'a'} gradient, of floating-point numbers shaped as "
            f"the weights, {_describe(params)}; got {_describe(output)}. jax.value_and_grad returns the loss first: take "
            "jax.grad, or sam(aux=0.0) with grad_fn=lambda params: jax.value_and_grad(loss)(params, descent_batch)[::-1]"
        )
    old, new = jax.tree.leaves(aux), jax.tree.leaves(new_aux)
    if jax.tree.structure(aux) != jax.tree.structure(new_aux) or [*map(jnp.shape, old)] != [*map(jnp.shape, new)]:
        raise ValueError(f"grad_fn must return an aux shaped as that of sam(aux=...), {_describe(aux)}; got {_describe(new_aux)}")
    if any(_is_inexact(y) and not _is_inexact(x) for x, y in zip(old, new, strict=True)):
        raise ValueError(f"sam(aux=...) is {_describe(aux)}, which cannot hold {_describe(new_aux)}: write aux=0.0, not aux=0")
    return gradient, new_aux


def _is_gradient(tree, params):
    return jax.tree.structure(tree) == jax.tree.structure(params) and all(
        jnp.shape(g) == jnp.shape(w) and _is_inexact(g)
        for g, w in zip(jax.tree.leaves(tree), jax.tree.leaves(params), strict=True)
    )


def _is_inexact(leaf):
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def _describe(tree):
    text = str(jax.tree.map(lambda leaf: f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}", tree)).replace("'", "")
    return text if len(text) <= 200 else f"{text[:200]}..."


_WRONG_AROUND = {
    "MultiSteps": "would take the descent gradient of the last micro-batch alone; write chain(sam(...), MultiSteps(optimizer, "
    "k).gradient_transformation()), or average the gradients of the micro-batches in grad_fn, as sast_jax.accumulate does",
    "apply_if_finite": "would look at the perturbation gradient alone; write chain(sam(...), apply_if_finite(optimizer, n))",
    "lookahead": "would not pass grad_fn on; write chain(sam(...), optimizer)",
}


def _refuse_partial_tree(params):
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode))
    if any(isinstance(leaf, optax.MaskedNode) for leaf in leaves):
        raise ValueError(
            "sam inside optax.masked, optax.multi_transform or optax.partition sees a part of the weights, and grad_fn needs "
            "all; write chain(sam(rho, mask=...), masked(optimizer, ...)): sam's own mask says what is perturbed"
        )


def _optax_callers():
    """The frames of optax among the callers: nothing else tells a transformation who wraps it."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("optax."):
            yield frame
        frame = frame.f_back
