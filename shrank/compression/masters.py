"""Copies in float32 of parameters that are trained: what an optimizer changes, whatever the parameters' own dtype."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..util.processes import current

BETAS, LARGEST_NORM = (0.9, 0.95), 1.0


class Masters(dict[str, Tensor]):
    """The copies, by name.

    Args:
        trained: The parameters.
    """

    def __init__(self, trained: Mapping[str, nn.Parameter]) -> None:
        super().__init__({name: p.detach().float().clone() for name, p in trained.items()})
        self._trained = trained

    def optimizer(self, learning_rate: float) -> torch.optim.AdamW:
        return torch.optim.AdamW(self.values(), lr=learning_rate, betas=BETAS, weight_decay=0.0)

    def clear_gradients(self) -> None:
        for master in self.values():
            master.grad = None

    def take_gradients(self) -> None:
        """Add those of the parameters, in float32."""
        for name, master in self.items():
            gradient, self._trained[name].grad = self._trained[name].grad, None
            if gradient is not None:
                master.grad = gradient.float() if master.grad is None else master.grad.add_(gradient)

    def step(self, optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
        """One of the optimizer, with the gradients of all processes, and the parameters after it."""
        self._sum_gradients()
        nn.utils.clip_grad_norm_(self.values(), LARGEST_NORM)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        self.show()

    def copies(self) -> dict[str, Tensor]:
        return {name: master.clone() for name, master in self.items()}

    @torch.no_grad()
    def take(self, values: Mapping[str, Tensor]) -> None:
        """Become these, as the parameters do."""
        for name, master in self.items():
            master.copy_(values[name])
        self.show()

    @torch.no_grad()
    def show(self) -> None:
        """Give the parameters their values."""
        for name, parameter in self._trained.items():
            parameter.copy_(self[name])

    def _sum_gradients(self) -> None:
        """Over the processes."""
        for master in self.values():
            master.grad = torch.zeros_like(master) if master.grad is None else master.grad
        here = current()
        if here.size > 1:
            gradients = [master.grad for master in self.values()]
            total = here.summed(torch.cat([g.flatten() for g in gradients]))
            for gradient, part in zip(gradients, total.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))
