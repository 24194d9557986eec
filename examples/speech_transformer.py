"""Factorisation by design: a speech transformer whose linear layers are low-rank from the start.

After Winata et al., "Lightweight and Efficient End-to-End Speech Recognition Using Low-Rank Transformer"
(ICASSP 2020): one network is trained from scratch twice, with nn.Linear and with LED, on the same synthetic
speech, and recognises its words with CTC. Printed: parameters, training loss, word error rate on unseen
utterances, and speed.

    python examples/speech_transformer.py            # a few minutes
    python examples/speech_transformer.py --quick    # seconds: the same path, too little training to learn

One thread is the default, for steady timings: beside other work, two threads mostly waited for each other.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from synthetic_speech import BANDS, WORDS, Corpus, collate, make_corpus
from torch import Tensor, nn
from torch.nn import functional as F

from shrank.lr_module import LED

BLANK = len(WORDS)


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
        q, k, v = (
            project(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for project in (self.query, self.key, self.value)
        )
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))
        return x + self.contract(F.gelu(self.expand(self.norm2(x))))


class SpeechTransformer(nn.Module):
    """Convolutions that quarter the frame rate, encoder layers, CTC; `linear` builds the projections."""

    def __init__(self, dim: int, heads: int, layers: int, linear: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.subsample = nn.Sequential(nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU())
        self.project = linear(16 * BANDS // 4, dim)
        self.layers = nn.ModuleList(EncoderLayer(dim, heads, linear) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, len(WORDS) + 1)

    def forward(self, frames: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Padded frames, counts -> log probabilities (batch, frames / 4, words + blank), counts."""
        x = self.project(self.subsample(frames[:, None]).transpose(1, 2).flatten(2))
        counts = (counts + 3) // 4
        mask = (torch.arange(x.shape[1]) < counts[:, None])[:, None, None]
        length, dim = x.shape[1:]
        angle = torch.arange(length)[:, None] * torch.exp(torch.arange(0, dim, 2) * (-math.log(1e4) / dim))
        x = x + torch.cat([angle.sin(), angle.cos()], 1)
        for layer in self.layers:
            x = layer(x, mask)
        return F.log_softmax(self.head(self.norm(x)), -1), counts


def train(model: nn.Module, corpus: Corpus, epochs: int, batch: int = 16) -> tuple[float, float]:
    """Train with CTC; mean loss of the last epoch and seconds of the fastest."""
    g = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters())
    steps = epochs * math.ceil(len(corpus) / batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.2)
    seconds = []
    for epoch in range(1, epochs + 1):
        start, losses = time.perf_counter(), []
        for indices in torch.randperm(len(corpus), generator=g).split(batch):
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
    return statistics.mean(losses), min(seconds)


def edit_distance(a: list[int], b: list[int]) -> int:
    """Insertions, deletions and substitutions between two sequences (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


@torch.inference_mode()
def error_rate(model: nn.Module, corpus: Corpus) -> float:
    """Edits that turn the greedy CTC transcripts into the truth, per word of the truth."""
    edits = 0
    for start in range(0, len(corpus), 32):
        frames, counts, words, lengths = collate(corpus[start : start + 32])
        scores, counts = model(frames, counts)
        for best, count, truth, length in zip(scores.argmax(-1), counts, words, lengths, strict=True):
            heard = [w for w in best[:count].unique_consecutive().tolist() if w != BLANK]
            edits += edit_distance(heard, truth[:length].tolist())
    return edits / sum(len(words) for _, words in corpus)


@torch.inference_mode()
def speeds(models: list[nn.Module], utterances: Corpus, rounds: int) -> list[float]:
    """Median utterances per second; the models take turns, so that a busy machine slows both alike."""
    frames, counts, _, _ = collate(utterances)
    seconds = [[] for _ in models]
    for _ in range(rounds + 3):
        for model, times in zip(models, seconds, strict=True):
            start = time.perf_counter()
            model(frames, counts)
            times.append(time.perf_counter() - start)
    return [len(utterances) / statistics.median(times[3:]) for times in seconds]  # the first three warm up


def print_table(results: dict[str, dict[str, float]]) -> None:
    dense, led = results.values()
    print(f"\n{'':<26}" + "".join(f"{name:>14}" for name in (*results, "LED / dense")))
    for measure, value in dense.items():
        ratio = led[measure] / value if value else math.nan
        style = "," if isinstance(value, int) else ".4g"
        print(f"{measure:<26}{value:>14{style}}{led[measure]:>14{style}}{ratio:>14.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="one epoch on a tenth of the data")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    scale, epochs = (10, 1) if args.quick else (1, args.epochs)
    corpus, unseen = make_corpus(2000 // scale, seed=1), make_corpus(500 // scale, seed=2)

    models, results = [], {}
    for name, linear in (("dense", nn.Linear), ("LED", partial(LED, rank=args.rank))):
        torch.manual_seed(0)
        model = SpeechTransformer(args.dim, args.dim // 64, args.layers, linear)
        print(f"{name}:")
        loss, seconds = train(model, corpus, epochs)
        params, errors = sum(p.numel() for p in model.parameters()), error_rate(model.eval(), unseen)
        results[name] = {
            "parameters": params,
            "training loss": loss,
            "unseen word error rate": errors,
            "fastest epoch, seconds": seconds,
        }
        models.append(model)
    for name, speed in zip(results, speeds(models, unseen[:32], rounds=100 // scale), strict=True):
        results[name]["utterances per second"] = speed
    print_table(results)


if __name__ == "__main__":
    main()
