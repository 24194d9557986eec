"""Synthetic speech: two-vowel words, random in pitch, speed, vocal tract and noise."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

SAMPLE_RATE, HOP, N_FFT, BANDS = 8000, 80, 256, 40
FORMANTS = ((270, 2290), (660, 1720), (730, 1090), (300, 870), (490, 1350))  # of five vowels, in Hz
WORDS = [(a, b) for a in range(5) for b in range(5) if a != b]  # every ordered pair of them

Corpus = list[tuple[Tensor, Tensor]]  # per utterance: log spectrogram (frames, BANDS) and words (length,)


def synthesise(words: list[int], g: torch.Generator) -> Tensor:
    """The waveform (samples,) of words: harmonics of a wavering pitch under two gliding formants."""

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=g).item()

    tract, speed, frames = uniform(0.9, 1.12), uniform(0.8, 1.25), []
    for word in words:
        for vowel in WORDS[word]:
            f1, f2 = (tract * f * uniform(0.96, 1.04) for f in FORMANTS[vowel])
            frames += [[f1, f2, uniform(0.5, 1.0)]] * round(uniform(6, 10) / speed)
        frames += [[f1, f2, 0.0]] * round(uniform(2, 5))
    control = F.avg_pool1d(torch.tensor(frames).T[None], 5, 1, 2, count_include_pad=False)
    f1, f2, gain = F.interpolate(control, scale_factor=HOP, mode="linear")[0]
    t = torch.arange(len(gain)) / SAMPLE_RATE
    f0 = uniform(90, 240) * (1 + 0.1 * torch.sin(2 * math.pi * uniform(1, 3) * t + uniform(0, 6.28)))
    harmonic = torch.arange(1, 31)[:, None]
    f = harmonic * f0
    envelope = 1 / (1 + ((f - f1) / 60).square()) + 0.6 / (1 + ((f - f2) / 80).square())
    phase = torch.cumsum(f0, 0) * (2 * math.pi / SAMPLE_RATE)
    voice = envelope * (f < SAMPLE_RATE / 2) * torch.sin(harmonic * phase)
    return gain * voice.sum(0) + uniform(0.05, 0.3) * torch.randn(len(gain), generator=g)


def log_spectrogram(x: Tensor) -> Tensor:
    """(samples,) -> (frames, BANDS): log power in bands of equal width, normalised per utterance."""
    power = torch.stft(x, N_FFT, HOP, window=torch.hann_window(N_FFT), return_complex=True).abs().square()
    bands = F.adaptive_avg_pool1d(power.T, BANDS).clamp_min(1e-6).log()
    return (bands - bands.mean()) / bands.std()


def make_corpus(count: int, seed: int) -> Corpus:
    """Utterances of three to six words."""
    g = torch.Generator().manual_seed(seed)
    corpus = []
    for _ in range(count):
        words = torch.randint(len(WORDS), (int(torch.randint(3, 7, (), generator=g)),), generator=g)
        corpus.append((log_spectrogram(synthesise(words.tolist(), g)), words))
    return corpus


def collate(utterances: Corpus) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Padded frames (batch, frames, BANDS), their counts, padded words (batch, length), their counts."""
    frames, words = zip(*utterances, strict=True)
    return (
        pad_sequence(frames, batch_first=True),
        torch.tensor([len(x) for x in frames]),
        pad_sequence(words, batch_first=True),
        torch.tensor([len(x) for x in words]),
    )
