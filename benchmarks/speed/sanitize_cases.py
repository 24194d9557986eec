"""A few calls of the ops that reach every path and tail of their kernels, for compute-sanitizer."""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")  # so that every tensor has bounds of its own

import torch

from tests.common.ops import DTYPES, OPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--few", action="store_true", help="two problems of each op, in bfloat16")
    given = parser.parse_args()
    device, calls = given.device, 0
    problems = [(tested.op, case) for tested in OPS for case in tested.gradients[: 2 if given.few else None]]
    for op, case in problems:
        for dtype in (torch.bfloat16,) if given.few else DTYPES:
            for training in (False, True):
                y = op(*case.tensors(dtype, device, requires_grad=training))
                if training:
                    y.sum().backward()
                calls += 1
    if device != "cpu":
        torch.cuda.synchronize()
    print(f"{calls} calls on {device}")


if __name__ == "__main__":
    main()
