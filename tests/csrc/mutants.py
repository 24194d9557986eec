"""`make mutants`: breaks the matrix kernels in one place at a time; the emulated tests must notice every time.

A rule rewrites one match of one line. What no test can notice, because nothing changes, is listed with the argument. A
mutant is compiled for a few tiles first: most are noticed there. Only what is not is compiled for all.
"""

from __future__ import annotations

import multiprocessing
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from tests.common.tolerances import assert_close, assert_every_element_close

from .conftest import BUILD, load_module
from .emulated import backward, conv, few_rows, linear
from .mutation_rules import EQUIVALENT, RULES

ROOT = Path(__file__).parents[2]
WORK = ROOT / "build" / "mutants"
CPU_SECONDS = 120  # of a mutant's runs: by its own time, not by the clock of a machine that others use too


@dataclass(frozen=True)
class Suite:
    """The launches of one family of kernels, and the object that has the kernels.

    few: C++ that says of a tile whether it is one of the few, and the same of a launch.
    """

    name: str
    target: str
    runs: Callable[[], list]
    size: Callable[[object], int]
    failure_of: Callable[[ModuleType, object, bool], str | None]
    few: tuple[str, Callable[[object], bool]]

    @property
    def object(self) -> str:
        return f"csrc/kernels/{self.name}_emulated.cpp"


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
        line = f"{Path(self.source).name}: {self.before}"
        return next((why for (rule, piece), why in EQUIVALENT.items() if rule == self.rule and piece in line), None)


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


def build(mutant: Mutant, suite: Suite, few: bool) -> Path:
    """The developers' module with the mutant in the kernels' place, for some tiles and one element type or for all."""
    folder = WORK / f"{mutant.number}-{suite.name}-{few}"
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    (folder / mutant.source).write_text(mutant.text)
    if few:
        leave_few(folder / "csrc", suite)
    module = folder / "shrank_dev.so"
    made = f"CMakeFiles/emulated_{suite.target}.dir/{suite.object}.o"
    compiled = (
        commands(f"-c {ROOT / suite.object}", made)
        .replace(str(ROOT / suite.object), str(folder / suite.object))
        .replace(f"-o {made}", f"-Wno-error -o {folder}/kernels.o")  # what a mutant no longer uses
    )
    linked = re.sub(
        r"-o shrank_dev\S*",
        f"-o {module}",
        commands("-o shrank_dev", "shrank_dev").replace(made, f"{folder}/kernels.o"),
    )
    for command in (re.sub(r"-M[DTF]\S*( \S+\.[od])?", "", compiled), linked):
        subprocess.run(command, shell=True, cwd=BUILD, check=True, capture_output=True, text=True)
    return module


def leave_few(csrc: Path, suite: Suite) -> None:
    """Takes all but the few tiles, and the second element type, out of a copy of the sources."""
    with_tile, found = csrc / "select/with_tile.h", "else if (tile == TILES[I])"
    passed_over = f"else if constexpr (!({suite.few[0]})) return with_tile<TILES, I + 1>(tile, visit);\n"
    with_tile.write_text(replaced(with_tile.read_text(), found, passed_over + found))
    kernels = csrc.parent / suite.object
    kernels.write_text(replaced(kernels.read_text(), "arch::float16", "arch::bfloat16"))


def replaced(text: str, what: str, instead: str) -> str:
    if what not in text:
        raise LookupError(f"there is no {what!r} to replace")
    return text.replace(what, instead)


def first_failure(module: Path, suite: Suite, few: bool, told) -> None:
    """Sends how the first run that fails does so, or None. Its own process: a mutant may do anything."""
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    dev = load_module(module)
    for run in sorted(suite.runs(), key=suite.size):
        if few and not suite.few[1](run):
            continue
        for copies_early in (False, True):
            if failure := suite.failure_of(dev, run, copies_early):
                return told.send(f"{failure} [{run}]")
    told.send(None)


def failure_of_linear(dev: ModuleType, run: linear.Run, copies_early: bool) -> str | None:
    arguments = run.arguments()
    outcome = linear.emulate(dev, run, arguments, 2, copies_early)
    wanted = linear.exact(arguments, outcome.h if run.from_h else None)
    return mistake(outcome, wanted, linear.in_pytorch(arguments), run.training, run.pivoted)


def failure_of_conv(dev: ModuleType, run: conv.ConvRun, copies_early: bool) -> str | None:
    arguments = run.arguments(dev)
    outcome = conv.emulate(dev, run, arguments, 2, copies_early)
    return mistake(outcome, conv.exact(run, arguments), conv.in_pytorch(run, arguments).y, run.training)


def failure_of_few_rows(
    dev: ModuleType, run: few_rows.FewRowsRun | few_rows.MultiRun, _copies_early: bool
) -> str | None:
    arguments = run.arguments()
    if isinstance(run, few_rows.MultiRun):
        may_conflict = any(layer.pivoted for layer in run.layers)
        for given, outcome in zip(arguments, few_rows.emulate_multi(dev, run, arguments, 2), strict=True):
            if found := mistake(outcome, linear.exact(given), linear.in_pytorch(given), False, may_conflict):
                return found
        return None
    outcome = few_rows.emulate(dev, run, arguments, 2)
    return mistake(outcome, linear.exact(arguments), linear.in_pytorch(arguments), run.training, bool(run.pivoted))


