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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from shrank.ops import reference
from tests.common.tolerances import assert_close, assert_every_element_close

from .conftest import BUILD, load_module
from .emulated.linear import Run, emulate, exact, runs

ROOT = Path(__file__).parents[2]
WORK = ROOT / "build" / "mutants"
SOURCES = ("csrc/kernels/tile.cuh", "csrc/kernels/low_rank_linear.cuh")
OBJECT = "csrc/kernels/low_rank_linear_emulated.cpp"
TIMEOUT = 120

RULES = {  # name: (what, instead)
    "no block barrier": (r"arch::sync_threads\(\);", ""),
    "no warp barrier": (r"arch::sync_warp\(\);", ""),
    "no commit": (r"arch::copy_async_commit\(\);", ""),
    "no wait": (r"arch::copy_async_wait<Stages - 2>\(\);", ""),
    "waits for one group too few": (r"<Stages - 2>\(\)", "<Stages - 1>()"),
    "no wait for the grid before": (r"arch::grid_dependency_wait\(\);", ""),
    "one step too far ahead": (r"step \+ Stages - 1", "step + Stages"),
    "one step too near": (r"step \+ Stages - 1", "step + Stages - 2"),
    "one stage too few at the start": (r"step < Stages - 1;", "step < Stages - 2;"),
    "slot of another step": (r"slot\(next\)", "slot(step)"),
    "slots overlap": (r"step % Stages \* StageBytes", "step % Stages * (StageBytes / 2)"),
    "no left side of an and": (r"[\w+ *:.]+ (?:<|>=) [\w+ *:.]+ && ", ""),
    "no right side of an and": (r" && [\w+ *:.]+ (?:<|>=) [\w+ *:.]+(?=[;)])", ""),
    "< becomes <=": (r" < ", " <= "),
    ">= becomes >": (r" >= ", " > "),
    "no swizzle of panels": (r"\(chunk \^ \(row % kPanelChunks\)\)", "chunk"),
    "no swizzle of sums": (r"\(piece \^ \(row % 4\)\)", "piece"),
    "halves in one order": (r"half = lane / 4 % 2", "half = 0"),
    "another row of the fragment": (r"lane % 16,", "lane % 8,"),
    "another chunk of the fragment": (r"= lane / 16;", "= lane / 8 % 2;"),
    "fragments of b the wrong way": (r"lane / 16 \* 8", "lane / 8 % 2 * 8"),
    "swapped fragments": (r"b\[0\], b\[1\]", "b[1], b[0]"),
    "the same fragment twice": (r"b\[2\], b\[3\]", "b[0], b[1]"),
    "swapped numbers of a pair": (r"sum\[0\], sum\[1\]", "sum[1], sum[0]"),
    "the other pair": (r"sum\[2\], sum\[3\]", "sum[0], sum[1]"),
    "8 rows less": (r"(at|row) \+ 8,", r"\1,"),
    "another group of lanes": (r"lane / 4\b(?! %)", "lane / 8"),
    "another lane of the group": (r"lane % 4 \* ", "lane % 2 * "),
    "half of the fragments": (r"m \* 16", "m * 8"),
    "a column of fragments too few": (r"\+ n \* 8", "+ n * 4"),
    "16 columns of k again": (r"step \* 2 \+", "step +"),
    "the first block's rows": (r"static_cast<int64_t>\(arch::block_x\(\)\) \* BLOCK_M", "0"),
    "the first share of columns": (r"arch::block_y\(\) \* share\(\)", "0"),
    "another warp's place": (r"warp / kWarpsN, warp % kWarpsN", "warp % kWarpsN, warp / kWarpsN"),
    "warps share their staging": (r"warp \* kStagingBytes", "warp * (kStagingBytes / 2)"),
    "another panel of k": (r"step \* kPanel\)", "step * (kPanel / 2))"),
    "down behind fewer rows": (r"slot \+ kPanelBytes", "slot + kPanelBytes / 2"),
    "another panel of h": (r"h_panels \+ panel \* kPanelBytes", "h_panels"),
    "another tile of up": (r"step / rank_panels\) \* BLOCK_N", "step / rank_panels) * kPanel"),
    "another panel of the rank": (r"step % rank_panels \* kPanel", "0"),
    "no step on": (r"step\+\+", "step"),
    "bias of another column": (r"bias\) \+ n\)", "bias) + n / 2)"),
    "residual before the activation": (r"params.residual\) add", "params.bias) add"),
    "h is not loaded": (r"      block.load_h\(\);", "      ;"),
    "the same panel of h": (r"row, panel \* kPanel\);", "row, 0);"),
    "every block saves h": (r" && arch::block_y\(\) == 0", ""),
    "h is saved before it is there": (r"^    arch::sync_threads\(\);\n(?=    const int chunks)", ""),
    "sums are replaced": (r"values\[i\] \+=", "values[i] ="),
}

