"""Measured times of the layers of a model, dense and at some ranks, for budgets of time."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

from ..util.files import write_text

FORMAT = 1


@dataclass(frozen=True)
class LatencyTable:
    """Seconds of every layer on one device, for the inputs of one call: what `shrank bench --layers` measures.

    Args:
        layers: name -> {"dense": seconds, "plain": {rank: seconds}, "pivoted": {rank: seconds}}.
        about: Device, torch, threads, batch and date of the measurement.
    """

    layers: dict[str, dict] = field(repr=False)
    about: dict[str, object]

    def seconds(self, fqn: str, rank: int | None, pivoted: bool) -> float:
        """Look up or interpolate the time of a layer.

        Args:
            fqn: The layer's dotted name.
            rank: None means dense.
            pivoted: Whether its factors are stored with pivots.

        Returns:
            Seconds; between two ranks that were measured on the line between them, beyond them those of the nearest.

        Raises:
            ValueError: The layer was not measured.
        """
        if fqn not in self.layers:
            raise ValueError(f"the latency table has no layer {fqn!r}: measure this model with `shrank bench --layers`")
        entry = self.layers[fqn]
        if rank is None:
            return entry["dense"]
        points = sorted((int(r), s) for r, s in entry["pivoted" if pivoted else "plain"].items())
        if not points:
            return entry["dense"]  # of a layer with no rank that would be faster
        return _interpolated(points, rank)

    def save(self, path: str | os.PathLike) -> None:
        """Write the table as JSON.

        Args:
            path: The file; an older one is replaced in one step.
        """
        write_text(path, json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike) -> LatencyTable:
        """Read the table in a JSON file.

        Args:
            path: A file that `save` wrote.

        Returns:
            The table.

        Raises:
            ValueError: The file holds no table; the text names it and what is wrong.
        """
        try:
            data = json.loads(Path(path).read_text())
            if not isinstance(data, dict) or data.get("format") != FORMAT or not isinstance(data.get("layers"), dict):
                raise ValueError(f"not a latency table of format {FORMAT}")
            for fqn, entry in data["layers"].items():
                times = [entry["dense"], *entry["plain"].values(), *entry["pivoted"].values()]
                if not all(isinstance(t, int | float) and t > 0 for t in times):
                    raise ValueError(f"{fqn}: times must be positive numbers")
            return cls(data["layers"], data.get("about", {}))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: {error}") from error


def _interpolated(points: list[tuple[int, float]], rank: int) -> float:
    """On the straight line through the two nearest points; beyond the ends, the time of the end."""
    if rank <= points[0][0]:
        return points[0][1]
    for (low, fast), (high, slow) in pairwise(points):
        if rank <= high:
            return fast + (slow - fast) * (rank - low) / (high - low)
    return points[-1][1]
