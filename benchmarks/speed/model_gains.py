"""What the native kernels gain over two calls of cuBLAS or cuDNN and PyTorch's own activation, by select's model of a
GPU.

python -m benchmarks.speed.model_gains [--gpu h200] [--activation gelu] [--conv]
python -m benchmarks.speed.model_gains --docs    # writes the tables of docs/csrc/predicted.md
Not a measurement: bench_low_rank_linear.py and bench_low_rank_conv.py measure. A dash: the model takes the two calls.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.speed.low_rank_conv import LAYERS, Case, explained
from shrank.measuring.explain import explain, parse_conv

TOKENS = (1, 16, 128, 512, 1024, 4096, 16384, 65536)
LINEAR_LAYERS = [
    (768, 768, 48),
    (768, 768, 96),
    (768, 768, 192),
    (768, 3072, 96),
    (3072, 768, 96),
    (1024, 1024, 128),
    (2048, 2048, 128),
    (4096, 4096, 128),
    (4096, 4096, 256),
    (4096, 14336, 256),
    (4096, 4096, 512),
]


PAGE = Path(__file__).parents[2] / "docs" / "csrc" / "predicted.md"
# Of the page: convolutions as --conv takes them, with the padding; linear layers by tokens, inputs, outputs and rank.
PAGE_CONVOLUTIONS = {
    "ResNet 56x56": ("32,64,56x56,3x3,64,16", "1"),
    "ResNet 28x28": ("32,128,28x28,3x3,128,32", "1"),
    "ResNet 14x14": ("32,256,14x14,3x3,256,64", "1"),
    "ResNet 7x7": ("32,512,7x7,3x3,512,128", "1"),
    "UNet 64x64": ("8,320,64x64,3x3,320,80", "1"),
    "image 128x128": ("8,128,128x128,3x3,128,32", "1"),
    "ResNet 1x1": ("32,64,56x56,1x1,256,16", "0"),
}
PAGE_LINEAR = {
    "BERT up": (16384, 768, 3072, 96),
    "BERT square": (16384, 768, 768, 192),
    "Llama square": (16384, 4096, 4096, 256),
    "Llama up": (16384, 4096, 14336, 512),
    "one token": (1, 4096, 4096, 256),
}
# Gate and value have this rank each.
PAGE_GATED = {
    "Llama-8B": (4096, 4096, 14336, 256),
    "Llama-8B, 16384": (16384, 4096, 14336, 256),
    "Llama-8B, one token": (1, 4096, 14336, 256),
    "SmolLM2": (4096, 576, 1536, 64),
    "ModernBERT": (16384, 768, 1152, 96),
}
PATHS = {
    "shrink_expand": "two kernels that stream the factors",
    "fused": "one kernel",
    "conv_expand": "cuDNN and one kernel",
    "two_convs_epilogue": "two convolutions and a pass",
    "two_convs": "two convolutions",
    "gemm_expand": "cuBLAS and one kernel",
    "two_gemms_epilogue": "two GEMMs and a pass",
    "two_gemms": "two GEMMs",
}


def page_tables(gpu: str = "h200") -> dict[str, str]:
    """The tables of the page, by the names of their places."""
    convolutions = []
    for name, (layer, padding) in PAGE_CONVOLUTIONS.items():
        batch, channels, image, kernel, outputs, rank = layer.split(",")
        told = explain(parse_conv(layer, padding=padding), gpu=gpu)
        convolutions.append([name, batch, channels, image, kernel, outputs, rank, *_times(told)])
    linear = [
        [name, *map(str, sizes), *_times(explain(sizes, gpu=gpu, activation="gelu"))]
        for name, sizes in PAGE_LINEAR.items()
    ]
    gated = [
        [name, *map(str, sizes), *_times(explain(sizes, gpu=gpu, activation="silu", bias=False, gate=sizes[3]))]
        for name, sizes in PAGE_GATED.items()
    ]
    heads = {
        "convolutions": "convolution batch channels image kernel outputs rank dense two_convolutions",
        "linear": "layer tokens inputs outputs rank dense two_GEMMs_and_a_pass",
        "gated": "layer tokens inputs outputs rank dense four_GEMMs_and_two_passes",
    }
    return {
        place: _markdown([*(head.replace("_", " ") for head in heads[place].split()), "chosen path", "its time"], rows)
        for place, rows in (("convolutions", convolutions), ("linear", linear), ("gated", gated))
    }


def _times(told: dict) -> list[str]:
    """Dense, PyTorch's own two calls with the least that comes after them, and the choice."""
    own = min(c["microseconds"] for c in told["candidates"] if c["legal"] and c["kernel"].startswith("two_"))
    decision = told["decision"]
    times = [told["dense_us"], own, decision["microseconds"]]
    dense, two, chosen = (f"{each:.1f}" for each in times)
    return [dense, two, PATHS[decision["kernel"]], chosen]


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    sides = ["---" if name in (head[0], "chosen path") else "---:" for name in head]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, sides, *rows))


