"""What a streamed run holds in memory: the formula of docs/guide/streaming.md."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import shrank
from shrank.streaming.mapped import bytes_of
from tests.common.models import seeded
from tests.streaming.runs import CONTEXT

_WIDTH = 1024
_SIZES = {"hidden_size": _WIDTH, "intermediate_size": 3 * _WIDTH, "num_attention_heads": 8, "num_key_value_heads": 2}
_EVERY = 0.01  # seconds
# Of the 1 GiB beside blocks and moments: what the process held before, three parts of a weight in float64 of 32 MiB,
# and what else is imported and allocated on the way.
_GIB, _BESIDE = 1 << 30, 160 << 20


def held() -> int:
    """Bytes of this process that no file has, which nothing but its end gives back without swap."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def compress(source: Path, target: Path, file: Path) -> None:
    """Compress the largest layer, and write what was held before and at most."""
    torch.set_num_threads(1)
    peaks, ended = [held()], threading.Event()

    def watch() -> None:
        while not ended.wait(_EVERY):
            peaks.append(held())

    thread = threading.Thread(target=watch)
    thread.start()
    rank = {"*.0.mlp.up_proj": 0.9, "*": None}
    data = [{"input_ids": torch.randint(0, 64, (2, 32), generator=torch.Generator().manual_seed(0))}]
    options = {"calibrate": data, "anchored": 0.25, "include": "model.layers.0.mlp.*"}
    shrank.auto_fact(shrank.Checkpoint(source), rank, stream=target, **options)
    ended.set()
    thread.join()
    file.write_text(json.dumps([peaks[0], max(peaks)]))


def test_three_blocks_the_moments_of_a_layer_and_a_gibibyte(tmp_path) -> None:
    model = seeded(lambda: LlamaForCausalLM(LlamaConfig(**_SIZES, num_hidden_layers=2, vocab_size=64))).bfloat16()
    model.save_pretrained(tmp_path / "dense")
    process = CONTEXT.Process(target=compress, args=(tmp_path / "dense", tmp_path / "small", tmp_path / "held"))
    process.start()
    process.join()
    before, most = json.loads((tmp_path / "held").read_text())
    moments = 3 * 4 * _WIDTH**2  # of its inputs, with what they should be, and of gradients
    formula = 3 * bytes_of(model.model.layers[0]) + moments
    assert most < formula + _GIB
    assert most - before < formula + _BESIDE
