"""What a trained network is worth, each question a function of weights and recordings.

`sast-jax evaluate --workdir=RUN --suite=NAMES` writes the answers to `RUN/evaluation.json`. Accuracies, rates and gaps are
fractions; losses are mean cross-entropies; all are of the test part unless the key says `calibration`. "A layer" is a layer of
spiking neurons, by its name in the tree of weights (`conv_0`, `conv_1`); `synops`, `quantization` also list the layer `readout`.

- `step`: optimizer steps that the evaluated weights have had; `weights`: SHA-256 over them.
- `transfer`: `surrogate_accuracy`, `hard_accuracy`, `transfer_gap`, `surrogate_loss`, `hard_loss`, `num_test`;
    - `layer_swap`: `prefix`, a list of `{hard, accuracy, loss}` with the first 0, 1, ... all layers in hard mode and the rest in
      surrogate mode, and `single`, the same with one layer each; `hard` is the list of names of the layers in hard mode;
    - `agreement`: `decisions`, the share of recordings that get the same class in both modes, and `layers`, by name
      `{surrogate_activation, hard_rate, count_correlation, count_difference}`: mean output per neuron and step in each mode;
      Pearson's correlation, and mean absolute difference, over neurons and recordings, of the two modes' sums over time
      (correlation null if one of them does not vary);
    - `confusion`: `surrogate` and `hard`, each `[K][K]` numbers of recordings, rows the true class, columns the decision.
- `calibration`: of the hard network with frozen weights. `split` (`validation`, or `train` if a run has no validation part),
  `num_calibration`, `num_test`, `num_bins` of the expected calibration error;
    - `surrogate`: `{accuracy, loss, ece, temperature, scaled_loss, scaled_ece, calibration_accuracy, calibration_loss,
      calibration_scaled_loss}`, "scaled" after division of the logits by `temperature`, which is fitted on the calibration part;
    - `methods`: by name those keys and `{gap_removed, thresholds, gains}`, where
      `gap_removed` is the share of `transfer_gap` that the method removes (null where there is no positive gap), and `thresholds`
      and `gains` are, by layer, a list of one number or of one per channel. Names: `none` (the swap alone), `threshold_layer`,
      `threshold_channel`, `gain_layer`, `gain_channel`, `search_layer`, `gradient_channel`; see `calibration`;
    - `chosen`: name of the method of the lowest `calibration_scaled_loss` among those that fit no labels (not the last two).
- `quantization`: of the hard network. `num_test`; `float`: `{accuracy, synops, memory}` of the network as trained;
    - `configurations`: a list of `{weight_bits, granularity, decay_form, potential_bits, accuracy, agreement, synops, memory,
      layers, reference}`. `granularity`: `tensor`, or `channel` (not in a leaky readout); `decay_form`: `fraction` (m/2^8) or
      `power` (1 - 2^-k); `agreement`: share of recordings decided as by the float network; `layers`, by name `{integer_bits,
      fraction_bits, decay, spike_rate, saturation_rate}`: format, effective decay, mean spikes per neuron and step (null for a
      leaky readout), share of potentials at a limit; `reference`: `{num_compared, equal}`, recordings compared bit for bit with
      the NumPy reference, and whether all are equal;
    - `synops`: as `synops` below without `layers`; `memory`: bytes `{weights, biases, thresholds, potentials, total}`, biases and
      different thresholds of 32 bits each.
- `synops`: of the hard network, per recording: `effective_acs`, `effective_macs`, `dense`, `event_acs` (accumulations if each
  spike passes through the pooling by itself), `activation_sparsity`; `num_test`; `layers`: by name the first four and
  `spike_rate` (null for a leaky readout).
- `robustness`: `num_test`, `severities` (`[1, ..., 5]`), `clean`: `{surrogate_accuracy, hard_accuracy}`; `corruptions`: by kind
  `{surrogate_accuracy, hard_accuracy}`, a list each, one per severity; `area`: by kind and `mean`, `{surrogate, hard}`, the area
  under accuracy over severity from 0 (clean) to 5, divided by 5.
"""
