"""The folder that a streamed run works in: whose run it is, and what a run that was stopped left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from ..util.files import write_text

_ABOUT = "about.json"


def work_folder(target: Path) -> Path:
    """Where a run that writes `target` keeps what it found, beside it."""
    return target.parent / f"{target.name}.streaming"


def taken_up(folder: Path, about: Mapping[str, object]) -> None:
    """Make the folder of a run, or take up one that was stopped.

    about: all that the result depends on. Raises ValueError if the folder is that of another run.
    """
    file = folder / _ABOUT
    facts = json.loads(json.dumps(dict(about)))
    if file.is_file():
        found = json.loads(file.read_text())
        if other := [name for name in facts | found if facts.get(name) != found.get(name)]:
            raise ValueError(
                f"{folder} is that of a run with another {', '.join(other)}: repeat that run to finish it, or delete "
                "the folder"
            )
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is in the way: it is no folder of a streamed run")
    folder.mkdir(parents=True, exist_ok=True)
    for unfinished in folder.rglob(".*.*"):  # what `replacing` had not yet put into its place
        if unfinished.is_dir():
            shutil.rmtree(unfinished)
    write_text(file, json.dumps(facts, indent=1))


def put_in_place(new: Path, target: Path) -> None:
    """A folder under its final name, in one step unless another is there, which is replaced."""
    if target.exists():
        old = new.with_name("old")
        if old.exists():
            shutil.rmtree(old)
        target.rename(old)
    new.rename(target)
