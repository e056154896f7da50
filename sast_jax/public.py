"""The names that `import sast_jax` gives, loaded when the first of them is used."""

from sast_jax.accumulation import accumulate
from sast_jax.networks import Calibration, NetworkOutput, SpikingConvNet, SpikingMLP
from sast_jax.neurons import LIFState, leaky_readout, lif, lif_init, lif_step, rate_readout
from sast_jax.sharpness import SamState, sam
from sast_jax.spikes import FAMILIES, SurrogateFamily, spike_fn
from sast_jax.training import Run, load_run, train_and_evaluate