EQUIVALENT = {  # (rule, a piece of the line): why nothing changes
    ("< becomes <=", "return a < b ? a : b;"): "of two equal numbers either is the smaller",
    ("< becomes <=", "step < kPanel / 16; step++"): "the fifth step is never below `steps`, which is at most four",
    ("< becomes <=", "m < params.M && column < params.N) arch::prefetch"): "a hint, which reads nothing",
    ("no left side of an and", "arch::prefetch"): "a hint, which reads nothing",
    ("no right side of an and", "arch::prefetch"): "a hint, which reads nothing",
    ("< becomes <=", "for (int at = arch::lane_index(); at < UpSums::kRows"): "a hint, which reads nothing",
}


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
        return next((why for (rule, piece), why in EQUIVALENT.items() if rule == self.rule and piece in self.before),
                    None)


def mutants() -> Iterator[Mutant]:
    number = 0
    for source in SOURCES:
        text = (ROOT / source).read_text()
        for rule, (what, instead) in RULES.items():
            for match in re.finditer(what, text, re.MULTILINE):
                start = text.rfind("\n", 0, match.start()) + 1
                before = text[start:text.find("\n", match.end())]
                if before.lstrip().startswith(("//", "#", "template", "using", "static", "constexpr")):
                    continue
                changed = text[:match.start()] + match.expand(instead) + text[match.end():]
                after = changed[start:changed.find("\n", start)]
                yield Mutant(number, rule, source, text.count("\n", 0, start) + 1, before, after, changed)
                number += 1


def commands(text: str, target: str) -> str:
    """The line with `text` of what ninja runs for the target."""
    ninja = ["ninja", "-C", BUILD, "-t", "commands", target]
    listed = subprocess.run(ninja, text=True, capture_output=True, check=True).stdout
    return next(line for line in listed.splitlines() if text in line)


def build(mutant: Mutant) -> Path:
    """The developers' module with the mutant in the kernels' place."""
    folder = WORK / str(mutant.number)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    (folder / mutant.source).write_text(mutant.text)
    module = folder / "shrank_dev.so"
    made = f"CMakeFiles/emulated_linear.dir/{OBJECT}.o"
    compiled = commands(f"-c {ROOT / OBJECT}", made).replace(str(ROOT / OBJECT), str(folder / OBJECT)).replace(
        f"-o {made}", f"-o {folder}/kernels.o")
    linked = re.sub(r"-o shrank_dev\S*", f"-o {module}", commands("-o shrank_dev", "shrank_dev").replace(
        made, f"{folder}/kernels.o"))
    for command in (re.sub(r"-M[DTF]\S*( \S+\.[od])?", "", compiled), linked):
        subprocess.run(command, shell=True, cwd=BUILD, check=True, capture_output=True, text=True)
    return module


def first_failure(module: Path, told) -> None:
    """Sends how the first run that fails does so, or None. Its own process: a mutant may do anything."""
    torch.set_num_threads(1)
    dev = load_module(module)
    for run in sorted(runs(), key=lambda run: run.M * (run.K + run.N) * run.R):
        for copies_early in (False, True):
            if failure := failure_of(dev, run, copies_early):
                return told.send(f"{failure} [{run}]")
    told.send(None)


def failure_of(dev, run: Run, copies_early: bool) -> str | None:
    arguments = run.arguments()
    outcome = emulate(dev, run, arguments, 2, copies_early)
    if outcome.problems:
        return outcome.problems[0]
    wanted = exact(arguments, outcome.h if run.from_h else None)
    try:
        assert_close(outcome.y, wanted.y, reference.low_rank_linear(*arguments), strict=True)
        for found, right in [(outcome.y, wanted.y), *[(outcome.h, wanted.h), (outcome.z, wanted.z)] * run.training]:
            assert_every_element_close(found, right)
    except AssertionError as error:
        return f"numbers: {error}"
    if outcome.counts.bank_conflicts and not run.training:
        return f"{outcome.counts.bank_conflicts} bank conflicts"
    return None


def verdict(mutant: Mutant) -> tuple[Mutant, str | None]:
    """How it was noticed; None if it was not."""
    try:
        module = build(mutant)
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"{mutant} does not compile: {error.stderr[:2000]}") from error
    listen, tell = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=first_failure, args=(module, tell))
    process.start()
    tell.close()
    try:
        noticed = listen.recv() if listen.poll(TIMEOUT) else f"no end within {TIMEOUT} s"
    except EOFError:
        noticed = "the process died"
    process.kill()
    process.join()
    shutil.rmtree(WORK / str(mutant.number))
    return mutant, noticed


def main() -> int:
    shutil.rmtree(WORK, ignore_errors=True)
    started, wrong, killed = time.monotonic(), [], 0
    everything = list(mutants())
    missing = set(RULES) - {mutant.rule for mutant in everything}
    with ThreadPoolExecutor(2) as pool:
        for mutant, noticed in pool.map(verdict, everything):
            expected = noticed is None if mutant.equivalent else noticed is not None
            killed += noticed is not None
            wrong += [] if expected else [mutant]
            shown = noticed or (f"equivalent: {mutant.equivalent}" if mutant.equivalent else "SURVIVED")
            print(f"{'ok   ' if expected else 'WRONG'} {mutant}\n        {shown[:200]}", flush=True)
    print(f"{killed} of {len(everything)} mutants noticed, {len(everything) - killed - len(wrong)} equivalent, "
          f"{len(wrong)} wrong, in {time.monotonic() - started:.0f} s; rules without a match: {sorted(missing)}")
    return bool(wrong or missing)


if __name__ == "__main__":
    sys.exit(main())
