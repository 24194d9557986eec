"""Where shrank keeps what it found out about a machine."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from .files import write_text


def cache_folder() -> Path:
    """SHRANK_CACHE; else the folder `shrank` among the user's caches (XDG_CACHE_HOME, or ~/.cache)."""
    if given := os.environ.get("SHRANK_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shrank"


def write_facts(path: Path, about: Mapping[str, object], facts: Mapping[str, object]) -> None:
    """Write facts that hold where `about` does; whole or not at all, with a digest of both."""
    content = {"about": dict(about), "facts": dict(facts)}
    write_text(path, json.dumps({**content, "digest": name_of(content)}, indent=1))


def read_facts(path: Path, about: Mapping[str, object]) -> dict[str, object] | None:
    """What `write_facts` wrote; None where there is no such file, it is damaged, or something else held then."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):  # UnicodeDecodeError is a ValueError; brackets may nest
        return None
    if not isinstance(found, dict) or found.keys() != {"about", "facts", "digest"}:
        return None
    digest = found.pop("digest")
    return found["facts"] if digest == name_of(found) and found["about"] == about else None


def name_of(facts: Mapping[str, object]) -> str:
    """A name for files that hold only where these facts do."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
