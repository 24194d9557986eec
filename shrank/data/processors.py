"""What turns texts, images and sounds into a model's inputs: the processors in the folder or repository of a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

_LONGEST_CAUSE = 200  # characters; transformers lists every class that it knows


def load_tokenizer(source: str) -> Callable:
    """The tokenizer of a model; ValueError if it has none."""
    from transformers import AutoTokenizer

    tokenizer = _load(AutoTokenizer, source, "tokenizer")
    # Without a file transformers may make a tokenizer up, which knows special tokens and T5's a space.
    if len(tokenizer.get_vocab().keys() - {str(token) for token in tokenizer.added_tokens_decoder.values()}) < 2:
        raise ValueError(f"{source}: has no file with the vocabulary of a tokenizer, which texts need")
    return tokenizer


def load_image_processor(source: str) -> Callable:
    """The image processor of a model, the one that needs no torchvision; ValueError if there is none."""
    from transformers import AutoImageProcessor

    return _load(AutoImageProcessor, source, "image processor", backend="pil")


def load_feature_extractor(source: str) -> Callable:
    """The feature extractor of a model of sounds; ValueError if there is none."""
    from transformers import AutoFeatureExtractor

    return _load(AutoFeatureExtractor, source, "feature extractor")


def load_processor(source: str) -> Callable:
    """The processor that joins images to texts; ValueError if there is none."""
    from transformers import AutoProcessor, ProcessorMixin

    processor = _load(AutoProcessor, source, "processor", backend="pil")
    if not isinstance(processor, ProcessorMixin):
        raise ValueError(f"{source}: has a {type(processor).__name__} but no processor that joins images to texts")
    return processor


def _load(kind: type, source: str, what: str, **options: object) -> Callable:
    _check_files(Path(source))
    try:
        return kind.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError) as error:
        cause = next((line for line in str(error).splitlines() if line.strip()), "").split(". ")[0]
        raise ValueError(
            f"{source}: has no {what} that loads, which save_pretrained of that of the original model "
            f"writes there ({type(error).__name__}: {cause:.{_LONGEST_CAUSE}})"
        ) from error


def _check_files(folder: Path) -> None:
    """ValueError names a file of a folder that is no JSON object: transformers would fail on it in all sorts of
    ways."""
    for path in sorted({*folder.glob("*config.json"), *folder.glob("tokenizer.json")}):
        try:
            content = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: is no JSON: {error}") from error
        if not isinstance(content, dict) or (path.name == "tokenizer.json" and "model" not in content):
            raise ValueError(f"{path}: is not what transformers writes there: {content!s:.80}")
