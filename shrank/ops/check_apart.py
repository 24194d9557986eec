"""The check of the kernels in a process of its own, which a broken one may end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from .probes import Results, check, names

SECONDS = 300  # that a check may take, where all of CUDA is loaded first
BEGINS = "begins"
SHORT_OF_MEMORY = "short of memory"


class NotMade(RuntimeError):
    """A check that says nothing about the kernels: they were not reached. Another process may be luckier."""


def answer(device: str) -> None:
    """Check a device, and print each result when it is known: a line of JSON. The first line says that it begins.

    Whatever goes wrong before that line is no fault of the kernels.
    """
    torch.zeros(1, device=device).item()
    _say(BEGINS)
    try:
        for result in check(device):
            _say(result)
    except torch.OutOfMemoryError as error:
        sys.exit(f"{SHORT_OF_MEMORY}: {error}")


def _say(value: object) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()  # this may be the last that the process says


def checked_apart(device: str) -> Results:
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
        if last.startswith(SHORT_OF_MEMORY):
            raise NotMade(f"its check was {last}")
    begun, results = heard(said.decode(errors="replace"))
    if not begun:
        raise NotMade(f"its check {end}")
    ended_by = next((name for name in names() if name not in results), None)
    reasons = {ended_by: f"its check {end}"}
    return {
        name: results[name] if name in results else reasons.get(name, f"not reached: the check of {ended_by} {end}")
        for name in names()
    }


def heard(said: str) -> tuple[bool, Results]:
    """Whether a check began, and its results, among all that a process printed."""
    begun, results, known = False, {}, set(names())
    for line in said.splitlines():
        try:
            value = json.loads(line)
        except ValueError:  # of a library, or a line cut short
            continue
        if value == BEGINS:
            begun = True
        elif begun and isinstance(value, list) and len(value) == 2 and value[0] in known:
            results[value[0]] = value[1]
    return begun, results
