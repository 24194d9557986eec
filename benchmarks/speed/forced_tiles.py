"""Every kernel family and every tile that this device can run, once, beside PyTorch in fp64: what is wrong.

python -m benchmarks.speed.forced_tiles --device cuda --out FILE [--library build/cmake/libshrank_rehearsal.so]

`--library`: native code for the CPU, loaded in the extension's place.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--library", type=Path)
    parser.add_argument("--few", action="store_true", help="tiles of one rank, for rehearsals")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    if given.library:
        torch.ops.load_library(str(given.library))
    from shrank.ops import self_check

    checked = dict(self_check.check(given.device))
    ranks = (56,) if given.few else (56, 88, 120, 184, 248)  # each below a tile's
    halves = (torch.bfloat16, torch.float16)
    tiles = {name: wrong for dtype in halves for name, wrong in _tiles(dtype, given.device, ranks)}
    given.out.write_text(json.dumps({"families": checked, "tiles": tiles}, indent=1))
    wrong = {name: reason for name, reason in (checked | tiles).items() if reason}
    for name, reason in wrong.items():
        print(f"{name}: {reason}")
    print(f"{len(checked) + len(tiles) - len(wrong)} of {len(checked) + len(tiles)} right on {given.device}")
    return int(bool(wrong))


def _tiles(dtype: torch.dtype, device: str, ranks: tuple[int, ...]):
    from shrank.measuring.ways import failure, ways
    from shrank.ops.conv import CONV
    from shrank.ops.gated import GATED
    from shrank.ops.linear import LINEAR
    from shrank.ops.pivoted import PIVOTED
    from shrank.ops.truth import Truth
    from tests.common.conv_cases import ConvCase
    from tests.common.gated_cases import GatedCase
    from tests.common.linear_cases import LinearCase
    from tests.common.pivoted_cases import PivotedCase

    for rank in ranks:
        conv_case = ConvCase((9, 7), (3, 3), 16, 136, rank, padding=(1, 1), activation="gelu", residual=True, last=True)
        many, few = (LinearCase((M,), 200, 264, rank, True, "gelu", True) for M in (133, 37))
        many_gated, few_gated = (GatedCase((M,), 200, 264, rank - 16, rank) for M in (133, 37))
        many_pivoted, few_pivoted = (PivotedCase((M,), 200, 264, rank, "both", "gelu", True) for M in (133, 37))
        cases = {
            LINEAR: (many, few),
            GATED: (many_gated, few_gated),
            PIVOTED: (many_pivoted, few_pivoted),
            CONV: (conv_case,),
        }
        for op, case in ((op, case) for op, of_op in cases.items() for case in of_op):
            arguments = case.tensors(dtype, device)
            truth = Truth(op.by_pytorch, arguments)
            for way in ways(op, arguments, 1000):
                if case in (few, few_gated, few_pivoted) and way.kernel != "shrink_expand":
                    continue  # the same tiles as for many rows
                name = f"{op.name} rank {rank} {str(dtype).removeprefix('torch.')} {way}"
                yield name, failure(op, arguments, way, truth)
        for probe in _backward_probes(rank):
            yield f"{probe.name(dtype)} rank {rank} {probe.grid}", probe.failure(dtype, device)


def _backward_probes(rank: int):
    """The tiles of csrc/select/linear_tile.h on which a gradient of this rank may run."""
    from shrank.ops.gated import GATED
    from shrank.ops.linear import LINEAR
    from shrank.ops.pivoted import PIVOTED
    from shrank.ops.probes import BackwardProbe, GatedBackwardProbe, PivotedBackwardProbe

    pivoted = (torch.Size((133, 200)), torch.Size((rank, 200)), torch.Size((264 - rank, rank)))
    sizes = (torch.Size((133, rank)), torch.Size((264, rank)))
    gate = (torch.Size((133, rank - 16)), torch.Size((264, rank - 16)))
    for max_rank in (0, 64, 96, 128, 256):
        if max_rank == 0 or max_rank >= rank:
            yield BackwardProbe(LINEAR, "backward", "fused", sizes, grid=(64, max_rank, 2))
            if max_rank != 96:
                yield GatedBackwardProbe(GATED, "backward", "fused", gate + sizes, grid=(64, max_rank, 2))
                yield PivotedBackwardProbe(PIVOTED, "backward", "fused", pivoted, grid=(64, max_rank, 2))


if __name__ == "__main__":
    raise SystemExit(main())
