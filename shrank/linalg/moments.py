"""The norm in which a layer's error counts: second moments of what it saw and of what its outputs do to the loss.

For a weight W and inputs x, the loss grows by about half of E (d^T (W - W') x)^2, with d the gradient at the layer's
output. Taken apart as K-FAC does (Martens and Grosse, 2015), that is ||R (W - W') S||_F^2 with R R = E d d^T and
S S^T = E x x^T; without gradients R is the identity and the norm is the error of the outputs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import parts

# Weight of the diagonal in the second moment of the inputs: least error held out, 40 to 4000 samples of 192 features
# with outliers (1 % to 30 %); it also orders directions that no input took.
_SMALLEST_SHRINKAGE, _LARGEST_SHRINKAGE = 0.01, 0.3
# Gradients are fewer than inputs where one output gathers many tokens: all-MiniLM-L6-v2 at keep 0.6 has a cosine of
# 0.810, 0.831 and 0.859 with 0.03, 0.1 and 0.3 for gradients of 128 sentence embeddings, and 0.927, 0.926 and 0.923
# for those of 4000 tokens.
_SMALLEST_GRADIENT_SHRINKAGE, _LARGEST_GRADIENT_SHRINKAGE = 0.03, 0.9
# Dead inputs get this share of the mean energy, so that the weights alone rank the directions that only they feed.
_FLOOR = 1e-6
# Outputs of a layer that has more of them than inputs depend on each other, to rounding.
_SINGULAR = 1e-12


@dataclass(frozen=True)
class Moments:
    """What one layer saw in `tokens` tokens: means of outer products, float32.

    data: (G, N/G, N/G) of its outputs without bias, or (1, K, K) of its inputs if `of_inputs`. mean: (G, N/G) or
    (1, K), of the same. input_energy: (G, K/G), mean squares of the inputs. gradient: of the gradients at the outputs,
    (G, N/G, N/G), or where `of_inputs` and N > K, unless some of the outputs may go, of those gradients times the
    weight, (1, K, K); None: not measured.
    gradient_samples: rows of the model's output that they stem from. anchor: E t s^T, shaped as `data`, where the layer
    sees s and should act as if it saw t; None: they are the same. anchor_mean: of t. channels (1, C, C), channel_mean
    (1, C): of a convolution's inputs, channel by channel over all positions; None: not observed.
    """

    tokens: int
    data: Tensor
    mean: Tensor
    input_energy: Tensor
    of_inputs: bool
    gradient: Tensor | None = None
    gradient_samples: int = 0
    anchor: Tensor | None = None
    anchor_mean: Tensor | None = None
    channels: Tensor | None = None
    channel_mean: Tensor | None = None

    def to(self, device: torch.device) -> Moments:
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)

    def of(self, kept: Kept) -> Moments:
        """What the layer sees with these rows and columns of its matrix alone, which is fitted to what it should do.

        ValueError where gradients are known only as all of the outputs feel them together.
        """
        changed: dict[str, Tensor | None] = {}
        if kept.rows is not None and self.gradient is not None:
            if self.of_inputs and self.gradient.shape[-1] == self.data.shape[-1] != kept.outputs:
                raise ValueError("gradients were observed at the inputs, where outputs cannot be told apart")
            changed["gradient"] = _part(self.gradient, kept.rows)
        if kept.rows is not None and not self.of_inputs:
            names = ("data", "mean", "anchor", "anchor_mean")
            changed |= {name: _part(value, kept.rows) for name in names if (value := getattr(self, name)) is not None}
        if kept.columns is not None:
            changed["input_energy"] = self.input_energy[:, kept.columns]
            # The fit is the regression of what the layer should do: what is left of its error is beyond all columns.
            changed |= {"anchor": None, "anchor_mean": None}
            if self.of_inputs:
                changed |= {name: _part(getattr(self, name), kept.columns) for name in ("data", "mean")}
        return replace(self, **changed)


@dataclass(frozen=True)
class Kept:
    """What is left of a layer that loses rows or columns of its matrix (N, K): their numbers, None for all; and where
    it loses rows N."""

    rows: Tensor | None = None
    columns: Tensor | None = None
    outputs: int = 0


@dataclass(frozen=True)
class Metric:
    """The norm of a layer's error on the smaller side of its weight, in float64: positive definite `data` and
    `gradient`, each (G, m, m), `gradient` None for the identity; `on_inputs`: m = K, else m = N.

    `mean`: of the data, if the bias is to make up for it; else None. `towards`: where the matrices to approximate are
    not W, the layer's own, they are W T with this T (G, K, K) if it is `towards_inputs`, else T W with (G, N, N); and
    `shift` (G, N) what its mean output then lacks even without an error.
    `inputs` (1, K, K): the data of the inputs, where they were observed and rounding of weights may need them, whatever
    side is smaller; `input_mean` (1, K): their mean, if the bias is to make up for it.
    """

    data: Tensor
    gradient: Tensor | None
    on_inputs: bool
    mean: Tensor | None
    towards: Tensor | None = None
    towards_inputs: bool = False
    shift: Tensor | None = None
    inputs: Tensor | None = None
    input_mean: Tensor | None = None


@dataclass(frozen=True)
class Columns:
    """The norm of a layer's error by its inputs one by one, in float64: positive definite `data` (K, K), their second
    moment, and `worth` (K, K), which is `goal^T G goal` with the gradients' moment G.

    goal: the matrix (N, K) to approximate. `mean` (K,): of the inputs, if a bias is to make up for it; else None.
    `shift` (N,): what the mean output lacks even without an error. `taps`: where the inputs are channels that a kernel
    of so many taps sees, the goal is (N taps, K), with the taps of one output after another.
    """

    data: Tensor
    worth: Tensor
    goal: Tensor
    mean: Tensor | None
    shift: Tensor | None = None
    taps: int = 1


def _part(moment: Tensor, kept: Tensor) -> Tensor:
    """Of a moment (G, m, m), or a mean (G, m), that of these features."""
    return moment[:, kept] if moment.ndim == 2 else moment[:, kept][..., kept]


def metric(matrices: Tensor, moments: Moments, centred: bool, inputs: bool = False) -> Metric:
    """The shrunk norm for matrices (G, N, K); centred: a bias will take up the mean of the error, which is then free.

    inputs: Keep what is known of the inputs where the outputs are fewer, too.

    Source: the shrinkage towards the diagonal is that of Ledoit and Wolf (2004) with another target.
    """
    W, mean, of_inputs = matrices, moments.mean.double(), moments.of_inputs
    on_inputs = of_inputs and W.shape[-2] > W.shape[-1]
    data, towards, shift = _shrunk_data(W, moments, centred)
    of_columns, column_mean = (data, mean) if of_inputs and (inputs or on_inputs) else (None, None)
    right = towards if of_inputs else None
    if towards is not None and not of_inputs:
        data, mean = towards @ data @ towards.mT, (towards @ mean[..., None])[..., 0]
    if of_inputs and not on_inputs:
        mean_input = mean[..., None] if right is None else right @ mean[..., None]
        data, mean = data if right is None else right @ data @ right.mT, parts.times(W, mean_input)[..., 0]
        data = parts.through(W, data)
    gradient = None if moments.gradient is None else _shrunk_gradient(W, right, moments, on_inputs)
    if not centred:
        mean = shift = column_mean = None
    return Metric(data, gradient, on_inputs, mean, towards, of_inputs, shift, of_columns, column_mean)


def goal_of(matrices: Tensor, metric: Metric | None) -> Tensor:
    """What the approximation of matrices (G, N, K) is to come near to, float64."""
    W = matrices.double()
    if metric is None or metric.towards is None:
        return W
    return W @ metric.towards if metric.towards_inputs else metric.towards @ W


def columns(matrix: Tensor, moments: Moments, centred: bool) -> Columns:
    """The shrunk norm for a matrix (1, N, K), whose moments are those of its inputs; centred: as of `metric`."""
    of_inputs = moments.gradient is not None and matrix.shape[-2] > matrix.shape[-1]
    data, towards, shift = _shrunk_data(matrix, moments, centred)
    # Of units that hardly change, sums in float32 leave no more than this of what is around their mean.
    data.diagonal(dim1=-2, dim2=-1).add_(moments.data.diagonal(dim1=-2, dim2=-1), alpha=_FLOOR)
    goal = matrix.double() if towards is None else matrix.double() @ towards
    worth = None if moments.gradient is None else _shrunk_gradient(matrix, towards, moments, of_inputs)
    if not of_inputs:
        worth = goal.mT @ goal if worth is None else goal.mT @ worth @ goal
    mean = moments.mean.double()[0] if centred else None
    return Columns(data[0], worth[0], goal[0], mean, shift[0] if centred and shift is not None else None)


def channel_columns(matrix: Tensor, moments: Moments, centred: bool) -> Columns:
    """The norm for the matrix (1, N, C taps) of a convolution by its channels, which were observed; centred: as of
    `metric`.

    What stays makes up for a channel that goes in the same way at every tap, so that the moment of all taps' inputs,
    which is `taps` times as wide, is never asked for. Errors at different taps then count as if they were independent,
    scaled to what the outputs really are: neighbouring positions are alike.
    """
    W, data = matrix[0].double(), _about(moments.channels, moments.channel_mean, moments.channel_mean, centred)[0]
    outputs, taps = len(W), W.shape[1] // len(data)
    energy = data.diagonal().clamp_min(0)
    data.lerp_(
        (energy + _FLOOR * energy.mean().clamp_min(torch.finfo(torch.float32).tiny)).diag_embed(),
        _shrinkage(len(data), moments.tokens),
    )
    gradient = None if moments.gradient is None else _shrunk_gradient(matrix, None, moments, False)[0]
    seen = moments.mean.double()
    output = _about(moments.data, seen, seen, centred)[0]

    def by_tap(matrix: Tensor) -> Tensor:
        return matrix.unflatten(1, (-1, taps)).mT.reshape(outputs * taps, -1)

    goal = by_tap(W)
    worth = goal.mT @ (goal if gradient is None else by_tap(gradient @ W))
    told = (worth * data).sum()
    energy = output.diagonal().sum() if gradient is None else (gradient * output).sum()
    if told > 0:
        worth *= energy.clamp_min(0) / told
    return Columns(data, worth, goal, moments.channel_mean[0].double() if centred else None, taps=taps)


def _shrunk_data(W: Tensor, moments: Moments, centred: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The moment of what the layer sees. If it is anchored also what makes of that most nearly what it should see, and
    the mean output that even this lacks.

    Source: least squares of the dense outputs, as in AA-SVD and PIFA.
    """
    mean, of_inputs = moments.mean.double(), moments.of_inputs
    data = _about(moments.data, mean, mean, centred)
    energy = data.diagonal(dim1=-2, dim2=-1) if centred and of_inputs else moments.input_energy.double()
    energy = energy.clamp_min(0) + _FLOOR * energy.mean(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    prior = energy.diag_embed() if of_inputs else parts.through(W, energy)
    share = _shrinkage(W.shape[-1] if of_inputs else W.shape[-2], moments.tokens)
    data.lerp_(prior, share)
    if moments.anchor is None:
        return data, None, None
    wanted = moments.anchor_mean.double()
    # Where little was seen the prior has its way, in which the layer sees what it should.
    cross = _about(moments.anchor, wanted, mean, centred).lerp_(prior, share)
    del prior
    towards = cross @ torch.linalg.pinv(data, rtol=_SINGULAR, hermitian=True)
    lacking = wanted[..., None] - towards @ mean[..., None]
    return data, towards, (parts.times(W, lacking) if of_inputs else lacking)[..., 0]


def _about(moment: Tensor, left: Tensor, right: Tensor, centred: bool) -> Tensor:
    """The moment, or around these means."""
    moment = moment.to(torch.float64, copy=True)
    return moment.sub_(left[..., :, None] * right[..., None, :]) if centred else moment


def _shrinkage(features: int, tokens: int) -> float:
    return min(max(features / (features + 10 * tokens), _SMALLEST_SHRINKAGE), _LARGEST_SHRINKAGE)


def _shrunk_gradient(W: Tensor, right: Tensor | None, moments: Moments, on_inputs: bool) -> Tensor:
    """The gradients' moment, as the inputs feel it if `on_inputs`, mixed with the one of as strong gradients that
    prefer no output; right: beside W."""
    gradient = moments.gradient.to(torch.float64, copy=True)
    if on_inputs and gradient.shape[-1] != W.shape[-1]:
        gradient = parts.through(W.mT, gradient)
    if on_inputs:
        neutral = parts.gram(W)
        if right is not None:
            gradient, neutral = right.mT @ gradient @ right, right.mT @ neutral @ right
    else:
        neutral = torch.eye(W.shape[-2], dtype=gradient.dtype, device=W.device).repeat(len(gradient), 1, 1)
    neutral *= gradient.diagonal(dim1=-2, dim2=-1).sum() / neutral.diagonal(dim1=-2, dim2=-1).sum()
    m = gradient.shape[-1]
    share = min(max(m / (m + moments.gradient_samples), _SMALLEST_GRADIENT_SHRINKAGE), _LARGEST_GRADIENT_SHRINKAGE)
    return gradient.lerp_(neutral, share)
