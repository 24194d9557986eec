"""Compressed models in vLLM itself: the tokens that transformers gives, or a refusal that says why.

`make serve-test` runs these, in an environment of their own with a vLLM for CPUs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.common.tolerances import assert_close
from tests.serving.served_models import continued, prompts, write

pytestmark = pytest.mark.serve
# One engine in this process, on a machine with any number of cores, which says no more than it must.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
)


@contextmanager
def engine(folder: Path, **options: object) -> Iterator[object]:
    """vLLM with this model, in this process."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    defaults = {"dtype": "float32", "skip_tokenizer_init": True, "max_model_len": 64, "max_num_seqs": 4}
    made = LLM(model=str(folder), **{**defaults, "enforce_eager": True, **options})
    try:
        yield made
    finally:
        made.llm_engine.engine_core.shutdown()
        del made
        cleanup_dist_env_and_memory()


def generated(made: object, **options: object) -> list[tuple[list[int], torch.Tensor]]:
    """The continuations of the prompts, and the log-probabilities of what was chosen."""
    from vllm import SamplingParams

    asked = SamplingParams(max_tokens=12, temperature=0, logprobs=1, detokenize=False, ignore_eos=True)
    outputs = made.generate([{"prompt_token_ids": ids} for ids in prompts()], asked, use_tqdm=False, **options)
    first = [output.outputs[0] for output in outputs]
    return [
        (list(x.token_ids), torch.tensor([at[t].logprob for at, t in zip(x.logprobs, x.token_ids, strict=True)]))
        for x in first
    ]


def assert_serves(folder: Path, model: nn.Module, **options: object) -> None:
    with engine(folder, **options) as made:
        found = generated(made)
    for (tokens, chosen), prompt in zip(found, prompts(), strict=True):
        wanted, its = continued(model, prompt)
        assert tokens == wanted
        assert_close(chosen, its)


@pytest.mark.parametrize("pivot", [False, True], ids=["plain", "pivoted"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma", "phi3"])
def test_tokens_are_those_of_transformers(family: str, pivot: bool, tmp_path: Path) -> None:
    assert_serves(tmp_path, write(family, tmp_path, pivot))


def test_compiled_graphs_give_the_same(tmp_path: Path) -> None:
    assert_serves(tmp_path, write("llama", tmp_path), enforce_eager=False)


def test_two_processes_give_the_same(tmp_path: Path) -> None:
    for number, (family, pivot) in enumerate([("qwen2", True), ("llama", False)]):
        folder = tmp_path / str(number)
        assert_serves(folder, write(family, folder, pivot), tensor_parallel_size=2)


def edited(folder: Path, change) -> Path:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"]["plan"]["layers"])
    path.write_text(json.dumps(config))
    return folder


def layer(layers: list[dict], end: str) -> dict:
    return next(each for each in layers if each["fqn"].endswith(end))


REFUSED = {
    "shape": (lambda x: layer(x, "0.self_attn.q_proj")["shape"].update(out_features=64), "the plan says 64x128"),
    "rank": (lambda x: layer(x, "0.self_attn.q_proj").update(rank=47), r"is \(48, 128\) in the files, wanted \(47"),
    "kind": (lambda x: layer(x, "0.self_attn.q_proj").update(kind="Conv1D"), "q_proj is a Conv1D"),
    "unknown": (lambda x: layer(x, "0.self_attn.q_proj").update(fqn="model.layers.9.x"), "lacks: model.layers.9.x"),
    "lacking": (lambda x: x.remove(layer(x, "1.self_attn.o_proj")), "o_proj: the files hold factors"),
    "lacking of a stack": (lambda x: x.remove(layer(x, "0.self_attn.q_proj")), "q_proj.led_unit.0.weight: the files"),
    "no plan": (lambda x: x.append({"fqn": 3}), "a layer of the plan must be"),
}


@pytest.mark.parametrize(("change", "says"), REFUSED.values(), ids=REFUSED)
def test_a_plan_that_does_not_fit_is_refused(change, says: str, tmp_path: Path) -> None:
    write("llama", tmp_path)
    with pytest.raises(ValueError, match=says), engine(edited(tmp_path, change)):
        pass
