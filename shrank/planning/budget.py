"""A budget for all layers together: what they may cost, or how far the model may suffer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property

from torch import nn

from ..linalg import Grid
from ..linalg.grids import BITS
from ..util.names import checks_keywords
from .costs import Bytes, Cost, Flops, Latency, Params
from .grids import Grids
from .latency import LatencyTable
from .rank import RankRule, as_rule

_GOALS = ("keep_params", "keep_bytes", "keep_flops", "keep_latency", "max_error", "eval_fn")


@dataclass(frozen=True)
class MaxError:
    """Every layer at its smallest rank of at most this relative error."""

    error: float


@dataclass(frozen=True)
class SmallestGoodEnough:
    """The smallest model of which `evaluate` gives at most `tolerated_drop` less than of the dense one."""

    evaluate: Callable[[nn.Module], float]
    tolerated_drop: float


@checks_keywords
@dataclass(frozen=True)
class Budget:
    """What all eligible layers may cost together, or how far the model may suffer: exactly one of the first six.

    Args:
        keep_params: Share of the eligible layers' weights, in (0, 1).
        keep_bytes: Share of the bytes of their weights on disk, in (0, 1). Layers may then be low-rank, have weights of
            few bits, both, or weights of few bits that two factors correct: whatever loses least for its bytes.
        keep_flops: Share of their floating-point operations on the calibration data, in (0, 1).
        keep_latency: Share of their seconds in `table`, in (0, 1).
        max_error: The largest relative error of any layer, in (0, 1).
        eval_fn: From a model to a number, larger is better. The smallest model is sought that loses at most
            `tolerated_drop` of it. Only `auto_fact` can spend this one: it tries compressed models.
        tolerated_drop: See `eval_fn`; in its unit.
        table: Times of the layers, which `shrank bench --layers` measures; only with `keep_latency`.
        overrides: Glob patterns of names to rank rules (None: dense), for layers that the budget pays but does not
            choose. The first pattern that matches counts.
        bits: Of weights that are rounded for `keep_bytes`: of 8, 4 and 3; none for low rank alone.
        group_sizes: How many weights of a row may share a scale, where there are fewer than 8 bits.
        correction_ranks: Ranks of factors that may correct rounded weights; none for no corrections.
        same_rank: Glob patterns, or lists of them; the layers that match one get one rank.

    Raises:
        ValueError: None or several of the first five are given, or one is out of its range.
    """

    keep_params: float | None = None
    keep_bytes: float | None = None
    keep_flops: float | None = None
    keep_latency: float | None = None
    max_error: float | None = None
    eval_fn: Callable[[nn.Module], float] | None = None
    tolerated_drop: float = 0.0
    table: LatencyTable | None = None
    overrides: Mapping[str, object] = field(default_factory=dict)
    same_rank: Iterable[str | Iterable[str]] = ()
    bits: Iterable[int] = BITS
    group_sizes: Iterable[int] = (32, 64, 128)
    correction_ranks: Iterable[int] = (8, 16, 32, 64)

    def __post_init__(self) -> None:
        given = [name for name in _GOALS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give a budget exactly one of {', '.join(_GOALS)}; got {', '.join(given) or 'none'}")
        for name in _GOALS[:-1]:
            if (value := getattr(self, name)) is not None and not 0 < value < 1:
                raise ValueError(f"{name} must lie in (0, 1), got {value}")
        for bits in (grids := self.grids).bits:
            Grid(bits)
        for name, values in (("group_sizes", grids.group_sizes), ("correction_ranks", grids.correction_ranks)):
            if wrong := [value for value in values if not isinstance(value, int) or value < 1]:
                raise ValueError(f"{name} must be whole numbers of at least 1, got {wrong[0]!r}")
        if (self.keep_latency is None) != (self.table is None):
            raise ValueError("keep_latency and table go together")

    @cached_property
    def goal(self) -> Cost | MaxError | SmallestGoodEnough:
        """The one of the first six that was given, as a value."""
        if self.keep_params is not None:
            return Params(self.keep_params)
        if self.keep_bytes is not None:
            return Bytes(self.keep_bytes, self.grids)
        if self.keep_flops is not None:
            return Flops(self.keep_flops)
        if self.keep_latency is not None:
            return Latency(self.keep_latency, self.table)
        if self.max_error is not None:
            return MaxError(self.max_error)
        return SmallestGoodEnough(self.eval_fn, self.tolerated_drop)

    @property
    def rounds(self) -> bool:
        """Whether it may give layers weights of few bits."""
        return self.keep_bytes is not None and bool(self.grids.bits)

    @cached_property
    def grids(self) -> Grids:
        """On what grids weights may be rounded."""
        return Grids(tuple(self.bits), tuple(self.group_sizes), tuple(self.correction_ranks))

    @cached_property
    def _same_rank(self) -> list[list[str]]:
        return [[entry] if isinstance(entry, str) else list(entry) for entry in self.same_rank]

    def groups(self, names: Iterable[str]) -> list[set[str]]:
        """The names that each entry of `same_rank` matches, in the first that does; ValueError where one matches
        none."""
        groups: list[set[str]] = []
        free = dict.fromkeys(names)
        for patterns in self._same_rank:
            members = {fqn for fqn in free if any(fnmatchcase(fqn, pattern) for pattern in patterns)}
            if not members:
                raise ValueError(f"same_rank: {', '.join(patterns)} matches no layer that the budget may change")
            groups.append(members)
            free = {fqn: None for fqn in free if fqn not in members}
        return groups

    def rule_for(self, fqn: str) -> RankRule | None:
        """The rule of the first override that matches."""
        for pattern, rule in self.overrides.items():
            if fnmatchcase(fqn, pattern):
                return as_rule(rule) if rule is not None else _keep_dense
        return None


def _keep_dense(layer: object) -> None:
    return None