def failure_of_backward(dev: ModuleType, run: backward.BackwardRun, copies_early: bool) -> str | None:
    arguments = run.arguments()
    outcome = backward.emulate(dev, run, arguments, 2, copies_early)
    if found := problem_or_conflict(outcome, run.pivoted):
        return found
    try:
        pairs = backward.compared(outcome, run, arguments)
    except AssertionError as error:
        return f"numbers: {error}"
    return wrong_numbers(pairs)


def mistake(
    outcome: linear.Outcome,
    wanted: tuple[torch.Tensor, ...],
    torchs: torch.Tensor,
    training: bool,
    may_conflict: bool = False,
) -> str | None:
    y, *h = wanted
    pairs = [(outcome.y, y, torchs), *zip(outcome.h, h, h, strict=True)] if training else [(outcome.y, y, torchs)]
    found = outcome.problems[0] if outcome.problems else wrong_numbers(pairs)
    return found or (None if training else problem_or_conflict(outcome, may_conflict))


def problem_or_conflict(outcome: linear.Outcome | backward.Outcome, may_conflict: bool) -> str | None:
    """may_conflict: as pivots do, which are read from h column by column."""
    if outcome.problems:
        return outcome.problems[0]
    if may_conflict:
        return None
    return f"{outcome.counts.bank_conflicts} bank conflicts" if outcome.counts.bank_conflicts else None


def wrong_numbers(pairs: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> str | None:
    """Of what was found, what is right, and what PyTorch makes of it in the same precision."""
    try:
        assert_close(*pairs[0], strict=True)
        for found, right, _ in pairs:
            assert_every_element_close(found, right)
    except AssertionError as error:
        return f"numbers: {error}"
    return None


def tile_of(run: linear.Run | backward.BackwardRun) -> tuple[int, int]:
    return run.block_m, run.max_rank


FEW_CONV = {("chunks", 32, 64), ("analytic", 64, 64), ("numbers", 64, 64), ("depthwise", 64, 256)}
FEW_LINEAR = "TILES[I].max_rank <= 64 && TILES[I].block_m <= 64"
LINEAR = Suite(
    "low_rank_linear",
    "linear",
    linear.runs,
    linear.Run.multiply_adds,
    failure_of_linear,
    (FEW_LINEAR, lambda run: run.dtype == linear.BF16 and tile_of(run) in ((32, 64), (64, 64), (64, 0))),
)
CONV = Suite(
    "low_rank_conv",
    "conv",
    conv.runs,
    conv.ConvRun.multiply_adds,
    failure_of_conv,
    (
        " || ".join(
            f"(TILES[I].gather == Gather::{how} && TILES[I].tile == LinearTile{{{rows}, {rank}}})"
            for how, rows, rank in sorted(FEW_CONV)
        ),
        lambda run: run.dtype == linear.BF16 and run.tile in FEW_CONV,
    ),
)
BACKWARD = Suite(
    "expand_backward",
    "linear",
    backward.runs,
    backward.BackwardRun.multiply_adds,
    failure_of_backward,
    (FEW_LINEAR, lambda run: run.dtype == linear.BF16 and tile_of(run) in ((64, 64), (64, 0))),
)
FEW_ROWS = Suite(
    "shrink_expand",
    "linear",
    lambda: [*few_rows.runs(), *few_rows.multi_runs()],
    lambda run: run.multiply_adds(),
    failure_of_few_rows,
    ("TILES[I].tokens == 8", lambda run: run.dtype == linear.BF16 and run.tokens == 8),
)
SOURCES = {
    "tile.cuh": (LINEAR, CONV),
    "expand.cuh": (LINEAR, CONV),
    "low_rank_linear.cuh": (LINEAR,),
    "gather.cuh": (CONV,),
    "low_rank_conv.cuh": (CONV,),
    "depthwise.cuh": (CONV,),
    "shrink_expand.cuh": (FEW_ROWS,),
    "expand_backward.cuh": (BACKWARD,),
}


def verdict(mutant: Mutant) -> tuple[Mutant, str | None]:
    """How it was noticed, by the first suite that does; None if none did. Of what is listed as equivalent the few tiles
    are enough: they would show that it is not."""
    for few in (True,) if mutant.equivalent else (True, False):
        for suite in SOURCES[Path(mutant.source).name]:
            if noticed := noticed_by(suite, mutant, few):
                return mutant, noticed
    return mutant, None


def noticed_by(suite: Suite, mutant: Mutant, few: bool) -> str | None:
    try:
        module = build(mutant, suite, few)
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"{mutant} does not compile: {error.stderr[:2000]}") from error
    listen, tell = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=first_failure, args=(module, suite, few, tell))
    process.start()
    tell.close()
    try:
        noticed = listen.recv()
    except EOFError:
        process.join()
        noticed = f"the process died, {process.exitcode}"
    process.join()
    shutil.rmtree(module.parent)
    return noticed


def main(only: str = "") -> int:
    """`only`: of the mutants whose description holds this."""
    shutil.rmtree(WORK, ignore_errors=True)
    torch.set_num_threads(1)  # a process that forks has one thread
    started, wrong, killed = time.monotonic(), [], 0
    missing = set(RULES) - {mutant.rule for mutant in mutants()}
    everything = [mutant for mutant in mutants() if only in str(mutant)]
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
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
