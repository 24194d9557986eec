"""Data in files: texts, and images or sounds with the texts that belong to them."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .media import IMAGES, SOUNDS

KEYS = ("text", "target", "image", "audio")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Example:
    """What one call may be made of; `target` is what the decoder of an encoder-decoder is to say, `origin` the place in
    the data that messages name."""

    origin: str
    text: str | None = None
    target: str | None = None
    image: Path | None = None
    audio: Path | None = None


def read_examples(path: str | os.PathLike) -> list[Example]:
    """The examples of a file or folder, in order.

    path: a .jsonl file, whose lines are objects with any of `text`, `target`, `image` and `audio` (paths relative to
    the file); a folder of images or sounds, with their captions or transcripts beside them (name.txt beside name.jpg);
    one image or sound; any other file holds texts, one a paragraph. Raises ValueError or OSError, with file, line and
    byte, where something cannot be read or is missing.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if path.is_dir():
        examples = list(_of_folder(path))
    elif suffix in IMAGES | SOUNDS:
        examples = [_of_media([path])]
    elif suffix == ".jsonl":
        examples = [
            _of_line(line, number, path) for number, line in enumerate(_read(path).split("\n"), 1) if line.strip()
        ]
    elif suffix == ".json":
        raise ValueError(f"{path}: is no .jsonl file: write one JSON object a line, and name the file so")
    else:
        texts = [" ".join(paragraph.split()) for paragraph in _read(path).split("\n\n")]
        examples = [Example(f"{path}, text {number}", text) for number, text in enumerate(filter(None, texts), 1)]
    if not examples:
        raise ValueError(f"{path}: holds no text")
    return examples


def read_texts(path: str | os.PathLike) -> list[str]:
    """The texts of a file; ValueError names the first example without one."""
    examples = read_examples(path)
    if missing := [x.origin for x in examples if x.text is None]:
        raise ValueError(f"{missing[0]}: has no text")
    return [x.text for x in examples]


def _read(path: Path) -> str:
    """The file's text, with lines that end in a line feed; ValueError names the byte that is no UTF-8."""
    content = path.read_bytes()
    start = len(_BYTE_ORDER_MARK) if content.startswith(_BYTE_ORDER_MARK) else 0
    try:
        text = content[start:].decode("utf-8")
    except UnicodeDecodeError as error:
        position = start + error.start
        line = content.count(b"\n", 0, position) + 1
        raise ValueError(
            f"{path}: is not UTF-8: byte 0x{content[position]:02x} at position {position} (line {line}); "
            "iconv -f latin1 -t utf-8 converts a file in Latin-1"
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _of_line(line: str, number: int, path: Path) -> Example:
    origin = f"{path}, line {number}"
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{origin}: is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{origin}: must be a JSON object, got {type(found).__name__}")
    parts = {key: found[key] for key in KEYS if found.get(key) is not None}
    if not parts:
        raise ValueError(f"{origin}: has none of {', '.join(KEYS)}, but {', '.join(map(str, found)) or 'nothing'}")
    for key, value in parts.items():
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{origin}: {key} must be a string that is not empty, got {value!r:.80}")
    for key in parts.keys() & {"image", "audio"}:
        parts[key] = path.parent / parts[key]
        if not parts[key].is_file():
            raise ValueError(f"{origin}: {key} {parts[key]}: no such file")
    return Example(origin, **parts)


def _of_folder(folder: Path) -> Iterable[Example]:
    """One example for all files of one name."""
    together = defaultdict(list)
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in IMAGES | SOUNDS and path.is_file() and not path.name.startswith("."):
            together[path.with_suffix("")].append(path)
    if not together:
        raise ValueError(
            f"{folder}: holds no images ({' '.join(sorted(IMAGES))}) and no sounds "
            f"({' '.join(sorted(SOUNDS))}); give a file of texts itself"
        )
    for paths in together.values():
        kinds = [path.suffix.lower() in IMAGES for path in paths]
        if len(kinds) > len(set(kinds)):  # cat.jpg and cat.png are two examples
            yield from (_of_media([path]) for path in paths)
        else:
            yield _of_media(paths)


def _of_media(paths: list[Path]) -> Example:
    """The example of an image, a sound or both, with the text beside them."""
    parts = {"image" if path.suffix.lower() in IMAGES else "audio": path for path in paths}
    beside = paths[0].with_suffix(".txt")
    if beside.is_file():
        parts["text"] = " ".join(_read(beside).split())
        if not parts["text"]:
            raise ValueError(f"{beside}: holds no text")
    return Example(str(paths[0]), **parts)
