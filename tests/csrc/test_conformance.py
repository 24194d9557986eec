"""Every instruction of csrc/arch in the emulator, held to what a GPU answered, if its answers are in
benchmarks/results/conformance-*.json; and to an independent computation anyway."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.csrc.expected import ANSWERS, disagreements

ROOT = Path(__file__).parents[2]
GOLDEN = sorted((ROOT / "benchmarks/results").glob("conformance-*.json"))
PROGRAM = ROOT / "csrc/conformance"
# Without a GPU's answers, only a reading of the PTX ISA speaks for the device's half of csrc/arch: the name says so.
CONFIRMATIONS = [pytest.param(path, id=path.stem) for path in GOLDEN] or [
    pytest.param(None, id="not_confirmed_on_hardware")
]


@pytest.fixture(scope="module")
def answered(dev: ModuleType) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Of each instruction: the words given, and the emulator's answer."""
    return {
        name: (np.array(words.input, dtype=np.uint32), np.array(words.output, dtype=np.uint32))
        for name, words in dev.conformance.run().items()
    }


def parsed(results: dict[str, list[str]]) -> dict[str, np.ndarray]:
    return {
        name: np.array([int(word, 16) for word in " ".join(rows).split()], dtype=np.uint32)
        for name, rows in results.items()
    }


def complaint(name: str, given: np.ndarray, got: np.ndarray, answer: np.ndarray) -> str:
    at = disagreements(name, given, got, answer)
    return (
        ""
        if not at.size
        else f"{name}: {at.size} of {got.size} words, first {at[0]}: "
        + (f"{got[at[0]]:#010x}, not {answer[at[0]]:#010x}" if got.shape == answer.shape else f"{got.size}")
    )


@pytest.mark.parametrize("golden", CONFIRMATIONS)
def test_the_emulator_answers_as_it_should(answered: dict, golden: Path | None) -> None:
    wrong = [complaint(name, given, got, ANSWERS[name](given)) for name, (given, got) in answered.items()]
    if golden:
        gpu = json.loads(golden.read_text())
        by_gpu = parsed(gpu["results"])
        assert not ANSWERS.keys() - by_gpu.keys(), "the GPU was not asked, or did not finish: ask again"
        wrong += [complaint(name, *answered[name], by_gpu[name]) for name in sorted(ANSWERS)]
    assert not [found for found in wrong if found]


@pytest.mark.parametrize("early", [False, True], ids=["late", "early"])
def test_the_answer_does_not_depend_on_the_order_of_events(dev: ModuleType, answered: dict, early: bool) -> None:
    for seed in range(4):
        again = dev.conformance.run(seed, early)
        assert not [name for name, (_, got) in answered.items() if again[name].output != got.tolist()]


def test_a_wrong_answer_is_seen(answered: dict) -> None:
    for name, (given, got) in answered.items():
        for bit in (22, 31):
            mistaken = got.copy()
            place = int(np.flatnonzero(got & 0x7FFFFFFF)[-1])  # no zero, whose sign an approximation may lose
            mistaken[place] ^= np.uint32(1 << bit)
            assert place in disagreements(name, given, mistaken, got), name
        assert disagreements(name, given, got[:-1], got).size


def functions_of_arch() -> set[str]:
    """The names of all device functions in the headers of csrc/arch."""
    declared = re.compile(r"SHRANK_(?:DEVICE|BOTH)\s+[\w:<>, ]+?[\s&*]+(\w+)(?:<\w+>)?\(")
    text = "".join(path.read_text() for path in (ROOT / "csrc/arch").glob("*.cuh"))
    return set(declared.findall(re.sub(r"//.*|#define SHRANK_(DEVICE|BOTH).*", "", text)))


def test_every_instruction_is_tried() -> None:
    functions = functions_of_arch()
    assert {"widen", "load", "store_shared", "multiply_add", "sync_warp", "position"} <= functions
    tried = set(re.findall(r"arch::(\w+)", "".join(path.read_text() for path in PROGRAM.glob("*.cuh"))))
    assert not functions - tried, "csrc/conformance tries no instruction of this name"


def test_the_table_and_the_answers_are_of_the_same_instructions(answered: dict) -> None:
    table = set(re.findall(r'visit\("([^"]+)"', (PROGRAM / "conformance.cuh").read_text()))
    assert table == answered.keys() == ANSWERS.keys()
