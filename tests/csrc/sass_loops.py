"""Loops of a kernel, read off its SASS: what a warp issues in one pass.

A loop is what lies between a label and a branch back to it. A slot is an instruction that issues, whether its guard
lets it act or not.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import cache

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
    """What one pass issues, branches to elsewhere not taken."""

    body: tuple[Instruction, ...]

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
    inner = [a for a in spans if not any(a[0] <= b[0] and b[1] <= a[1] and a != b for b in spans)]
    return [Loop(tuple(code[first : last + 1])) for first, last in sorted(inner)]


@cache
def kernels(arch: str) -> dict[sass.Name, list[Loop]]:
    """The innermost loops of every matrix kernel of the extension for an architecture."""
    listing = sass.disassembled(arch)
    found = {}
    for part in re.split(r"^\s*\.section\s+\.text\.", listing, flags=re.MULTILINE)[1:]:
        if name := sass.name_in(part.split("\n", 1)[0]):
            found[name] = loops(part)
    return found


def steps(arch: str, name: sass.Name) -> list[Loop]:
    """The loops that multiply panels while others are on their way: of the first stage, then of the second."""
    return [loop for loop in kernels(arch)[name] if loop["HMMA"] and loop["LDGSTS"]]


def ends(arch: str, name: sass.Name) -> list[Loop]:
    """The loops that finish 8 numbers of y a pass, with every end that there is; by activation, once for 16 rows."""
    return [loop for loop in kernels(arch)[name] if loop["STG"] == 2 and loop["LDS"] and not loop["HMMA"]]
