"""Small models and inputs that several test files use; everything is drawn from a fixed seed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.pytorch_utils import Conv1D

WIDTH, VOCAB = 32, 64


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """The module that `build` makes, the same at every call, with all biases and norms drawn too, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1 and parameter.is_floating_point():
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def with_statistics(model: nn.Module) -> nn.Module:
    """The model with running statistics as after training, not the mean 0 and variance 1 of a new batch norm."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            noise = draw(2, module.num_features)
            module.running_mean.copy_(0.1 * noise[0])
            module.running_var.copy_((0.2 * noise[1]).exp())
    return model


def tokens(*shape: int) -> Tensor:
    return torch.randint(2, VOCAB, shape, generator=torch.Generator().manual_seed(1))


def mlp(depth: int = 3) -> nn.Sequential:
    return seeded(lambda: nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(depth))))


class SharedLayer(nn.Module):
    """One Linear under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleDict({"again": self.first, "other": nn.Linear(WIDTH, WIDTH)})

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks["other"](self.blocks["again"](torch.tanh(self.first(x))))


class TiedLM(nn.Module):
    """A Linear head whose weight is the Embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.body = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embedding(ids))))


class Mixed(nn.Module):
    """Convolutions, grouped ones among them, a batch norm, a transformers Conv1D and a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(16, WIDTH, 3, padding=1)
        self.norm = nn.BatchNorm2d(WIDTH)
        self.grouped = nn.Conv2d(WIDTH, 64, 3, stride=2, groups=2, padding_mode="reflect", padding=1)
        self.depthwise = nn.Conv2d(64, 64, 3, padding=1, groups=64)
        self.mixer = Conv1D(WIDTH, 64)
        self.head = nn.Linear(WIDTH, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        return self.head(torch.relu(self.mixer(self.depthwise(self.grouped(x)).mean((2, 3)))))


_TEXT = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": VOCAB,
    "max_position_embeddings": 32,
}
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
HF_MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**_TEXT)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(n_embd=WIDTH, n_layer=2, n_head=2, vocab_size=VOCAB, n_positions=32, bos_token_id=1, eos_token_id=1)
    ),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(d_model=WIDTH, d_ff=64, d_kv=16, num_heads=2, num_layers=2, vocab_size=VOCAB, decoder_start_token_id=0)
    ),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(**_TEXT, **_SPECIAL, num_key_value_heads=2, tie_word_embeddings=True)
    ),
    "vit": lambda: ViTForImageClassification(ViTConfig(**_TEXT, image_size=16, patch_size=4, num_channels=3)),
}


def hf_model(name: str) -> nn.Module:
    return seeded(HF_MODELS[name])


def hf_inputs(model: nn.Module) -> dict[str, Tensor]:
    if model.main_input_name == "pixel_values":
        return {"pixel_values": draw(2, 3, 16, 16, dtype=model.dtype)}
    inputs = {"input_ids": tokens(2, 8)}
    return inputs | ({"decoder_input_ids": tokens(2, 4)} if model.config.is_encoder_decoder else {})


@torch.no_grad()
def hf_outputs(model: nn.Module) -> Tensor:
    """The first output of a transformers model on fixed inputs."""
    return model(**hf_inputs(model))[0]


def fingerprint(model: nn.Module) -> dict[str, object]:
    """Everything that surgery could change: module types, and the bits, dtypes and flags of the state."""
    return {
        "types": {name: type(module) for name, module in model.named_modules(remove_duplicate=False)},
        "state": {
            name: (value.dtype, value.shape, None if value.is_meta else value.detach().clone())
            for name, value in model.state_dict().items()
        },
        "flags": {name: (p.requires_grad, id(p)) for name, p in model.named_parameters(remove_duplicate=False)},
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
    }


def assert_untouched(model: nn.Module, before: dict[str, object]) -> None:
    after = fingerprint(model)
    for key in ("types", "flags", "attributes"):
        assert after[key] == before[key]
    assert_same_state(after["state"], before["state"])


def assert_same_state(one: dict, other: dict) -> None:
    """The same names, shapes, dtypes and bits (NaN equals NaN)."""
    assert one.keys() == other.keys()
    for name, (dtype, shape, value) in one.items():
        assert (dtype, shape) == other[name][:2], name
        assert value is None or torch.equal(
            value.contiguous().view(-1).view(torch.uint8), other[name][2].contiguous().view(-1).view(torch.uint8)
        ), name
