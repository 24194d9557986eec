"""The third stage of pivoted storage, which puts the outputs of the first two into their places."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import reference
from .plain import is_untouched


class Pivots(nn.Module):
    """Puts h (..., R, ...), outputs themselves, and the other outputs (..., N - R, ...) in order along `dim`, which is
    negative, so that a batch may be missing.

    order: (N,), for every output its place among h and then the others. Where h is one window of the outputs, no gather
    is needed. `bias` is that of the outputs in h: added after the others were computed from it, since a large bias
    would cost h its digits in a 16-bit dtype. mixes_groups: whether pivots of one group are outputs of another, of
    which no convolution with groups makes all outputs. looked_at: whether stages that another tool made were found to
    bear pivots.
    """

    looked_at = False

    def __init__(
        self,
        rank: int,
        outputs: int,
        dim: int,
        bias: bool,
        groups: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.rank, self.dim, self.groups, self.mixes_groups = rank, dim, groups, False
        # Every group's first outputs are its pivots, until somebody knows better.
        parts = [torch.arange(n, dtype=torch.int32, device=device).view(groups, -1) for n in (rank, outputs - rank)]
        self.register_buffer("order", torch.cat((parts[0], parts[1] + rank), 1).flatten())
        self.register_parameter("bias", nn.Parameter(torch.zeros(rank, device=device, dtype=dtype)) if bias else None)
        self.window = 0 if groups == 1 and not self.order.is_meta else None

    def forward(self, h: Tensor, others: Tensor) -> Tensor:
        dim, bias = self.dim, self.bias
        if bias is not None:
            h = h + (bias if dim == -1 else bias[(slice(None), *[None] * (-dim - 1))])
        if self.window is None:
            return torch.cat((h, others), dim).index_select(dim, self.order)
        if self.window == 0:
            return torch.cat((h, others), dim)
        before, after = others.tensor_split((self.window,), dim)
        return torch.cat((before, h, after), dim)

    def all_rows(self, up: Tensor) -> Tensor:
        """The second factor (N, R / groups, ...) that makes all outputs: rows of the unit matrix for those in h.

        up: (N - R, R / groups, ...).
        """
        return reference.all_rows(up, self.order, self.groups)

    def settle(self) -> None:
        """Find out whether the order needs no gather and keeps groups apart; for whoever set `order`. ValueError if it
        is none."""
        places = self.order.long()
        plain = torch.arange(len(places), device=places.device)
        if not torch.equal(places.sort().values, plain):
            raise ValueError(f"the order of pivoted outputs is no permutation of {len(places)} places")
        first, rank = int((places == 0).nonzero()[0]), self.rank
        window = torch.cat((plain[rank : rank + first], plain[:rank], plain[rank + first :]))
        self.window = first if torch.equal(places, window) else None
        others = len(places) - rank
        of = torch.where(places < rank, places * self.groups // rank, (places - rank) * self.groups // max(others, 1))
        self.mixes_groups = not torch.equal(of, plain * self.groups // len(places))

    def _load_from_state_dict(self, *arguments: object) -> None:
        super()._load_from_state_dict(*arguments)
        if not self.order.is_meta:
            self.settle()


def run_pivots(pivots: nn.Module, h: Tensor, others: Tensor) -> Tensor:
    """The third stage; without the cost of calling a module, a fifth of a small layer's, where nobody is to notice."""
    return pivots.forward(h, others) if is_untouched(pivots) else pivots(h, others)
