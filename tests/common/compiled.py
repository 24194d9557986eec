"""Small shared libraries that stand in for others, compiled where they are needed."""

from __future__ import annotations

import subprocess
from pathlib import Path


def shared_library(path: Path, source: str, *options: str) -> Path:
    """Compile C++ source to path, under the name by which others ask for it; libraries it needs are found beside it.

    The linker keeps only libraries that are used, as Debian's does without being asked.
    """
    text = path.with_suffix(".cpp")
    text.write_text(source)
    subprocess.run(
        [
            "g++",
            "-std=c++17",
            "-fPIC",
            "-shared",
            text,
            "-o",
            path,
            f"-Wl,-soname,{path.name}",
            f"-L{path.parent}",
            "-Wl,-rpath,$ORIGIN",
            "-Wl,--as-needed",
            *options,
        ],
        check=True,
    )
    return path
