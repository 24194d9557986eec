"""Whether the native kernels compute right on this very card: each family once, before any is first used there.

What is found is kept on disk. The first check of a build happens in a process of its own (check_apart).
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch
from torch import Tensor

from ..util.cache import read_facts, write_facts
from . import availability, check_apart, machine, tuned
from .apart import NotMade
from .availability import constant
from .probes import Results, check, names


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


def why_not_op(op: str, x: Tensor) -> tuple[str, ...]:
    """As `why_not`, on the device of x, with its dtype."""
    return why_not(op, f"cuda:{x.get_device()}" if x.is_cuda else str(x.device), x.dtype)


def check_again(device: str) -> Results:
    """Check a CUDA device in a process of its own, whatever was found before.

    Raises RuntimeError where the native kernels cannot run at all, with every reason, and NotMade, which is one.
    """
    if reasons := availability.why_not_here():
        raise RuntimeError("the native kernels cannot run here:\n- " + "\n- ".join(reasons))
    results = _known[device] = check_apart.checked_apart(device)
    _not_made.pop(device, None)
    availability.forget()
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
                results = check_apart.checked_apart(device)
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
