#!/usr/bin/env bash
# Everything that a GPU can tell: benchmarks/run_gpu.py says what.
out=$(realpath -m "${@: -1}") && cd "$(dirname "$0")/.." && PYTHONPATH=$PWD exec "${PYTHON:-python3}" -m benchmarks.run_gpu "${@:1:$#-1}" "$out"
