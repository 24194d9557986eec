"""Messages of several lines."""

from __future__ import annotations


def indented(problems: list[str]) -> str:
    """The problems, a line each, for the end of a message; of many, the first ten and how many more there are."""
    more = [f"and {len(problems) - 10} more"] if len(problems) > 10 else []
    return "".join(f"\n  {line}" for line in [*problems[:10], *more])
