"""Convolutional network on DVS128 Gesture recordings: 64 x 64 pixels, the first 1.5 s in 20 frames.

    sast-jax train --config=configs/dvs_gesture.py --config.dataset.root=FOLDER --workdir=runs/dvs_gesture

FOLDER holds the recordings as tonic distributes them (ibmGestureTrain/, ibmGestureTest/) or as their authors do
(userNN_<light>.aedat with userNN_<light>_labels.csv), whole or in part. Users 24 to 29 are the test part. The authors' files
hold 1,176 training and 288 test gestures, tonic's 1,077 and 264.

Nothing has been measured with this config: only ten recordings were at hand, on which it was seen to run. Convolutional
networks of about this size are published at 93 to 97 % test accuracy (93.6 % by Shrestha, Orchard, SLAYER, NeurIPS 2018). The
variant small (and small_baseline, small_sast, ...) is the network of configs/nmnist.py on 32 x 32 pixels, the size that the 63 %
of the SAST papers suggest.
"""

import ml_collections

VARIANTS = ("baseline", "sast", "cheap_sast", "straight_through")
SMALL = "small"


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Returns the config of a variant; without one, of the pair of baseline and SAST."""
    is_small = variant.partition("_")[0] == SMALL
    training = variant.removeprefix(SMALL).removeprefix("_") if is_small else variant
    if training not in ("", *VARIANTS):
        raise ValueError(
            f"the variant must be one of {', '.join(VARIANTS)}, or none for the pair, each also as {SMALL}_...; got {variant!r}"
        )
    config = ml_collections.ConfigDict()
    if not training:  # What is trained side by side, each in a folder of its own.
        config.variants = ("small_baseline", "small_sast") if is_small else ("baseline", "sast")

    config.dataset = ml_collections.ConfigDict()
    config.dataset.name = "dvs_gesture"  # Recordings in dataset.root.
    config.dataset.root = ""  # Folder of the recordings; empty: the folder DVSGesture in $SAST_JAX_DATA.
    config.dataset.download = False  # Whether tonic may download them into dataset.root; its link was dead when last tried.
    config.dataset.num_time_steps = 20  # Frames T per recording, of 75 ms each.
    config.dataset.duration = 1.5  # Seconds from the first event; 0: the whole recording, in T frames of its own length.
    config.dataset.downsample = 2  # Side of the squares of pixels counted together: 128 pixels become 64.
    config.dataset.binary = True  # Frames say that there was an event, not how many.
    config.dataset.num_validation = 96  # At least; whole persons of the training part. All choices are made on them.
    config.dataset.num_test = 0  # Users 24 to 29 are the test part; more only where none of them is there.
    config.dataset.skip_bad = False  # Whether files that cannot be read are left out and counted, instead of refused.
    config.dataset.images = ""  # Not used: only digits are simulated from images.
    config.dataset.image_range = ()  # Not used.
    config.dataset.seed = 0  # Of the split into training and validation; not of the run.

    config.augmentation = ml_collections.ConfigDict()  # Of training batches; never mirrored, as left and right are classes.
    config.augmentation.max_shift = 4  # Pixels, along each axis, that a recording is shifted by at most.
    config.augmentation.time_jitter = 0.1  # Probability of a pixel's count in a frame to move to the frame before or after it.
    config.augmentation.drop = 0.1  # Probability of a pixel's count in a frame to be lost.

    config.network = ml_collections.ConfigDict()
    config.network.kind = "conv"  # conv: convolution - spikes - pooling, repeated; mlp: dense layers.
    config.network.features = (32, 64, 128, 128)  # Channels of each convolution, or neurons of each dense layer.
    config.network.kernel_size = 3  # Height and width of the kernels (conv).
    config.network.pool_size = 2  # Height, width and stride of the average pooling (conv).
    config.network.decay = 0.9  # Share of the potential kept per step.
    config.network.threshold = 1.0  # Potential above which a neuron spikes.
    config.network.reset = "zero"  # After a spike; zero is the papers' form, subtract and none the others.
    config.network.family = "arctan"  # Smooth spikes: arctan, logistic, fast_sigmoid.
    config.network.slope = 2.0  # Of the smooth spikes; the steeper, the closer to hard ones and the smaller the gap.
    config.network.readout = "leaky"  # leaky: mean potential of outputs that do not spike; rate: their spike counts.
    config.network.readout_decay = 0.0  # Of the leaky readout; 0: the mean of the output current.
    config.network.init_gain = 4.0  # Initial weights are this much larger than LeCun's; as in the other configs.
    config.network.precision = "float32"  # Of the products with weights; bfloat16: for GPUs and TPUs, slow on CPUs.
    config.network.time_chunk = 0  # Steps between states kept for the gradient, to save memory in long recordings; 0: all kept.
    config.network.time_loop = "scan"  # pallas: kernels for GPUs and TPUs, not yet timed there; interpreted on CPUs.

    config.certified = ml_collections.ConfigDict()
    config.certified.margin = 0.0  # Above 0: excitation is capped so that each layer contracts by 1 - margin a step; 0: free.

    config.mode = "surrogate"  # Forward pass of training: smooth spikes, or straight_through (hard, smooth derivative).
    config.spikes = ml_collections.ConfigDict()
    config.spikes.initial_slope = 0.0  # Slope at the first step, from where it rises to network.slope at the last; 0: constant.
    config.spikes.hard_share = 0.0  # Share of the neurons, drawn anew each step, that spike hard in training.
    config.spikes.finish = 0.0  # Share of the steps, the last ones, in which all spikes are hard (straight_through).
    config.warm_start = ""  # Folder of a finished run whose weights are the initial ones; empty: drawn by the seed.
    config.sam = ml_collections.ConfigDict()
    config.sam.rho = 0.2  # Radius of the perturbation; 0: no SAM, half the gradients.
    config.sam.perturbation = "independent"  # Direction: gradient of an independent or the same batch; noise; stale (last step).
    config.sam.perturbation_batch_size = 0  # Of an independent batch; 0: as batch_size. A smaller one costs less.
    config.sam.adaptive = "none"  # ASAM: element, filter (radius relative to the weights); none.
    config.sam.every_steps = 1  # Every how many steps weights are perturbed; the others cost one gradient.
    config.sam.start = 0.0  # Share of the steps, from 0 to 1, after which perturbing begins.
    config.sam.ascent = "global"  # On several devices: global, or per_device (each climbs the gradient of its own samples).

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.name = "adam"  # adam, adamw, or sgd (momentum 0.9).
    config.optimizer.learning_rate = 1e-3  # At the start of the schedule.
    config.optimizer.schedule = "cosine"  # cosine: down to 0 at the end; constant.
    config.optimizer.weight_decay = 0.0  # Of adamw.

    config.batch_size = 16  # Of the descent batch.
    config.num_microbatches = 1  # Parts in which a batch is taken when it does not fit in memory at once.
    config.num_epochs = 100  # Passes over the training part by the descent batches.
    config.evaluate_every_epochs = 5  # On the validation part, in both modes.
    config.checkpoint_every_epochs = 5  # The last two checkpoints are kept.
    config.seed = 0  # Of the weights and of the batches.
    config.test = True  # Whether the test part is evaluated at the end; not in runs that only choose between settings.

    if is_small:
        config.dataset.downsample = 4  # 32 pixels.
        config.augmentation.max_shift = 2
        config.network.features = (12, 32)
        config.network.kernel_size = 5
    if training == "cheap_sast":
        config.sam.perturbation_batch_size = 4  # A step costs 1.25 gradients instead of 2.
    if training in ("baseline", "straight_through"):
        config.sam.rho = 0.0
    if training == "straight_through":
        config.mode = "straight_through"
    return config
