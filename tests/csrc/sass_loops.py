"""Loops of a kernel, read off its SASS: what a warp issues in one pass.

A loop is what lies between a label and a branch back to it. A slot is an instruction that issues, whether its guard
lets it act or not.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from shrank.ops.reference import ACTIVATIONS

from . import sass

_LABEL = re.compile(r"^(\.L_\w+):")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)(.*)")
_TARGET = re.compile(r"\((\.L_\w+)\)")
CONTROL = ("BRA", "BRX", "BSSY", "BSYNC", "CALL", "RET", "WARPSYNC", "JMP")


@dataclass(frozen=True)
class Instruction:
    """opcode: with its suffixes, such as STG.E.128; guarded: whether a predicate decides if it acts."""

    opcode: str
    guarded: bool
    target: str | None

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]


@dataclass(frozen=True)
class Loop:
    """What one pass issues, branches to elsewhere not taken.

    skipped: how many of these a branch within the loop can pass over, such as what a pass does only now and then.
    """

    body: tuple[Instruction, ...]
    skipped: int = 0

    def __getitem__(self, name: str) -> int:
        return self.counts[name]

    @property
    def counts(self) -> Counter[str]:
        return Counter(each.name for each in self.body)

    @property
    def slots(self) -> int:
        return len(self.body)

    @property
    def control(self) -> int:
        return sum(self.counts[name] for name in CONTROL)

    @property
    def rest(self) -> int:
        """Slots beside the products, the fragments they need, and the barrier."""
        return self.slots - self["HMMA"] - self["LDSM"] - self["BAR"]

    @property
    def until_first_fragment(self) -> int:
        """Slots from the barrier to the first fragment that is loaded behind it."""
        names = [each.name for each in self.body]
        return names.index("LDSM") - names.index("BAR")

    def guarded(self, name: str) -> int:
        return sum(each.name == name and each.guarded for each in self.body)


def loops(listing: str) -> list[Loop]:
    """The innermost loops of one function, in the order of their heads."""
    labels: dict[str, int] = {}
    code: list[Instruction] = []
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(code)
        elif found := _INSTRUCTION.match(line):
            target = _TARGET.search(found[3])
            code.append(Instruction(found[2], bool(found[1]), target and target[1]))
    spans = {
        (labels[each.target], i)
        for i, each in enumerate(code)
        if each.name == "BRA" and each.target in labels and labels[each.target] <= i
    }
    inner = sorted(a for a in spans if not any(a[0] <= b[0] and b[1] <= a[1] and a != b for b in spans))

    def skipped(first: int, last: int) -> int:
        """Branches of the loop that lead forward within it."""
        leaps = [(i, labels[code[i].target]) for i in range(first, last) if code[i].target in labels]
        return len({at for i, target in leaps if i < target <= last for at in range(i + 1, target)})

    return [Loop(tuple(code[first : last + 1]), skipped(first, last)) for first, last in inner]


@cache
def kernels(arch: str) -> dict[sass.Name, list[Loop]]:
    """The innermost loops of every matrix kernel of the extension for an architecture."""
    listing = sass.disassembled(arch)
    found = {}
    for part in sass.functions(listing):
        if name := sass.name_in(part.split("\n", 1)[0]):
            found[name] = loops(part)
    return found


def steps(arch: str, name: sass.Name) -> list[Loop]:
    """The loops that multiply panels while others are on their way: of the first stage, then of the second."""
    return [loop for loop in kernels(arch)[name] if loop["HMMA"] and loop["LDGSTS"]]


@dataclass(frozen=True)
class End:
    """What tests/csrc/ends.cu compiles: the end of a linear tile of 128 ranks, and what comes to its numbers."""

    rows: int
    activation: str
    bias: bool
    residual: bool


@dataclass(frozen=True)
class BackwardEnd:
    """The same of the backward kernel, of 64 rows, without bias."""

    activation: str
    sums: bool


_END = re.compile(r"WithEndILi(\d+)ELNS_10ActivationE(\d)ELi(\d)E")
_BACKWARD_END = re.compile(r"WithGradientILNS_10ActivationE(\d)ELb(\d)E")


@cache
def _tiles_of_ends(arch: str) -> dict[str, Loop]:
    """The loop over column tiles, its steps unrolled, of every kernel of tests/csrc/ends.cu, by the kernel's name."""
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "ends.cubin")
        source = Path(__file__).with_name("ends.cu")
        command = ["nvcc", "-std=c++17", "-O3", f"-arch={arch}", "-cubin", "-o", made, source]
        subprocess.run(command, check=True, capture_output=True)
        listing = subprocess.run([sass.tool("nvdisasm"), "-c", made], text=True, capture_output=True, check=True).stdout
    found = {}
    for part in sass.functions(listing):
        (found[part.split("\n", 1)[0]],) = (loop for loop in loops(part) if loop["HMMA"] and loop["STG"])
    return found


def ends(arch: str) -> dict[End, Loop]:
    return {
        End(int(named[1]), _activation(named[2]), *(bool(int(named[3]) & bit) for bit in (1, 2))): tile
        for name, tile in _tiles_of_ends(arch).items()
        if (named := _END.search(name))
    }


def backward_ends(arch: str) -> dict[BackwardEnd, Loop]:
    return {
        BackwardEnd(_activation(named[1]), named[2] == "1"): tile
        for name, tile in _tiles_of_ends(arch).items()
        if (named := _BACKWARD_END.search(name))
    }


def _activation(number: str) -> str:
    return list(ACTIVATIONS)[int(number)]
