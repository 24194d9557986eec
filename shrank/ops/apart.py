"""A function in a process of its own, which a broken kernel may end; what it says before that is heard."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

SECONDS = 300  # that such a process may take, where all of CUDA is loaded first
BEGINS = "begins"
SHORT_OF_MEMORY = "short of memory"
_ERROR = re.compile(r"[\w.]+(Error|Exception): ")  # as Python ends a traceback


class NotMade(RuntimeError):
    """A check that says nothing about the kernels: they were not reached. Another process may be luckier."""


def begin(device: str) -> None:
    """Reach the device, and say so: whatever goes wrong before is no fault of the kernels."""
    torch.zeros(1, device=device).item()
    say(BEGINS)


def say(value: object) -> None:
    """To the process that started this one: a line of JSON."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()  # this may be the last that the process says


def run_apart(module: str, device: str, given: object = None, seconds: int = SECONDS) -> tuple[list[object], str]:
    """Call `answer(device)` of a module in a new process, with JSON on its standard input.

    Returns:
        All values that it said after it began, and how it ended, in words.

    Raises:
        NotMade: It did not begin, or memory was short.
    """
    command = [sys.executable, "-c", f"import sys, {module} as module; module.answer(sys.argv[1])", device]
    path = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]  # this very shrank
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    text = json.dumps(given).encode()
    try:
        ran = subprocess.run(command, input=text, capture_output=True, timeout=seconds, check=False, env=env)
    except subprocess.TimeoutExpired as late:
        said, end = late.stdout or b"", f"took longer than {seconds} s"
    except OSError as error:  # as where Python is a part of another program
        raise NotMade(f"its check could not be started: {error}") from error
    else:
        said = ran.stdout
        reason = _reason(ran.stderr.decode(errors="replace"))
        end = f"ended with code {ran.returncode}: {reason}"
        if ran.returncode and reason.startswith(SHORT_OF_MEMORY):
            raise NotMade(f"its check was {reason}")
    values = heard(said.decode(errors="replace"))
    if values is None:
        raise NotMade(f"its check {end}")
    return values, end


def _reason(text: str) -> str:
    """The last error that a process wrote on standard error, before any advice; else the last line."""
    lines = text.strip().splitlines() or ["it said nothing"]
    return next((line for line in reversed(lines) if _ERROR.match(line)), lines[-1])


def heard(said: str) -> list[object] | None:
    """The values after the beginning, among all that a process and its libraries printed; None if it did not begin."""
    values: list[object] | None = None
    for line in said.splitlines():
        try:
            value = json.loads(line)
        except ValueError:  # of a library, or a line cut short
            continue
        if value == BEGINS:
            values = []
        elif values is not None:
            values.append(value)
    return values
