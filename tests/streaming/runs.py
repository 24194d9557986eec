"""Streamed runs in processes of their own, which end where they are told to, or are ended."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import shrank
from tests.common.models import seeded

# Forked from a server that has imported all this and never ran a thread of torch.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])
_SIZES = {"hidden_size": 32, "intermediate_size": 80, "num_attention_heads": 4, "num_key_value_heads": 2}


def write_source(folder: Path, blocks: int = 3) -> Path:
    """A tiny language model with a head of its own."""
    config = LlamaConfig(**_SIZES, num_hidden_layers=blocks, vocab_size=64, tie_word_embeddings=False)
    seeded(lambda: LlamaForCausalLM(config)).save_pretrained(folder)
    return folder


def data() -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(0, 64, (4, 16), generator=generator)} for _ in range(2)]


def compress(source: Path, target: Path, anchored: bool, moment: int | None = None, count: Path | None = None) -> None:
    """Compress, and die at the moment of this number: before a file, written whole, gets its name, or after.

    count: where to write how many there are.
    """
    torch.set_num_threads(1)
    passed = 0
    put = os.replace

    def replace(old: object, new: object) -> None:
        nonlocal passed
        if passed == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        put(old, new)
        passed += 2
        if passed - 1 == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace
    shrank.auto_fact(shrank.Checkpoint(source), 0.6, calibrate=data(), anchored=anchored, stream=target)
    if count:
        count.write_text(str(passed))


def in_process(*arguments: object) -> BaseProcess:
    """A process that compresses, started."""
    process = CONTEXT.Process(target=compress, args=arguments)
    process.start()
    return process


def finished(*arguments: object) -> float:
    """Seconds that a run took, which must end by itself and well."""
    started = time.monotonic()
    process = in_process(*arguments)
    process.join()
    assert process.exitcode == 0
    return time.monotonic() - started


def killed_after(seconds: float, *arguments: object) -> None:
    """A run that is ended from outside."""
    process = in_process(*arguments)
    process.join(seconds)
    process.kill()
    process.join()


def moments(number: int, last: float, seed: int) -> list[float]:
    """Moments in a run, drawn with a seed."""
    draw: Callable[[], float] = random.Random(seed).random
    return [last * draw() for _ in range(number)]


def bits(folder: Path) -> dict[str, bytes]:
    """All that a folder holds."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}
