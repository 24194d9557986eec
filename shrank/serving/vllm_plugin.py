"""vLLM's entry point: it calls `register` in every process before it reads a model's config."""

from __future__ import annotations

from importlib import import_module


def register() -> None:
    """Enter the quantization method "shrank", by which vLLM then serves what `save_pretrained` wrote."""
    import_module("shrank.serving.vllm_config")
