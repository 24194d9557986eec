"""Models as DataParallel runs them."""

from __future__ import annotations

from torch import nn


def replica(model: nn.Module) -> nn.Module:
    """What nn.DataParallel makes of a model on every device: plain tensors where the parameters were."""
    old = list(model.modules())
    new = {id(m): m._replicate_for_data_parallel() for m in old}
    for module in old:
        made = new[id(module)]
        for name, child in module._modules.items():
            made._modules[name] = new[id(child)]
        for name, parameter in module._parameters.items():
            if parameter is None:
                made._parameters[name] = None
            else:
                setattr(made, name, parameter.clone())
        for name, buffer in module._buffers.items():
            made._buffers[name] = buffer
    return new[id(model)]
