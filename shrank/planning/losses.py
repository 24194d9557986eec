"""What the forms of layers lose, in a unit in which the losses of different layers add up."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from ..linalg import FactorizationError
from ..model.survey import Site
from ..util.parallel import dealt
from .costs import Bytes, Cost, PricedLayer
from .forms import Form, Key
from .plan import LayerPlan
from .rounding import Rounding
from .spectra import Spectra

# Errors of T tokens add up to T times their mean square if they are independent and to T^2 times if they are all alike.
# It matters where layers see different numbers of tokens: Whisper tiny.en (1500 in the encoder, some 15 in the decoder)
# has a cross entropy of 5.30, 5.10, 2.22, 1.56 at keep 0.5 with exponents 0, 0.5, 1, 1.5.
_COHERENCE = 1.5


def worth(tokens: int) -> float:
    """What the errors of so many tokens come to, over their mean."""
    return float(tokens) ** _COHERENCE


@dataclass(frozen=True)
class Candidate:
    """A layer that the budget decides on; squares (G, m): what each of its directions adds to the squared error if it
    is cut."""

    site: Site
    draft: LayerPlan
    priced: PricedLayer
    squares: Tensor

    def tail(self, rank: int | None) -> float:
        """The squared error at a rank; 0 for a dense layer."""
        return 0.0 if rank is None else self.tails[min(rank // len(self.squares), len(self.tails) - 1)]

    @cached_property
    def tails(self) -> list[float]:
        """The squared error at ranks 0, 1, ... of every group."""
        return [*self.squares.sum(0).flip(0).cumsum(0).flip(0).clamp_min(0).tolist(), 0.0]

    @property
    def weight(self) -> float:
        """What the errors of all tokens come to, of which `squares` are the mean."""
        return worth(self.priced.tokens or 1)

    def relative(self, squared: float) -> float:
        """The relative error that a squared one is."""
        return math.sqrt(squared / self.tails[0]) if self.tails[0] else 0.0


class Losses:
    """The losses of all forms of some layers: of those on a grid estimated, until they are measured.

    Args:
        candidates: The layers.
        forms: Of every layer, by its name.
        cost: What a budget counts.
        weighted: The squared errors of different layers add up.
        spectra: Who knows what the layers see.
    """

    def __init__(
        self,
        candidates: list[Candidate],
        forms: dict[str, dict[Key, Form]],
        cost: Cost,
        weighted: bool,
        spectra: Spectra,
    ) -> None:
        self._weighted, self._spectra = weighted, spectra
        # Without gradients every layer keeps the same share, which no measure of the weights alone has beaten.
        self._by_share = not weighted and not isinstance(cost, Bytes)
        self._exact: dict[tuple[str, Key], float] = {}
        self._rounding = self._measured(candidates, forms) if isinstance(cost, Bytes) else {}

    def of(self, candidate: Candidate, form: Form) -> float:
        """What a form of a layer loses."""
        if self._by_share:
            size = form.shape.dense_params
            return 0.0 if form.rank is None else size * (1 - form.shape.low_rank_params(form.rank) / size) ** 2
        return self.squared(candidate, form) * self._weight(candidate)

    def of_nothing(self, candidate: Candidate) -> float:
        """What a layer loses that gives nothing."""
        if self._by_share:
            return candidate.draft.shape.dense_params
        return candidate.tails[0] * self._weight(candidate)

    def squared(self, candidate: Candidate, form: Form) -> float:
        """The squared error of one layer's form."""
        tail = candidate.tail(None if form.storage.corrected else form.rank)
        if form.storage.grid is None:
            return tail
        name = candidate.site.fqn
        known = self._exact.get((name, form.key))
        return self._rounding[name].estimate(form, tail) if known is None else known

    def settle(self, chosen: Iterable[tuple[Candidate, Form]]) -> bool:
        """Measure these, unless they are known; whether there was anything to measure."""
        unknown = [
            (candidate, form)
            for candidate, form in chosen
            if form.storage.grid is not None and (candidate.site.fqn, form.key) not in self._exact
        ]
        if not unknown:
            return False
        found = dealt(
            lambda pair: self._spectra.loss(pair[0].site, pair[1]).squared_error,
            unknown,
            [candidate.draft.shape.work for candidate, _ in unknown],
            self._workers(candidate for candidate, _ in unknown),
            "rounding",
        )
        self._exact |= {(c.site.fqn, form.key): squared for (c, form), squared in zip(unknown, found, strict=True)}
        return True

    def _weight(self, candidate: Candidate) -> float:
        """What the errors of all tokens of a layer come to, of which `squares` are the mean; without gradients, what
        makes layers of one size and one relative error equal."""
        if self._weighted:
            return candidate.weight
        return candidate.draft.shape.dense_params / (candidate.tails[0] or 1.0)

    def _workers(self, candidates: Iterable[Candidate]) -> int:
        return self._spectra.workers(candidate.site.module.weight for candidate in candidates)

    def _measured(self, candidates: list[Candidate], forms: dict[str, dict[Key, Form]]) -> dict[str, Rounding]:
        """How rounding goes in every layer; those that cannot be rounded lose their forms that are."""

        def look(candidate: Candidate) -> Rounding | None:
            own = list(forms[candidate.site.fqn].values())
            try:
                return self._spectra.rounding(candidate.site, candidate.draft.shape, own, candidate.tails)
            except FactorizationError:
                return None

        work = [candidate.draft.shape.work for candidate in candidates]
        found = dealt(look, candidates, work, self._workers(candidates), "rounding")
        for candidate, rounding in zip(candidates, found, strict=True):
            if rounding is None:
                own, as_it_is = forms[candidate.site.fqn], Form(None, candidate.draft.shape)
                plain = {key: form for key, form in own.items() if form.storage.grid is None}
                forms[candidate.site.fqn] = plain or {as_it_is.key: as_it_is}
        return {c.site.fqn: rounding for c, rounding in zip(candidates, found, strict=True) if rounding is not None}
