"""A trained network as a graph of NIR, the exchange format of neuromorphic tools and chips."""

import io
import itertools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sast_jax.errors import UserError
from sast_jax.files import atomic_write
from sast_jax.networks import Calibration, SpikingConvNet, SpikingMLP, SpikingNetwork

if TYPE_CHECKING:
    import nir

DT = 1e-4
"""Duration of a time step, in the unit of the graph's time constants. snnTorch reads any graph with this one."""

_SUBTRACT = (
    "NIR has no reset by subtraction: readers reset the potential to zero after a spike and their spikes differ. This network's "
    "neurons follow u[t] = decay * u[t-1] - threshold * s[t-1] + I[t]"
)


def make_nir_graph(
    network: SpikingNetwork,
    params: Any,
    frame_shape: tuple[int, int, int],
    calibration: Calibration | None = None,
    **metadata: float | str,
) -> "nir.NIRGraph":
    r"""Returns the hard-spike network as a NIR graph.

    NIR's neurons live in continuous time; under the forward Euler rule with step :math:`\Delta t` (`DT`)

    .. math:: \tilde\tau \dot v = (v_{leak} - v) + r I \quad\Rightarrow\quad
        v_t = (1 - \Delta t / \tilde\tau) v_{t-1} + (\Delta t / \tilde\tau)\, r I_t

    so a decay :math:`\tau` per step is :math:`\tilde\tau = \Delta t / (1 - \tau)`. Some readers ignore `r`: it is 1, and
    :math:`1 / (1 - \tau)` is part of the weights. Likewise pooling sums, which more readers know than means, and the weights
    behind it are divided by the window's area. Decay 1 gives `IF` and `I` with :math:`r = 1 / \Delta t`.

    Reset zero is NIR's own. Reset none is an integrator with a threshold behind it. For reset subtract, which NIR lacks, the
    graph has reset zero, and its metadata a `warning`. A leaky readout of decay 0 ends in the output current, another one in
    the potential of `LI`; a rate readout ends in spikes. What to do with them over time is in the metadata too, as `logits`.

    Args:
        network: A `SpikingConvNet` or `SpikingMLP`.
        params: Its weights.
        frame_shape: Height, width and channels of a frame; the graph's input is `[C, H, W]`.
        calibration: Thresholds and gains of each layer; gains become part of the next layer's weights.
        metadata: More for the graph's metadata.

    Returns:
        A chain of nodes, all numbers float32.

    Raises:
        UserError: If the network is of another kind, or the package nir is missing.

    References:
        Pedersen, Abreu, Jobst, et al. Neuromorphic intermediate representation: A unified instruction set for interoperable
        brain-inspired computing. Nature Communications 2024.
    """
    nir = _import_nir()
    if type(network) not in (SpikingConvNet, SpikingMLP):
        raise UserError(
            f"export: knows SpikingConvNet and SpikingMLP; got {type(network).__name__}, whose layers it does not know"
        )
    height, width, channels = frame_shape
    shape: tuple[int, ...] = (channels, height, width)
    nodes: dict[str, Any] = {"input": nir.Input(np.array(shape))}
    ones = (1.0,) * network.num_spiking
    settings = calibration or Calibration(tuple(network.threshold * one for one in ones), ones)
    input_gains = (1.0, *settings.gains)

    for index, name in enumerate(network.layer_names):
        spiking = index < network.num_spiking
        decay = network.decay if spiking else network.readout_decay
        gain = 1 if decay == 1 else 1 / (1 - decay)
        area = network.pool_area(index)
        if area > 1:
            size = math.isqrt(area)
            window = np.full(2, size)
            nodes[f"{name}_pool"] = nir.SumPool2d(kernel_size=window, stride=window, padding=np.zeros_like(window))
            shape = shape[0], shape[1] // size, shape[2] // size
        weight, bias = (np.asarray(params[name][key], np.float64) for key in ("kernel", "bias"))
        by_channel = np.broadcast_to(input_gains[index], shape[:1])[:, None] * gain / area
        weight = (weight.reshape(-1, shape[0], weight.shape[-1]) * by_channel).reshape(weight.shape).astype(np.float32)
        bias = (bias * gain).astype(np.float32)
        if weight.ndim == 4:
            weight = np.ascontiguousarray(weight.transpose(3, 2, 0, 1))
            nodes[name] = nir.Conv2d(shape[1:], weight, stride=1, padding="same", dilation=1, groups=1, bias=bias)
            shape = len(bias), *shape[1:]
        else:
            if len(shape) == 3:
                # Counted from the end, the axes are the same with a batch axis in front, as readers have it, and without.
                nodes[f"{name}_flatten"] = nir.Flatten(np.array(shape), start_dim=-3, end_dim=-1)
                weight = weight.reshape(*shape[1:], shape[0], -1).transpose(2, 0, 1, 3).reshape(weight.shape)
            nodes[name] = nir.Affine(np.ascontiguousarray(weight.T), bias)
            shape = (len(bias),)
        threshold = settings.thresholds[index] if spiking else None
        for node in _neurons(nir, shape, decay, threshold, network.reset):
            nodes[f"{name}_{type(node).__name__}"] = node

    if network.readout == "rate" and np.any(np.not_equal(settings.gains[-1], 1)):
        nodes["output_gain"] = nir.Scale(_full(shape, settings.gains[-1]))
    nodes["output"] = nir.Output(np.array(shape))
    names = list(nodes)
    return nir.NIRGraph(nodes, list(itertools.pairwise(names)), metadata=_describe(network) | metadata)


def _neurons(nir, shape, decay, threshold, reset):
    """Returns the nodes of a layer's neurons; those without a threshold never spike, and with decay 0 there are none."""
    if threshold is None and decay == 0:
        return []
    if decay == 1:
        leak, integrator, resetting = {"r": _full(shape, 1 / DT)}, nir.I, nir.IF
    else:
        leak = {"tau": _full(shape, DT / (1 - decay)), "r": _full(shape, 1), "v_leak": _full(shape, 0)}
        integrator, resetting = nir.LI, nir.LIF
    if threshold is None:
        return [integrator(**leak)]
    if reset == "none":
        return [integrator(**leak), nir.Threshold(_full(shape, threshold))]
    return [resetting(**leak, v_threshold=_full(shape, threshold), v_reset=_full(shape, 0))]


def _full(shape, value):
    """A number for each neuron, from one for all or one for each channel, the first axis."""
    return np.full(shape, np.reshape(value, (-1, *[1] * (len(shape) - 1))), np.float32)


def _describe(network):
    description = {
        "dt": DT,
        "decay": network.decay,
        "reset": network.reset,
        "logits": f"{'mean' if network.readout == 'leaky' else 'sum'} of the output over all time steps",
    }
    return description | ({"warning": _SUBTRACT} if network.reset == "subtract" else {})


def write_nir_graph(path: Path, graph: "nir.NIRGraph") -> None:
    """Writes a graph as an HDF5 file that `nir.read` reads, whole or not at all."""
    buffer = io.BytesIO()
    _import_nir().write(buffer, graph)
    with atomic_write(path, follow=True) as file:
        file.write(buffer.getvalue())


def _import_nir():
    try:
        import nir
    except ImportError as error:
        raise UserError('export: needs the package nir; install it with pip install "sast_jax[export]"') from error
    return nir
