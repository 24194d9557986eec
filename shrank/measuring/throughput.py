"""Throughput and peak memory of models in folders, each in a process of its own, timed in turns."""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
from torch import Tensor, nn

_MIN_SECONDS = 0.3  # of one timed turn


@dataclass(frozen=True)
class Workload:
    """What every model runs: `batch` samples, of `length` tokens where it takes tokens."""

    batch: int = 8
    length: int = 128
    rounds: int = 7
    threads: int | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class Result:
    """Median throughput in `unit` and peak memory in bytes (resident memory of the process; on CUDA, allocated)."""

    source: str
    parameters: int
    throughput: float
    unit: str
    peak_memory: int


def compare(sources: list[str], workload: Workload) -> list[Result]:
    """Measure the models in turns, so that a change in the machine's load meets all of them alike.

    Raises RuntimeError with the cause if a model cannot be loaded or run.
    """
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for source in sources:
        here, there = context.Pipe()
        process = context.Process(target=_worker, args=(there, source, workload), daemon=True)
        process.start()
        there.close()
        pipes.append(here)
        processes.append(process)
    try:
        loaded = [_receive(pipe, source) for pipe, source in zip(pipes, sources, strict=True)]
        rates: list[list[float]] = [[] for _ in sources]
        for _ in range(workload.rounds):
            for pipe, source, rate in zip(pipes, sources, rates, strict=True):
                pipe.send("run")
                rate.append(_receive(pipe, source))
        peaks = []
        for pipe, source in zip(pipes, sources, strict=True):
            pipe.send("peak")
            peaks.append(_receive(pipe, source))
    finally:
        for pipe, process in zip(pipes, processes, strict=True):
            pipe.close()
            process.join(timeout=10)
            process.kill()
    return [
        Result(source, parameters, statistics.median(rate), unit, peak)
        for source, (parameters, unit), rate, peak in zip(sources, loaded, rates, peaks, strict=True)
    ]


def _receive(pipe: Connection, source: str) -> object:
    try:
        answer = pipe.recv()
    except EOFError as error:
        raise RuntimeError(f"{source}: the measuring process died, perhaps for lack of memory") from error
    if isinstance(answer, BaseException):
        raise RuntimeError(f"{source}: {answer}") from answer
    return answer


def _worker(pipe: Connection, source: str, workload: Workload) -> None:
    from ..saving.transformers_folder import load_model

    try:
        if workload.threads:
            torch.set_num_threads(workload.threads)
        model = load_model(source).to(workload.device).eval()
        inputs, items, unit = example_inputs(model, workload)
        with torch.inference_mode():
            model(**inputs)
            pipe.send((sum(p.numel() for p in model.parameters()), unit))
            while pipe.recv() == "run":
                pipe.send(items * _calls_per_second(lambda: model(**inputs), workload.device))
        pipe.send(_peak_memory(workload.device))
    except EOFError:
        return  # the parent gave up
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        pipe.send(error)


def _calls_per_second(call: Callable[[], object], device: str) -> float:
    calls, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < _MIN_SECONDS:
        call()
        calls += 1
        if device != "cpu":
            torch.cuda.synchronize()
    return calls / elapsed


def example_inputs(model: nn.Module, workload: Workload) -> tuple[dict[str, Tensor], int, str]:
    """Random inputs for a transformers model, how many items they are, and the unit of its throughput."""
    config = model.config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    name, batch, length = model.main_input_name, workload.batch, workload.length
    vocabulary = getattr(config, "vocab_size", 0)
    if name == "input_ids":
        limit = getattr(config, "max_position_embeddings", None) or length
        length = min(length, limit)
        ids = torch.randint(vocabulary, (batch, length), generator=generator)
        inputs, items, unit = {"input_ids": ids}, batch * length, "tokens/s"
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = ids
    elif name == "pixel_values":
        size = getattr(model.config, "image_size", 224)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        shape = (batch, getattr(model.config, "num_channels", 3), height, width)
        inputs, items, unit = {"pixel_values": torch.randn(shape, generator=generator)}, batch, "images/s"
    elif name == "input_values":
        inputs, items, unit = {"input_values": torch.randn(batch, 16000, generator=generator)}, batch, "seconds/s"
    else:
        raise ValueError(f"bench runs models that take input_ids, pixel_values or input_values, not {name}")
    dtype = next(p.dtype for p in model.parameters())
    return {k: v.to(workload.device, dtype if v.is_floating_point() else None) for k, v in inputs.items()}, items, unit


def _peak_memory(device: str) -> int:
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    # Linux counts kilobytes, macOS bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
