"""What the forms of layers lose, in a unit in which the losses of different layers add up."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from ..linalg import FactorizationError
from ..model.adapters import Target
from ..model.survey import Site
from ..util.parallel import dealt
from .costs import Bytes, Cost, PricedLayer
from .forms import Form, Key
from .narrower import Narrower
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
    is cut; narrower: its block with fewer units, where it is that layer, and not the one at its site."""

    site: Site
    draft: LayerPlan
    priced: PricedLayer
    squares: Tensor
    narrower: Narrower | None = None

    @property
    def key(self) -> tuple[str, int | None]:
        """What tells it from others, its own at other widths too."""
        return self.site.fqn, None if self.narrower is None else self.narrower.width

    @property
    def adapter(self) -> Target:
        """The layer as what its type is; its weights may be missing."""
        return self.site.adapter if self.narrower is None else self.narrower.adapter(self.site.fqn)

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
        forms: Of every layer, by its key.
        cost: What a budget counts.
        weighted: The squared errors of different layers add up.
        spectra: Who knows what the layers see.
    """

    def __init__(
        self,
        candidates: list[Candidate],
        forms: dict[tuple, dict[Key, Form]],
        cost: Cost,
        weighted: bool,
        spectra: Spectra,
    ) -> None:
        self._weighted, self._spectra = weighted, spectra
        # Without gradients every layer keeps the same share, which no measure of the weights alone has beaten.
        self._by_share = not weighted and not isinstance(cost, Bytes)
        self._exact: dict[tuple, float] = {}
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
        known = self._exact.get((candidate.key, form.key))
        return self._rounding[candidate.key].estimate(form, tail) if known is None else known

    def settle(self, chosen: Iterable[tuple[Candidate, Form]]) -> bool:
        """Measure these, unless they are known; whether there was anything to measure."""
        unknown = [
            (candidate, form)
            for candidate, form in chosen
            if form.storage.grid is not None and (candidate.key, form.key) not in self._exact
        ]
        if not unknown:
            return False

        def measured(pair: tuple[Candidate, Form]) -> float:
            site, spectra = self._there(pair[0])
            return spectra.loss(site, pair[1]).squared_error

        found = dealt(
            measured,
            unknown,
            [candidate.draft.shape.work for candidate, _ in unknown],
            self._workers(candidate for candidate, _ in unknown),
            "rounding",
        )
        self._exact |= {(c.key, form.key): squared for (c, form), squared in zip(unknown, found, strict=True)}
        return True

    def _weight(self, candidate: Candidate) -> float:
        """What the errors of all tokens of a layer come to, of which `squares` are the mean; without gradients, what
        makes layers of one size and one relative error equal."""
        if self._weighted:
            return candidate.weight
        return candidate.draft.shape.dense_params / (candidate.tails[0] or 1.0)

    def _workers(self, candidates: Iterable[Candidate]) -> int:
        return self._spectra.workers(candidate.site.module.weight for candidate in candidates)

    def _there(self, candidate: Candidate) -> tuple[Site, Spectra]:
        """The layer, and who knows what it sees."""
        narrower = candidate.narrower
        if narrower is None:
            return candidate.site, self._spectra
        return narrower.site(candidate.site.fqn), Spectra(narrower.statistics)

    def _measured(self, candidates: list[Candidate], forms: dict[tuple, dict[Key, Form]]) -> dict[tuple, Rounding]:
        """How rounding goes in every layer; those that cannot be rounded lose their forms that are."""
        found: dict[tuple, Rounding] = {}

        def look(candidate: Candidate) -> Rounding | None:
            own = list(forms[candidate.key].values())
            whole = found.get((candidate.site.fqn, None))
            if candidate.narrower is not None and whole is None:
                return None
            try:
                site, spectra = self._there(candidate)
                if whole is not None:
                    return spectra.rounding_like(whole, site, candidate.draft.shape, own)
                return spectra.rounding(site, candidate.draft.shape, own, candidate.tails)
            except FactorizationError:
                return None

        for some in ([c for c in candidates if (c.narrower is None) == whole] for whole in (True, False)):
            work = [candidate.draft.shape.work for candidate in some]
            each = dealt(look, some, work, self._workers(some), "rounding")
            found |= {c.key: rounding for c, rounding in zip(some, each, strict=True) if rounding is not None}
        for candidate in candidates:
            if candidate.key not in found:
                own, as_it_is = forms[candidate.key], Form(None, candidate.draft.shape)
                plain = {key: form for key, form in own.items() if form.storage.grid is None}
                forms[candidate.key] = plain or {as_it_is.key: as_it_is}
        return found
