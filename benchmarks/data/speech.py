"""Telephone prompts with transcripts (Debian's asterisk-core-sounds-en, CC BY-SA 3.0), and word error rates."""

from __future__ import annotations

import gzip
import os
import re
import wave
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from scipy.signal import resample_poly

RATE = 16000
_TRANSCRIPTS = "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"
_SOUNDS = "usr/share/asterisk/sounds/en_US_f_Allison"
_FEWEST_WORDS = 6
_SPELLINGS = {"mr": "mister", "mrs": "missus", "dr": "doctor", "ok": "okay"}
_NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()


@dataclass(frozen=True)
class Prompt:
    name: str
    samples: np.ndarray  # at RATE, mono, float32
    text: str


@cache
def prompts(split: str) -> list[Prompt]:
    """Prompts of at least six words: every second one is "calibration", the others are "test"."""
    root = Path(os.environ.get("SHRANK_SPEECH", "/"))
    if not (root / _TRANSCRIPTS).exists():
        raise FileNotFoundError(
            f"{root / _TRANSCRIPTS} is missing: in an empty folder, `apt-get download asterisk-core-sounds-en "
            "asterisk-core-sounds-en-wav`, `dpkg -x` both there, and let SHRANK_SPEECH name it"
        )
    with gzip.open(root / _TRANSCRIPTS, "rt", encoding="utf8", errors="replace") as file:
        lines = file.read().splitlines()
    found = sorted(
        (name, text) for name, text in map(parse, lines) if name and (root / _SOUNDS / f"{name}.wav").exists()
    )
    return [
        Prompt(name, _read(root / _SOUNDS / f"{name}.wav"), text)
        for name, text in found[{"calibration": 0, "test": 1}[split] :: 2]
    ]


def parse(line: str) -> tuple[str, str]:
    """(name, transcript) of a line of the list; ('', '') for comments, notes, digits and short prompts."""
    name, colon, text = (part.strip() for part in line.partition(":"))
    usable = (
        colon
        and not line.startswith(";")
        and re.match(r"^[\w\-/]+$", name)
        and (not re.search(r"[\[\]<>(){}0-9]", text) and len(text.split()) >= _FEWEST_WORDS)
    )
    return (name, text) if usable else ("", "")


def word_error_rate(pairs: Iterable[tuple[str, str]]) -> float:
    """Insertions, deletions and substitutions per word of the reference; pairs of (reference, hypothesis)."""
    pairs = [(words(reference), words(hypothesis)) for reference, hypothesis in pairs]
    return sum(distance(r, h) for r, h in pairs) / sum(len(r) for r, _ in pairs)


def words(text: str) -> list[str]:
    """Lower-case words without punctuation, small numbers spelled out."""
    text = text.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'").replace("-", " ")
    text = re.sub(r"[^a-z0-9' ]", " ", text.replace("voice mail", "voicemail"))
    plain = (_SPELLINGS.get(word.strip("'"), word.strip("'")) for word in text.split())
    return [_NUMBERS[int(word)] if word.isdigit() and int(word) < len(_NUMBERS) else word for word in plain if word]


def distance(a: list[str], b: list[str]) -> int:
    """Fewest insertions, deletions and substitutions that turn one list into the other (Levenshtein)."""
    above = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
        above = row
    return above[-1]


def _read(path: Path) -> np.ndarray:
    with wave.open(str(path)) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), np.int16).astype(np.float32) / 32768
        rate, channels = file.getframerate(), file.getnchannels()
    samples = samples.reshape(-1, channels).mean(1)
    common = np.gcd(RATE, rate)
    return resample_poly(samples, RATE // common, rate // common).astype(np.float32)
