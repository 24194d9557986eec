"""Factorisation by design: a speech transformer whose linear layers are low-rank from the start.

After Winata et al., "Lightweight and Efficient End-to-End Speech Recognition Using Low-Rank Transformer" (ICASSP
2020): one network is trained from scratch twice, with nn.Linear and with LED, on the same synthetic speech (sequences
of two-vowel words of random pitch, speed, vocal tract and noise), and recognises the words with CTC. Printed:
parameters, training loss, word error rate on unseen utterances, and inference speed.

    python examples/speech_transformer.py            # a few minutes on two cores
    python examples/speech_transformer.py --quick    # seconds: the same path, too little training to learn much
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from shrank.lr_module import LED

SAMPLE_RATE, HOP, N_FFT, BANDS = 8000, 80, 256, 40
FORMANTS = ((270, 2290), (660, 1720), (730, 1090), (300, 870), (490, 1350))  # of five vowels, in Hz
WORDS = [(a, b) for a in range(5) for b in range(5) if a != b]               # every ordered pair of them
BLANK = len(WORDS)


def synthesise(words: list[int], g: torch.Generator) -> Tensor:
    """The waveform (samples,) of a word sequence: harmonics of a wavering pitch under two gliding formants."""
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
    voice = envelope * (f < SAMPLE_RATE / 2) * torch.sin(harmonic * torch.cumsum(f0, 0) * (2 * math.pi / SAMPLE_RATE))
    return gain * voice.sum(0) + uniform(0.05, 0.3) * torch.randn(len(gain), generator=g)


def log_spectrogram(x: Tensor) -> Tensor:
    """(samples,) -> (frames, BANDS): log power in overlapping bands of equal width, normalised per utterance."""
    power = torch.stft(x, N_FFT, HOP, window=torch.hann_window(N_FFT), return_complex=True).abs().square()
    bands = F.adaptive_avg_pool1d(power.T, BANDS).clamp_min(1e-6).log()
    return (bands - bands.mean()) / bands.std()


def make_corpus(count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Utterances of three to six words: log spectrogram (frames, BANDS) and words (length,)."""
    g = torch.Generator().manual_seed(seed)
    corpus = []
    for _ in range(count):
        words = torch.randint(len(WORDS), (int(torch.randint(3, 7, (), generator=g)),), generator=g)
        corpus.append((log_spectrogram(synthesise(words.tolist(), g)), words))
    return corpus


def collate(utterances: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Padded frames (batch, frames, BANDS), their counts, padded words (batch, length), their counts."""
    frames, words = zip(*utterances, strict=True)
    return (pad_sequence(frames, batch_first=True), torch.tensor([len(x) for x in frames]),
            pad_sequence(words, batch_first=True), torch.tensor([len(x) for x in words]))


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward network, each after a layer norm and inside a residual."""

    def __init__(self, dim: int, heads: int, linear: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.key, self.value, self.out = (linear(dim, dim) for _ in range(4))
        self.expand, self.contract = linear(dim, 4 * dim), linear(4 * dim, dim)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x: (batch, frames, dim); mask: (batch, 1, 1, frames), True where there is speech."""
        h = self.norm1(x)
        q, k, v = (p(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.query, self.key, self.value))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))
        return x + self.contract(F.gelu(self.expand(self.norm2(x))))


class SpeechTransformer(nn.Module):
    """Convolutions that quarter the frame rate, encoder layers, CTC scores; `linear` builds every inner projection."""

    def __init__(self, dim: int, heads: int, layers: int, linear: Callable[[int, int], nn.Module] = nn.Linear) -> None:
        super().__init__()
        self.subsample = nn.Sequential(nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU())
        self.project = linear(16 * BANDS // 4, dim)
        self.layers = nn.ModuleList(EncoderLayer(dim, heads, linear) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, len(WORDS) + 1)

    def forward(self, frames: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Padded frames and their counts -> log probabilities (batch, frames / 4, words + blank) and their counts."""
        x = self.project(self.subsample(frames[:, None]).transpose(1, 2).flatten(2))
        counts = (counts + 3) // 4
        mask = (torch.arange(x.shape[1]) < counts[:, None])[:, None, None]
        dim = x.shape[2]
        angle = torch.arange(x.shape[1])[:, None] * torch.exp(torch.arange(0, dim, 2) * (-math.log(1e4) / dim))
        x = x + torch.cat([angle.sin(), angle.cos()], 1)
        for layer in self.layers:
            x = layer(x, mask)
        return F.log_softmax(self.head(self.norm(x)), -1), counts


def train(model: nn.Module, corpus: list[tuple[Tensor, Tensor]], epochs: int, batch: int = 16) -> tuple[float, float]:
    """Train with CTC; mean loss of the last epoch and median seconds per epoch."""
    g = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters())
    steps = epochs * (len(corpus) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.2)
    seconds = []
    for epoch in range(1, epochs + 1):
        start, losses = time.perf_counter(), []
        for indices in torch.randperm(len(corpus), generator=g)[:steps // epochs * batch].split(batch):
            frames, counts, words, lengths = collate([corpus[i] for i in indices])
            scores, counts = model(frames, counts)
            loss = F.ctc_loss(scores.transpose(0, 1), words, counts, lengths, blank=BLANK)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
        print(f"  epoch {epoch}: loss {statistics.mean(losses):.3f}, {seconds[-1]:.1f} s", flush=True)
    return statistics.mean(losses), statistics.median(seconds)


def edit_distance(a: list[int], b: list[int]) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


@torch.inference_mode()
def error_rate(model: nn.Module, corpus: list[tuple[Tensor, Tensor]]) -> float:
    """Edits that turn the greedy CTC transcripts into the truth, per word of the truth."""
    edits = 0
    for start in range(0, len(corpus), 32):
        frames, counts, words, lengths = collate(corpus[start:start + 32])
        scores, counts = model(frames, counts)
        for best, count, truth, length in zip(scores.argmax(-1), counts, words, lengths, strict=True):
            heard = [w for w in best[:count].unique_consecutive().tolist() if w != BLANK]
            edits += edit_distance(heard, truth[:length].tolist())
    return edits / sum(len(words) for _, words in corpus)


@torch.inference_mode()
def speeds(models: list[nn.Module], utterances: list[tuple[Tensor, Tensor]], rounds: int) -> list[float]:
    """Median utterances per second; the models take turns, so that a busy machine slows both alike."""
    frames, counts, _, _ = collate(utterances)
    seconds = [[] for _ in models]
    for _ in range(rounds + 3):
        for model, times in zip(models, seconds, strict=True):
            start = time.perf_counter()
            model(frames, counts)
            times.append(time.perf_counter() - start)
    return [len(utterances) / statistics.median(times[3:]) for times in seconds]  # the first three warm up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--utterances", type=int, default=1600)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--quick", action="store_true", help="far less data and training")
    args = parser.parse_args()
    start = time.perf_counter()
    c = make_corpus(args.utterances, 1)
    print(f"data {time.perf_counter() - start:.1f} s", statistics.mean(len(x) for x, _ in c))
    t = make_corpus(300, 2)
    ms = []
    for name, linear in (("LED", partial(LED, rank=args.rank)),("dense", nn.Linear)):
        torch.manual_seed(0)
        m = SpeechTransformer(256, 4, 4, linear)
        print(name, sum(p.numel() for p in m.parameters()))
        train(m, c, args.epochs)
        print(error_rate(m, t), error_rate(m,c[:300]))
        ms.append(m)
    print(speeds(ms, t[:32], 30))


if __name__ == "__main__":
    main()
