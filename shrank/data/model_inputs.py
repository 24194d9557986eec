"""What a transformers model takes and gives, read off its class: no table of names of models."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from torch import nn

# By the argument of forward that it becomes.
_KINDS = {
    "input_ids": "text",
    "pixel_values": "image",
    "flattened_patches": "image",
    "input_features": "audio",
    "input_values": "audio",
}
_ANY = "inputs"  # the main input of classes that wrap any encoder
ELSEWHERE = "give shrank.calibrate and shrank.heal the batches themselves"
_EXAMPLES = {"text": '"text": "a cat on a roof"', "image": '"image": "cat.jpg"', "audio": '"audio": "cat.wav"'}


@dataclass(frozen=True)
class ModelInputs:
    """What a model takes of text, image and audio, and which of them it cannot do without.

    arguments, required: of its forward. decoder: whether it has a decoder of its own, which takes tokens. labels:
    whether that predicts the next token. joins_images: whether images stand within its texts.
    """

    model: str
    arguments: frozenset[str]
    required: frozenset[str]
    takes: frozenset[str]
    needs: frozenset[str]
    decoder: bool
    labels: bool
    joins_images: bool

    @property
    def line(self) -> str:
        """A line of a .jsonl file with all that the model needs."""
        return "{" + ", ".join(part for kind, part in _EXAMPLES.items() if kind in self.needs) + "}"

    def arguments_of(self, kind: str) -> set[str]:
        """The arguments of forward that a text, an image or a sound may become."""
        return {name for name, of in _KINDS.items() if of == kind and name in self.arguments}


def inputs_of(model: nn.Module) -> ModelInputs:
    """What a model takes; ValueError if texts, images and sounds do not make it."""
    name, parameters = type(model).__name__, inspect.signature(model.forward).parameters
    takes = frozenset(kind for argument, kind in _KINDS.items() if argument in parameters)
    main = getattr(model, "main_input_name", None)
    if isinstance(main, str) and main in parameters and main != _ANY:
        first = {_KINDS[main]} if main in _KINDS else set()
    else:  # inherited, and of no meaning for this class; or any of what it takes
        first = set(takes) if isinstance(main, str) else set()
    if not first:
        told = main if not isinstance(main, str) or main in parameters else ", ".join(parameters)
        raise ValueError(f"{name} takes {told}, which no text, image or sound makes: {ELSEWHERE}")
    if name.endswith("ForMultipleChoice"):  # nothing else of the class says so
        raise ValueError(f"{name} takes several texts at once, which a file does not hold: {ELSEWHERE}")
    decoder, generates, inside = _has_decoder_of_tokens(model), predicts_next_token(model), _has_image_token(model)
    needs = set(first)
    if not decoder:
        needs |= takes & {"text"} if generates else takes
    elif inside:
        needs |= takes & {"text"}
    joins = {"text", "image"} <= takes and (inside or (generates and not (decoder and first == {"image"})))
    required = {x for x, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    return ModelInputs(
        name,
        frozenset(parameters),
        frozenset(required),
        takes,
        frozenset(needs),
        decoder,
        decoder and generates and "labels" in parameters,
        joins,
    )


def _has_image_token(model: nn.Module) -> bool:
    """Whether the model finds the places of images in its texts by a token."""
    config = getattr(model, "config", None)
    return any(hasattr(config, name) for name in ("image_token_id", "image_token_index"))


def _has_decoder_of_tokens(model: nn.Module) -> bool:
    """Whether the model has a decoder of its own; ValueError if that takes no tokens of a text."""
    parameters = inspect.signature(model.forward).parameters
    if _has_image_token(model) and not model.config.is_encoder_decoder:
        return False  # BLIP-2 takes language models of both kinds
    # Those that speak or make music: spectrograms, or codes of sound.
    others = [x for x in parameters if x.startswith("decoder_input_") and x != "decoder_input_ids"]
    says_text = "text" in _output_modalities(model)
    if "decoder_input_ids" in parameters and says_text:
        return True
    if "decoder_input_ids" in parameters or others:
        takes = ", ".join(others) or f"codes of {', '.join(_output_modalities(model))}"
        raise ValueError(f"{type(model).__name__}: its decoder takes {takes}, which no text makes: {ELSEWHERE}")
    return False


def _output_modalities(model: nn.Module) -> tuple[str, ...]:
    return tuple(getattr(model, "output_modalities", None) or ("text",))


def predicts_next_token(model: nn.Module) -> bool:
    """Whether the model's logits are for the tokens that follow."""
    can_generate = getattr(model, "can_generate", None)
    return can_generate is not None and can_generate() and "text" in _output_modalities(model)


def is_causal_language_model(model: nn.Module) -> bool:
    """Whether the model continues a text by itself, without a second input."""
    parameters = inspect.signature(model.forward).parameters
    return (
        predicts_next_token(model)
        and getattr(model, "main_input_name", None) == "input_ids"
        and "decoder_input_ids" not in parameters
    )


def require_next_token(model: nn.Module) -> None:
    """ValueError if the model has no next-token loss."""
    if not predicts_next_token(model):
        raise ValueError(
            f"{type(model).__name__} predicts no next token, which the loss 'lm' needs: leave the loss "
            "out, or give shrank.calibrate and shrank.heal a function"
        )


def require_causal_language_model(model: nn.Module, window: int) -> None:
    """ValueError if no perplexity of windows of so many tokens can be told of the model."""
    name = type(model).__name__
    if not is_causal_language_model(model):
        raise ValueError(
            f"{name} is no causal language model, whose perplexity could be told; `shrank compress "
            "--calibrate --report` shows the errors of the layers of any model"
        )
    if (most := positions(model)) is not None and window > most:
        raise ValueError(f"{name} has positions for {most} tokens, fewer than a window of {window}: --window {most}")


def positions(model: nn.Module, decoder: bool = False) -> int | None:
    """The most tokens of a text, or of the decoder's side, that the model has positions for; None if it counts
    none."""
    config = text_config(model, decoder)
    side = "decoder" if decoder else "encoder"
    names = [f"max_{side}_position_embeddings", "max_position_embeddings"]
    names = ["max_target_positions", *names] if decoder else names
    most = next((n for n in (getattr(config, name, None) for name in names) if isinstance(n, int) and n > 0), None)
    if most is None:
        return None
    # RoBERTa and its kin count positions from behind that of padding.
    taken = [
        m.padding_idx + 1
        for name, m in model.named_modules()
        if isinstance(m, nn.Embedding) and "position" in name and m.padding_idx is not None and m.num_embeddings == most
    ]
    return most - max(taken, default=0)


def text_config(model: nn.Module, decoder: bool = False) -> object:
    """The part of the model's configuration that is about a text's side."""
    own = getattr(model.config, "decoder" if decoder else "encoder", None)
    return own if hasattr(own, "get_text_config") else model.config.get_text_config()