def page(text: str) -> str:
    """The page with these tables between its marks."""
    for place, table in page_tables().items():
        begin, end = f"<!-- predicted {place} -->\n", "<!-- end -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{table}\n\n{end}{rest.split(end, 1)[1]}"
    return text


def gain(M: int, layer: tuple[int, int, int], gpu: str, activation: str) -> tuple[float, str]:
    """Predicted time of two calls over that of what select takes, and what that is."""
    told = explain((M, *layer), gpu=gpu, activation=activation)
    two = next(c["microseconds"] for c in told["candidates"] if c["kernel"] == "two_gemms")
    return two / told["decision"]["microseconds"], told["decision"]["kernel"]


def table(gpu: str, activation: str) -> Table:
    shown = Table(title=f"predicted gain over two calls, {gpu}, bf16, activation {activation}")
    for column in ("K, N, R", *(f"M {M}" for M in TOKENS)):
        shown.add_column(column, justify="right")
    for layer in LINEAR_LAYERS:
        gains = [gain(M, layer, gpu, activation) for M in TOKENS]
        shown.add_row(
            str(layer)[1:-1],
            *("-" if kernel == "two_gemms" else f"{ratio:.2f} {kernel.split('_')[-1]}" for ratio, kernel in gains),
        )
    return shown


def conv_table(gpu: str) -> Table:
    """Convolutions, channels last: plain and with a GELU."""
    shown = Table(title=f"predicted gain over two convolutions, {gpu}, bf16, channels last")
    for column in ("layer", "R", "plain", "with a GELU", "times the floor", "times dense"):
        shown.add_column(column, justify="right")
    for layer in LAYERS:
        plain, ended = (explained(Case(replace(layer, activation=end), "bfloat16"), gpu) for end in ("none", "gelu"))
        gains = []
        for told in (plain, ended):
            two = next(c["microseconds"] for c in told["candidates"] if c["kernel"] == "two_convs")
            chosen = told["decision"]["kernel"]
            gains.append("-" if chosen == "two_convs" else f"{two / told['decision']['microseconds']:.2f} {chosen}")
        took = ended["decision"]["microseconds"]
        # A depthwise-separable block replaces no dense layer of its cost.
        over_dense = f"{ended['dense_us'] / took:.2f}" if layer.groups == 1 else ""
        shown.add_row(layer.model, str(layer.rank), *gains, f"{took / ended['floor_us']:.2f}", over_dense)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", default="h200")
    parser.add_argument("--activation", default="gelu", help="of the linear layers")
    parser.add_argument("--conv", action="store_true", help="convolutions instead of linear layers")
    parser.add_argument("--docs", action="store_true", help=f"write the tables of {PAGE.name}")
    given = parser.parse_args()
    if given.docs:
        PAGE.write_text(page(PAGE.read_text()))
        return
    Console().print(conv_table(given.gpu) if given.conv else table(given.gpu, given.activation))


if __name__ == "__main__":
    main()
