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
    device = parser.parse_args().device
    calls = 0
    for op, case in [(tested.op, case) for tested in OPS for case in tested.gradients]:
        for dtype in DTYPES:
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
