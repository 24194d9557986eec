"""Whether the native kernels compute right on this very card: each family once, before any is first used there.

What is found is kept on disk. A kernel that is broken for a card may end the process, so the first check of a build
happens in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..util.cache import read_facts, write_facts
from ..util.closeness import distance, stray_elements
from . import availability, machine, tuned
from .availability import constant
from .conv import CONV
from .law import DTYPES
from .linear import LINEAR
from .reference import Forward
from .registration import Op

SECONDS = 300  # that a check may take in a process of its own, where all of CUDA is loaded first
_HALF = (torch.bfloat16, torch.float16)
Results = dict[str, str]  # of every probe: what is wrong, or ""


@dataclass(frozen=True)
class Probe:
    """A family of kernels, and a problem whose every side is ragged and that has every end.

    sizes: of x, down and up. more: what the op takes between bias and activation.
    """

    op: Op
    family: str
    kernel: str
    sizes: tuple[torch.Size, ...]
    more: tuple = ()
    grid: tuple[int, ...] = ()
    dtypes: tuple[torch.dtype, ...] = _HALF

    def name(self, dtype: torch.dtype) -> str:
        return f"{self.op.name} {self.family} {str(dtype).removeprefix('torch.')}"

    def arguments(self, dtype: torch.dtype, device: str) -> tuple:
        """Outputs have about unit variance."""
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int, fan_in: int = 1) -> Tensor:
            return (torch.randn(shape, generator=generator, dtype=torch.float64) / fan_in**0.5).to(device, dtype)

        x, down, up = self.sizes
        tensors = [draw(*x), draw(*down, fan_in=down[1:].numel()), draw(*up, fan_in=up[1])]
        if len(x) > 2:  # a convolution: as its kernels read
            tensors[:2] = (each.to(memory_format=torch.channels_last) for each in tensors[:2])
        y = self.op.empty(*tensors, None, *self.op.pack(*self.more, "none"), None).y
        residual = torch.empty_like(y).copy_(draw(*y.shape))
        return (*tensors, draw(up[0]), *self.more, "gelu", residual)

    def failure(self, dtype: torch.dtype, device: str) -> str:
        """What is wrong with the kernels' y, h and z beside PyTorch's, by the rule of the tests; "" if nothing is."""
        given = self.arguments(dtype, device)
        try:
            found = self.op.run_named(given, self.kernel, self.grid, training=True)
            if device.startswith("cuda"):
                torch.cuda.synchronize(device)
        except torch.OutOfMemoryError:  # no fault of the kernel
            raise
        except RuntimeError as error:
            return f"it does not run: {error}"
        exact = self._forward(tuple(each.double() if isinstance(each, Tensor) else each for each in given))
        plain = self._forward(given)
        for name, one, two, three in zip(Forward._fields, found, exact, plain, strict=True):
            if far := distance(one, two, three) or stray_elements(one, two):
                return f"{name} has {far}"
        return ""

    def _forward(self, given: tuple) -> Forward:
        return self.op.forward(*self.op.packed(given))


def _sizes(*sizes: tuple[int, ...]) -> tuple[torch.Size, ...]:
    return tuple(map(torch.Size, sizes))


_LINEAR = _sizes((37, 200), (40, 200), (136, 40))
_PLAIN = ([2, 1], [1, 2], [1, 1])  # stride, padding, dilation
PROBES = (
    Probe(LINEAR, "fused", "fused", _LINEAR),
    Probe(LINEAR, "expand", "gemm_expand", _LINEAR),
    Probe(LINEAR, "expand streamed", "gemm_expand", _LINEAR, grid=(64, 0, 1)),
    Probe(LINEAR, "epilogue", "two_gemms_epilogue", _LINEAR, dtypes=DTYPES),
    Probe(CONV, "chunks", "fused", _sizes((2, 16, 9, 7), (24, 16, 3, 3), (40, 24, 1, 1)), (*_PLAIN, 1, 1)),
    Probe(CONV, "numbers", "fused", _sizes((2, 3, 9, 7), (24, 3, 3, 3), (40, 24, 1, 1)), (*_PLAIN, 1, 1)),
    Probe(CONV, "depthwise", "fused", _sizes((2, 40, 9, 7), (40, 1, 3, 3), (72, 40, 1, 1)), (*_PLAIN, 40, 1)),
    Probe(CONV, "expand", "conv_expand", _sizes((2, 16, 9, 7), (24, 16, 3, 3), (40, 24, 1, 1)), (*_PLAIN, 1, 1)),
    Probe(
        CONV,
        "epilogue",
        "two_convs_epilogue",
        _sizes((2, 16, 9, 7), (24, 16, 3, 3), (40, 24, 1, 1)),
        (*_PLAIN, 1, 1),
        dtypes=DTYPES,
    ),
)


@torch.no_grad()
def check(device: str) -> Iterator[tuple[str, str]]:
    """Run every family in every dtype on a device, in this process: (name, what is wrong or "")."""
    for probe in PROBES:
        for dtype in probe.dtypes:
            yield probe.name(dtype), probe.failure(dtype, device)


def file_of(device: str) -> Path:
    return machine.folder(device) / "check.json"


def check_and_keep(device: str) -> Results:
    """Check a device in this process, and write what was found where it is looked up."""
    results = dict(check(device))
    _keep(device, results)
    return results


def _keep(device: str, results: Results) -> None:
    """A folder that cannot be written costs every process a check, and no more than that."""
    try:
        write_facts(file_of(device), machine.facts(device), results)
    except OSError as error:
        warnings.warn(
            f"the check of shrank's kernels on {device} cannot be kept ({error}): every process checks again. "
            "SHRANK_CACHE names another folder",
            stacklevel=2,
        )


def kept(device: str) -> Results | None:
    """What was found before; None where nothing was, or not by these kernels on this machine."""
    results = read_facts(file_of(device), machine.facts(device))
    if not isinstance(results, dict) or results.keys() != set(names()):
        return None
    return results if all(isinstance(reason, str) for reason in results.values()) else None


def names() -> list[str]:
    """Of all probes in all their dtypes, in the order in which they run."""
    return [probe.name(dtype) for probe in PROBES for dtype in probe.dtypes]


class NotMade(RuntimeError):
    """A check that says nothing about the kernels: they were not reached. Another process may be luckier."""


def answer(device: str) -> None:
    """Check a device, and print each result when it is known: a line of JSON. The first line says that it begins.

    Whatever goes wrong before that line is no fault of the kernels.
    """
    torch.zeros(1, device=device).item()
    print(json.dumps(_BEGINS), flush=True)
    try:
        for result in check(device):
            print(json.dumps(result), flush=True)
    except torch.OutOfMemoryError as error:
        sys.exit(f"{_SHORT_OF_MEMORY}: {error}")


_BEGINS = "begins"
_SHORT_OF_MEMORY = "short of memory"


def _checked_apart(device: str) -> Results:
    """Check in a process of its own. The kernel that ends it is wrong, and those that it kept from running are too.

    Raises NotMade where no kernel was reached, or memory was short.
    """
    command = [sys.executable, "-c", f"import sys, {__name__} as check; check.answer(sys.argv[1])", device]
    path = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]  # this very shrank
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    try:
        ran = subprocess.run(command, capture_output=True, timeout=SECONDS, check=False, env=env)
    except subprocess.TimeoutExpired as late:
        said, end = late.stdout or b"", f"took longer than {SECONDS} s"
    except OSError as error:  # as where Python is a part of another program
        raise NotMade(f"its check could not be started: {error}") from error
    else:
        said = ran.stdout
        last = (ran.stderr.decode(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
        end = f"ended with code {ran.returncode}: {last}"
        if last.startswith(_SHORT_OF_MEMORY):
            raise NotMade(f"its check was {last}")
    begun, results = _heard(said.decode(errors="replace"))
    if not begun:
        raise NotMade(f"its check {end}")
    ended_by = next((name for name in names() if name not in results), None)
    reasons = {ended_by: f"its check {end}"}
    return {
        name: results[name] if name in results else reasons.get(name, f"not reached: the check of {ended_by} {end}")
        for name in names()
    }


def _heard(said: str) -> tuple[bool, Results]:
    """Whether a check began, and its results, among all that a process printed."""
    begun, results, known = False, {}, set(names())
    for line in said.splitlines():
        try:
            value = json.loads(line)
        except ValueError:  # of a library, or a line cut short
            continue
        if value == _BEGINS:
            begun = True
        elif begun and isinstance(value, list) and len(value) == 2 and value[0] in known:
            results[value[0]] = value[1]
    return begun, results


def why_not_op(op: str, x: Tensor) -> tuple[str, ...]:
    """As `why_not`, on the device of x, with its dtype."""
    return why_not(op, f"cuda:{x.get_device()}" if x.is_cuda else str(x.device), x.dtype)


def check_again(device: str) -> Results:
    """Check a CUDA device in a process of its own, whatever was found before.

    Raises RuntimeError where the native kernels cannot run at all, with every reason, and NotMade, which is one.
    """
    if reasons := availability.why_not_here():
        raise RuntimeError("the native kernels cannot run here:\n- " + "\n- ".join(reasons))
    results = _known[device] = _checked_apart(device)
    _not_made.pop(device, None)
    _keep(device, results)
    return results


_known: dict[str, Results] = {}
_not_made: dict[str, str] = {}  # in this process: why
_told: set[tuple[str, str, torch.dtype]] = set()


@constant
def why_not(op: str, device: str, dtype: torch.dtype) -> tuple[str, ...]:
    """Why no kernel of an op may run on a device with a dtype: one was found wrong there. Checks it, the first time."""
    if os.environ.get("SHRANK_SELF_CHECK", "1") == "0":
        tuned.use(device)
        return ()
    if device in _not_made:
        return (_not_made[device],)
    if device not in _known:
        if (results := kept(device)) is None:
            if device.startswith("cuda") and torch.cuda.is_current_stream_capturing():
                return ("the kernels were not checked on this card yet, and a CUDA graph is being recorded",)
            try:
                results = _checked_apart(device)
            except NotMade as error:
                _not_made[device] = f"not checked on {device}: {error}"
                warnings.warn(
                    f"PyTorch computes instead of shrank's kernels, {_not_made[device]}. `shrank check` tries again",
                    stacklevel=2,
                )
                return (_not_made[device],)
            _keep(device, results)
        _known[device] = results
        tuned.use(device)
    of_op = {name: reason for name, reason in _known[device].items() if reason and _is_of(name, op, dtype)}
    by_reason = {why: [name for name in of_op if of_op[name] == why] for why in of_op.values()}
    wrong = [f"{', '.join(names)}: {why}" for why, names in by_reason.items()]
    if wrong and (device, op, dtype) not in _told:
        _told.add((device, op, dtype))
        about = machine.facts(device)
        warnings.warn(
            f"PyTorch computes instead of shrank's kernels: on {about['device']} with driver {about['driver']}, "
            f"{'; '.join(wrong)}. Please report it; `shrank check` checks again",
            stacklevel=2,
        )
    return tuple(f"found wrong on {device}: {each}" for each in wrong)


def _is_of(name: str, op: str, dtype: torch.dtype) -> bool:
    return name.split()[0] == op and name.split()[-1] == str(dtype).removeprefix("torch.")
