"""What plain SVD keeps of all-MiniLM-L6-v2 at every size: table, JSON and picture under benchmarks/results/.

python -m benchmarks.quality.trade_off [--draw-only]
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import torch
from matplotlib import pyplot as plt
from transformers import AutoTokenizer

import shrank
from benchmarks.data.models import embed, minilm, minilm_folder
from benchmarks.data.texts import reference_sentences
from benchmarks.provenance import RESULTS, provenance
from benchmarks.speed.turns import THREADS, in_turns

KEEPS = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)


def measure() -> list[dict[str, float]]:
    """Cosine to dense, error, parameters and speed at every keep; the dense model comes first."""
    tokenizer, dense = AutoTokenizer.from_pretrained(minilm_folder()), minilm()
    text = reference_sentences(256)
    batches = [
        tokenizer(text[i : i + 32], padding="max_length", truncation=True, max_length=128, return_tensors="pt")
        for i in range(0, len(text), 32)
    ]
    rows = [
        {
            "keep": 1.0,
            "cosine": 1.0,
            "error": 0.0,
            "speed": 1.0,
            "parameters": sum(p.numel() for p in dense.parameters()),
        }
    ]
    with torch.inference_mode():
        reference = embed(dense, batches)
        for keep in KEEPS:
            small = shrank.auto_fact(copy.deepcopy(dense), keep, exclude="pooler.*")
            errors = [layer.error for layer in small.shrank_plan.low_rank]
            seconds = in_turns({"dense": lambda: dense(**batches[0]), "small": lambda m=small: m(**batches[0])}, 7)
            rows.append(
                {
                    "keep": keep,
                    "cosine": (embed(small, batches) * reference).sum(-1).mean().item(),
                    "error": sum(errors) / len(errors),
                    "speed": seconds["dense"] / seconds["small"],
                    "parameters": small.shrank_plan.params_after,
                }
            )
            print(" ".join(f"{name} {value:.4g}" for name, value in rows[-1].items()))
    return rows


def draw(rows: list[dict[str, float]], path: Path) -> None:
    keep = [100 * row["keep"] for row in rows]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    axes[0].plot(keep, [row["cosine"] for row in rows], "o-", color="#1f6f8b", label="embedding cosine to dense")
    axes[0].plot(keep, [row["error"] for row in rows], "s--", color="#c8553d", label="mean relative weight error")
    axes[0].set(ylim=(0, 1.03), title="quality")
    axes[0].legend(frameon=False, loc="upper right", fontsize=8)
    axes[1].plot(keep, [row["speed"] for row in rows], "o-", color="#1f6f8b")
    axes[1].axhline(1, color="#999999", linewidth=0.8)
    axes[1].annotate("dense", (keep[-1], 1), (keep[-1], 1.02), color="#777777", fontsize=8, ha="left", va="bottom")
    axes[1].set(title="speed against dense", ylim=(0, None))
    for axis in axes:
        axis.set_xlabel("parameters kept in the encoder's linear layers, %")
        axis.invert_xaxis()
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        "all-MiniLM-L6-v2, plain truncated SVD, the same keep for every layer, no data, no training\n"
        f"speed: batch 32 x 128, {THREADS} CPU threads",
        fontsize=9,
    )
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw-only", action="store_true", help="draw the stored figures again")
    results = RESULTS / "minilm_plain_svd.json"
    if not parser.parse_args().draw_only:
        torch.set_num_threads(THREADS)
        RESULTS.mkdir(exist_ok=True)
        results.write_text(json.dumps({**provenance("cpu"), "rows": measure()}, indent=1) + "\n")
    draw(json.loads(results.read_text())["rows"], results.with_suffix(".png"))


if __name__ == "__main__":
    main()
