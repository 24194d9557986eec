"""`make mutants`: breaks the matrix kernels in one place at a time; the emulated tests must notice every time.

A rule rewrites one match of one line. What no test can notice, because nothing changes, is listed with the argument.
"""

from __future__ import annotations

import multiprocessing
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from shrank.ops import reference
from tests.common.tolerances import assert_close, assert_every_element_close

from .conftest import BUILD, load_module
from .emulated import conv, linear
from .mutation_rules import EQUIVALENT, RULES

ROOT = Path(__file__).parents[2]
WORK = ROOT / "build" / "mutants"
TIMEOUT = 120


@dataclass(frozen=True)
class Suite:
    """The launches of one family of kernels, the smallest first, and the object that has the kernels."""

    name: str
    runs: Callable[[], list]
    size: Callable[[object], int]
    failure_of: Callable[[ModuleType, object, bool], str | None]

    @property
    def object(self) -> str:
        return f"csrc/kernels/low_rank_{self.name}_emulated.cpp"


@dataclass(frozen=True)
class Mutant:
    number: int
    rule: str
    source: str
    line: int
    before: str
    after: str
    text: str  # of the whole file

    def __str__(self) -> str:
        return f"{Path(self.source).name}:{self.line} {self.rule}: {self.before.strip()}"

    @property
    def equivalent(self) -> str | None:
        return next(
            (why for (rule, piece), why in EQUIVALENT.items() if rule == self.rule and piece in self.before), None
        )


def mutants() -> Iterator[Mutant]:
    number = 0
    for source in (f"csrc/kernels/{name}" for name in SOURCES):
        text = (ROOT / source).read_text()
        for rule, (what, instead) in RULES.items():
            for match in re.finditer(what, text, re.MULTILINE):
                start = text.rfind("\n", 0, match.start()) + 1
                before = text[start : text.find("\n", match.end())]
                if before.lstrip().startswith(
                    ("//", "#", "template", "using", "static constexpr", "static_assert", "constexpr")
                ):
                    continue
                changed = text[: match.start()] + match.expand(instead) + text[match.end() :]
                after = changed[start : changed.find("\n", start)]
                yield Mutant(number, rule, source, text.count("\n", 0, start) + 1, before, after, changed)
                number += 1


def commands(text: str, target: str) -> str:
    """The line with `text` of what ninja runs for the target."""
    ninja = ["ninja", "-C", BUILD, "-t", "commands", target]
    listed = subprocess.run(ninja, text=True, capture_output=True, check=True).stdout
    return next(line for line in listed.splitlines() if text in line)


def build(mutant: Mutant, suite: Suite) -> Path:
    """The developers' module with the mutant in the kernels' place."""
    folder = WORK / f"{mutant.number}-{suite.name}"
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    (folder / mutant.source).write_text(mutant.text)
    module = folder / "shrank_dev.so"
    made = f"CMakeFiles/emulated_{suite.name}.dir/{suite.object}.o"
    compiled = (
        commands(f"-c {ROOT / suite.object}", made)
        .replace(str(ROOT / suite.object), str(folder / suite.object))
        .replace(f"-o {made}", f"-o {folder}/kernels.o")
    )
    linked = re.sub(
        r"-o shrank_dev\S*",
        f"-o {module}",
        commands("-o shrank_dev", "shrank_dev").replace(made, f"{folder}/kernels.o"),
    )
    for command in (re.sub(r"-M[DTF]\S*( \S+\.[od])?", "", compiled), linked):
        subprocess.run(command, shell=True, cwd=BUILD, check=True, capture_output=True, text=True)
    return module


def first_failure(module: Path, suite: Suite, told) -> None:
    """Sends how the first run that fails does so, or None. Its own process: a mutant may do anything."""
    torch.set_num_threads(1)
    dev = load_module(module)
    for run in sorted(suite.runs(), key=suite.size):
        for copies_early in (False, True):
            if failure := suite.failure_of(dev, run, copies_early):
                return told.send(f"{failure} [{run}]")
    told.send(None)


