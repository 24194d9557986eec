"""Tensor parallelism: PyTorch's styles for linear layers, which split low-rank layers too.

y = (x @ down.T) @ up.T + bias is split by its outputs or by its inputs. What goes between processes is h or its
gradient, R numbers for each token, where a dense layer sends its inputs' gradient or its outputs.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, distribute_module
from torch.distributed.tensor import parallel as styles

from .led import LED
from .plain import why_no_matrix


class _OfLowRank(styles.ParallelStyle):
    """What a style does to a layer: a low-rank one is split by `_split`, any other as by PyTorch."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, LED):
            return super()._apply(module, device_mesh)
        (layout,), (out,) = self.input_layouts, self.output_layouts
        self._split(*splittable_stages(module), layout, out, device_mesh)
        return module


class ColwiseParallel(_OfLowRank, styles.ColwiseParallel):
    """PyTorch's style of this name, for low-rank layers too: each process computes a part of the outputs.

    A low-rank layer has its down factor whole and its up factor and bias by rows. If the inputs are split by
    positions, h is gathered in their place.

    Args:
        input_layouts: The placement of the inputs; replicated by default.
        output_layouts: The placement of the outputs; by default split by their last dimension.
        use_local_output: Give a tensor of this process instead of a DTensor.

    Raises:
        ValueError: A low-rank layer is pivoted, or another tool changed it.
    """

    def _split(self, first: nn.Linear, second: nn.Linear, layout: Placement, out: Placement, mesh: DeviceMesh) -> None:
        by_rows = styles.ColwiseParallel(
            input_layouts=layout, output_layouts=out, use_local_output=self.use_local_output
        )
        by_rows.src_data_rank = self.src_data_rank
        _apply_whole(first, mesh, layout, local_output=True)
        by_rows._apply(second, mesh)


class RowwiseParallel(_OfLowRank, styles.RowwiseParallel):
    """PyTorch's style of this name, for low-rank layers too: each process has a part of the inputs.

    A low-rank layer has its down factor by columns and its up factor and bias whole. h is summed over the processes. If
    the outputs are to be split by positions, h is split so, and each process computes its own.

    Args:
        input_layouts: The placement of the inputs; by default split by their last dimension.
        output_layouts: The placement of the outputs; replicated by default.
        use_local_output: Give a tensor of this process instead of a DTensor.

    Raises:
        ValueError: A low-rank layer is pivoted, or another tool changed it.
    """

    def _split(self, first: nn.Linear, second: nn.Linear, layout: Placement, out: Placement, mesh: DeviceMesh) -> None:
        by_columns = styles.RowwiseParallel(input_layouts=layout, output_layouts=out)
        by_columns.src_data_rank = self.src_data_rank
        by_columns._apply(first, mesh)
        _apply_whole(second, mesh, out, local_output=self.use_local_output)


def splittable_stages(layer: LED) -> list[nn.Linear]:
    """Both stages; ValueError if they cannot be split between processes."""
    if layer.pivoted:
        raise ValueError(
            f"LED({layer.extra_repr()}): pivoted factors cannot be split between "
            "processes, as outputs depend on outputs: call shrank.unpivot(model) first, or compress with pivot=False"
        )
    stages = list(layer.stages)
    for stage in stages:
        if reason := why_no_matrix(stage):
            raise ValueError(f"LED({layer.extra_repr()}) cannot be split between processes: a stage of it {reason}")
    return stages


def _apply_whole(stage: nn.Module, mesh: DeviceMesh, layout: Placement, local_output: bool) -> None:
    """All processes have the whole of this stage, and its inputs and outputs in this placement."""
    distribute_module(stage, mesh, None, partial(_placed, layout), partial(_given, local_output))


def _placed(layout: Placement, module: nn.Module, inputs: tuple, mesh: DeviceMesh) -> DTensor:
    (x,) = inputs
    return x if isinstance(x, DTensor) else DTensor.from_local(x, mesh, (layout,), run_check=False)


def _given(local_output: bool, module: nn.Module, output: DTensor, mesh: DeviceMesh) -> Tensor:
    return output.to_local() if local_output else output
