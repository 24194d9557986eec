"""Memory and time of a streamed compression: python -m benchmarks.speed.bench_streaming FOLDER [--blocks 32] ...

Makes a random model of the shape of Mistral 7B in FOLDER/dense, in bf16 and shard by shard, so that making it needs no
memory either. Then another process compresses it into FOLDER/small, while this one watches how much memory that process
has, and which of its sweeps it is in. All blocks run forward and back; layers that match --measure are observed, and
those that match --replace get spectra and factors, as the eigenvectors of all of them take a day on two cores.

RssAnon is what the process holds: without swap nothing takes it away, and a limit on memory ends the process for it.
RssFile are pages of mapped files that nobody wrote to, which the kernel takes away where memory is short. With
--squeeze this does so all the time (MADV_PAGEOUT), and VmRSS shows what the process needs then.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import MistralConfig

from benchmarks.provenance import RESULTS, provenance

_STD, _TEXTS = 0.02, 2
_EVERY = 0.1  # seconds
_PEAKS = ("VmRSS", "RssAnon", "RssFile")
_REPLACED = ("self_attn.k_proj", "mlp.up_proj")
_PROCESS_MADVISE, _PAGEOUT = 440, 21  # of Linux since 5.10


def make(folder: Path, blocks: int) -> None:
    """Write the model, a block at a time."""
    config = MistralConfig(num_hidden_layers=blocks, architectures=["MistralForCausalLM"], dtype="bfloat16")
    folder.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(_parts(config)):
        file = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config.save_pretrained(folder)


def _parts(config: MistralConfig) -> Iterator[dict[str, Tensor]]:
    width, inner, words = config.hidden_size, config.intermediate_size, config.vocab_size
    keys = width // config.num_attention_heads * config.num_key_value_heads
    shapes = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32).mul_(_STD).bfloat16()

    ones = torch.ones(width, dtype=torch.bfloat16)
    for number in range(config.num_hidden_layers):
        norms = {f"{name}_layernorm": ones.clone() for name in ("input", "post_attention")}
        found = {name: drawn(*shape) for name, shape in shapes.items()} | norms
        yield {f"model.layers.{number}.{name}.weight": tensor for name, tensor in found.items()}
    yield {"model.embed_tokens.weight": drawn(words, width), "model.norm.weight": ones}
    yield {"lm_head.weight": drawn(words, width)}


def run(folder: Path, measure: str, replaced: list[str], tokens: int, anchored: float) -> None:
    """Compress the model; in a process of its own."""
    import shrank

    generator = torch.Generator().manual_seed(1)
    data = [{"input_ids": torch.randint(0, 32000, (1, tokens), generator=generator)} for _ in range(_TEXTS)]
    first, *others = replaced
    # A spectrum of one layer; the largest gets the rank that it has where 0.6 of its weights are kept.
    rank = {first: shrank.Energy(0.5)} | dict.fromkeys(others, 0.6) | {"*": None}
    source, how = shrank.Checkpoint(folder / "dense"), {"calibrate": data, "anchored": anchored, "include": measure}
    done = shrank.auto_fact(source, rank, stream=folder / "small", **how).shrank_plan
    print(json.dumps({layer.fqn: layer.rank for layer in done.low_rank}))


class _Span(ctypes.Structure):
    _fields_ = [("start", ctypes.c_void_p), ("size", ctypes.c_size_t)]


def squeeze(process: int) -> None:
    """Take the pages of mapped files from a process, as the kernel does where memory is short."""
    handle = os.pidfd_open(process)
    for line in Path(f"/proc/{process}/maps").read_text().splitlines():
        if "/" in line:
            start, stop = (int(end, 16) for end in line.split()[0].split("-"))
            span = ctypes.byref(_Span(start, stop - start))
            ctypes.CDLL(None).syscall(_PROCESS_MADVISE, handle, span, ctypes.c_size_t(1), _PAGEOUT, 0)
    os.close(handle)


def watched(command: list[str], work: Path, squeezed: bool) -> dict[str, object]:
    """Run a command; its peaks of memory in MiB and its seconds, for each part of the run."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    parts: dict[str, dict[str, float]] = {}
    while process.poll() is None:
        started = time.monotonic()
        status = Path(f"/proc/{process.pid}/status").read_text()
        now = {line.split()[0].rstrip(":"): int(line.split()[1]) / 1024 for line in status.splitlines() if "kB" in line}
        if squeezed:
            squeeze(process.pid)
        time.sleep(_EVERY)
        for part in {_part(work), "whole"}:
            known = parts.setdefault(part, {"seconds": 0.0})
            known["seconds"] += time.monotonic() - started
            known |= {name: max(known.get(name, 0.0), now.get(name, 0.0)) for name in _PEAKS}
    if process.returncode:
        raise SystemExit(f"the run ended with exit code {process.returncode}")
    return {"parts": parts, "ranks": json.loads(process.stdout.read().splitlines()[-1])}


def _part(work: Path) -> str:
    """The part that a run is in, by what it has written."""
    for part, file in (("fitting", "plan.json"), ("spectra", "spectra"), ("back", "gradients"), ("forward", "visits")):
        if (work / file).exists():
            return part
    return "start and end"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64, help="of each of two texts")
    parser.add_argument("--measure", default="model.layers.[01].*")
    parser.add_argument("--replace", nargs="*", default=[f"model.layers.0.{n}" for n in _REPLACED])
    parser.add_argument("--anchored", type=float, default=0.0)
    parser.add_argument("--squeeze", action="store_true", help="take the pages of files away all the time")
    parser.add_argument("--out", type=Path, default=RESULTS / "streaming.json")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        run(given.folder, given.measure, given.replace, given.tokens, given.anchored)
        return
    if not (given.folder / "dense").exists():
        make(given.folder / "dense", given.blocks)
    size = sum(file.stat().st_size for file in (given.folder / "dense").glob("*.safetensors"))
    about = provenance("cpu")
    command = [sys.executable, "-m", "benchmarks.speed.bench_streaming", *sys.argv[1:], "--inside"]
    found = watched(command, given.folder / "small.streaming", given.squeeze)
    load = {"load averages at the end": os.getloadavg()}
    settings = {name: getattr(given, name) for name in ("blocks", "measure", "anchored", "squeeze")}
    settings |= {"tokens": _TEXTS * given.tokens, "bytes": size}
    given.out.write_text(json.dumps({"about": about, **load, **settings, **found}, indent=1) + "\n")
    shutil.rmtree(given.folder)


if __name__ == "__main__":
    main()