def failure_of_linear(dev: ModuleType, run: linear.Run, copies_early: bool) -> str | None:
    arguments = run.arguments()
    outcome = linear.emulate(dev, run, arguments, 2, copies_early)
    wanted = linear.exact(arguments, outcome.h if run.from_h else None)
    return mistake(outcome, wanted, reference.low_rank_linear(*arguments), run.training)


def failure_of_conv(dev: ModuleType, run: conv.ConvRun, copies_early: bool) -> str | None:
    arguments = run.arguments(dev)
    outcome = conv.emulate(dev, run, arguments, 2, copies_early)
    return mistake(outcome, conv.exact(run, arguments), conv.in_pytorch(run, arguments).y, run.training)


def mistake(outcome: linear.Outcome, wanted: reference.Forward, torchs: torch.Tensor, training: bool) -> str | None:
    if outcome.problems:
        return outcome.problems[0]
    try:
        assert_close(outcome.y, wanted.y, torchs, strict=True)
        for found, right in [(outcome.y, wanted.y), *[(outcome.h, wanted.h)] * training]:
            assert_every_element_close(found, right)
    except AssertionError as error:
        return f"numbers: {error}"
    if outcome.counts.bank_conflicts and not training:
        return f"{outcome.counts.bank_conflicts} bank conflicts"
    return None


LINEAR = Suite("linear", linear.runs, lambda run: run.M * (run.K + run.N) * run.R, failure_of_linear)
CONV = Suite("conv", conv.runs, conv.ConvRun.multiply_adds, failure_of_conv)
SOURCES = {
    "tile.cuh": (LINEAR, CONV),
    "expand.cuh": (LINEAR, CONV),
    "low_rank_linear.cuh": (LINEAR,),
    "gather.cuh": (CONV,),
    "low_rank_conv.cuh": (CONV,),
    "depthwise.cuh": (CONV,),
}


def verdict(mutant: Mutant) -> tuple[Mutant, str | None]:
    """How it was noticed, by the first suite that does; None if none did."""
    for suite in SOURCES[Path(mutant.source).name]:
        if noticed := noticed_by(suite, mutant):
            return mutant, noticed
    return mutant, None


def noticed_by(suite: Suite, mutant: Mutant) -> str | None:
    try:
        module = build(mutant, suite)
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"{mutant} does not compile: {error.stderr[:2000]}") from error
    listen, tell = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=first_failure, args=(module, suite, tell))
    process.start()
    tell.close()
    try:
        noticed = listen.recv() if listen.poll(TIMEOUT) else f"no end within {TIMEOUT} s"
    except EOFError:
        noticed = "the process died"
    process.kill()
    process.join()
    shutil.rmtree(module.parent)
    return noticed


def main(only: str = "") -> int:
    """`only`: of the mutants whose description holds this."""
    shutil.rmtree(WORK, ignore_errors=True)
    started, wrong, killed = time.monotonic(), [], 0
    missing = set(RULES) - {mutant.rule for mutant in mutants()}
    everything = [mutant for mutant in mutants() if only in str(mutant)]
    with ThreadPoolExecutor(2) as pool:
        for mutant, noticed in pool.map(verdict, everything):
            expected = noticed is None if mutant.equivalent else noticed is not None
            killed += noticed is not None
            wrong += [] if expected else [mutant]
            shown = noticed or (f"equivalent: {mutant.equivalent}" if mutant.equivalent else "SURVIVED")
            print(f"{'ok   ' if expected else 'WRONG'} {mutant}\n        {shown[:200]}", flush=True)
    print(
        f"{killed} of {len(everything)} mutants noticed, {len(everything) - killed - len(wrong)} equivalent, "
        f"{len(wrong)} wrong, in {time.monotonic() - started:.0f} s; rules without a match: {sorted(missing)}"
    )
    return bool(wrong or missing)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
