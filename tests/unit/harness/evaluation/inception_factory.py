"""torch-fidelity's Inception with random weights, saved as its release is."""

from pathlib import Path
from unittest import mock

import torch
from torch_fidelity import feature_extractor_inceptionv3 as theirs
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from harness.frozen.weights import INCEPTION_FILE
from harness.rng import global_state_kept, stream

SMALL_SIDE = 75
"""The smallest input that the network takes; at its own 299 an image costs twenty times as much."""


def untrained_network() -> FeatureExtractorInceptionV3:
    """The network with random weights that keep the scale of activations."""
    with (
        global_state_kept(),
        mock.patch.object(theirs, "load_state_dict_from_url", lambda *_, **__: {}),
        mock.patch.object(FeatureExtractorInceptionV3, "load_state_dict"),
    ):
        network = FeatureExtractorInceptionV3("untrained", ["2048", "logits_unbiased"])
    generator = stream(0, "init")
    for name, value in network.state_dict().items():
        if name.endswith("conv.weight"):
            value.normal_(std=(2 / value[0].numel()) ** 0.5, generator=generator)
    return network


def save_inception(folder: Path) -> Path:
    """A file of the real name and format, but not of the real hash."""
    path = folder / INCEPTION_FILE
    torch.save(untrained_network().state_dict(), path)
    return path
