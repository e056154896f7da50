"""A NIR graph run step by step in NumPy, from NIR's equations alone: the reader that an exported graph is tested with."""

import numpy as np


def simulate(graph, frames):
    """Runs a chain of nodes on `frames` `[T, B, C, H, W]`, in float64.

    Neurons follow the forward Euler rule with the graph's time step: `v += dt / tau * (v_leak - v + r * I)`, a spike where
    `v > v_threshold`, then `v_reset`. Returns the output of every node, `[T, B, ...]`, by its name.
    """
    following = dict(graph.edges)
    assert len(following) == len(graph.edges) == len(graph.nodes) - 1
    dt, outputs, states = np.float32(graph.metadata["dt"]), {}, {}
    for frame in frames:
        name, x = "input", frame.astype(np.float64)
        while name in following:
            name = following[name]
            x = OPERATIONS[type(graph.nodes[name]).__name__](graph.nodes[name], x, states, dt)
            outputs.setdefault(name, []).append(x)
    return {name: np.stack(each) for name, each in outputs.items()}


def _conv2d(node, x, states, dt):
    weight, (height, width) = node.weight.astype(np.float64), x.shape[2:]
    assert node.padding == "same"
    assert (*np.ravel(node.stride), *np.ravel(node.dilation), node.groups) == (1, 1, 1, 1, 1)
    total = [size - 1 for size in weight.shape[2:]]
    padded = np.pad(x, [(0, 0), (0, 0), *((each // 2, each - each // 2) for each in total)])
    y = np.zeros((len(x), len(weight), height, width))
    for i, j in np.ndindex(weight.shape[2:]):
        y += np.einsum("bchw,oc->bohw", padded[:, :, i : i + height, j : j + width], weight[:, :, i, j])
    return y + node.bias.astype(np.float64)[:, None, None]


def _sum_pool2d(node, x, states, dt):
    (rows, columns), stride = node.kernel_size, node.stride
    assert not np.any(node.padding)
    height, width = (
        1 + (size - window) // step for size, window, step in zip(x.shape[2:], node.kernel_size, stride, strict=True)
    )
    y = np.zeros((*x.shape[:2], height, width))
    for i, j in np.ndindex(height, width):
        top, left = i * stride[0], j * stride[1]
        y[:, :, i, j] = x[:, :, top : top + rows, left : left + columns].sum(axis=(2, 3))
    return y


def _flatten(node, x, states, dt):
    first, last = (axis % len(node.input_type["input"]) for axis in (node.start_dim, node.end_dim))
    shape = x.shape[1:]
    return x.reshape(len(x), *shape[:first], -1, *shape[last + 1 :])


def _affine(node, x, states, dt):
    return x @ node.weight.T.astype(np.float64) + node.bias.astype(np.float64)


def _leaky(node, x, states, dt):
    v, share = states.get(id(node), 0.0), (dt / node.tau).astype(np.float64)
    return v + share * (node.v_leak - v + node.r * x)


def _integrating(node, x, states, dt):
    return states.get(id(node), 0.0) + (dt * node.r).astype(np.float64) * x


def _keeping(potential):
    def run(node, x, states, dt):
        states[id(node)] = potential(node, x, states, dt)
        return states[id(node)]

    return run


def _spiking(potential):
    def run(node, x, states, dt):
        v = potential(node, x, states, dt)
        spikes = (v > node.v_threshold).astype(np.float64)
        states[id(node)] = np.where(spikes, node.v_reset, v)
        return spikes

    return run


OPERATIONS = {
    "Conv2d": _conv2d,
    "SumPool2d": _sum_pool2d,
    "Flatten": _flatten,
    "Affine": _affine,
    "LI": _keeping(_leaky),
    "I": _keeping(_integrating),
    "LIF": _spiking(_leaky),
    "IF": _spiking(_integrating),
    "Threshold": lambda node, x, states, dt: (x > node.threshold).astype(np.float64),
    "Scale": lambda node, x, states, dt: x * node.scale,
    "Output": lambda node, x, states, dt: x,
}
