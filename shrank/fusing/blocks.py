"""A block's forward with fewer calls: its low-rank layers take over the activations, residuals and products that follow
them."""

from __future__ import annotations

import inspect

from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node, Tracer
from torch.fx.proxy import TraceError

from ..layers.led import LED
from ..layers.low_rank import LowRankLayer
from ..layers.two_stage import factors_of, is_untouched, ops_of
from ..ops import dispatch, reference
from .graph import take_place
from .rewrite import End

# What a forward raises that does with the stand-ins of a trace what only tensors can do, or gets inputs that do not
# fit. NameError: of a module that is no submodule.
DOES_NOT_RUN = (
    TraceError,
    TypeError,
    ValueError,
    AttributeError,
    LookupError,
    RuntimeError,
    AssertionError,
    NameError,
)


class NotFusedError(Exception):
    """Why a block is left as it is."""


def finish(layer: nn.Module, x: Tensor, activation: str, residual: Tensor | None) -> Tensor:
    """activation(layer(x)) + residual, whatever has become of the layer since: dense again, or with LoRA."""
    if isinstance(layer, LowRankLayer):
        return layer.finished(x, activation, residual)
    return reference.finished(layer(x), activation, residual)


def finish_gated(gate: nn.Module, value: nn.Module, x: Tensor, activation: str) -> Tensor:
    """activation(gate(x)) * value(x), whatever has become of the layers since."""
    if isinstance(gate, LED) and isinstance(value, LED):
        return gate.gated(value, x, activation)
    return finish(gate, x, activation, None) * value(x)


def finish_halves(layer: nn.Module, x: Tensor, activation: str, gate_is_first: bool) -> Tensor:
    """activation(gate) * value of the halves of layer(x), whatever has become of the layer since."""
    gate, value = (0, 1) if gate_is_first else (1, 0)
    factors = factors_of(layer.stages, layer.stage_kinds) if isinstance(layer, LED) and is_untouched(layer) else None
    # On a CPU the op would multiply by down twice, once for each half, and save nothing in return.
    if factors and ops_of(x, *factors) is dispatch:
        down, up, bias = factors
        ups, biases = up.chunk(2), (None, None) if bias is None else bias.chunk(2)
        return dispatch.low_rank_gated(x, down, ups[gate], biases[gate], down, ups[value], biases[value], activation)
    halves = layer(x).chunk(2, -1)
    return reference.finished(halves[gate], activation, None) * halves[value]


class _BlockTracer(Tracer):
    """Looks into modules that have nothing of their own, such as activations: all others are calls."""

    def __init__(self) -> None:
        super().__init__()
        self.looked_into: list[str] = []

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        has_own = next(module.children(), None) is not None or module._parameters or module._buffers
        leaf = bool(has_own) or isinstance(module, nn.Dropout) or not is_untouched(module)
        if not leaf:
            self.looked_into.append(qualified_name)
        return leaf


class FusedForward:
    """Stands in for the forward of one block, on its instance.

    The block's own forward runs where it would not be the same: in another mode of training than what was traced, with
    dropout, with hooks on a module that is no longer called, for other arguments than tensors by their places. It is
    made again where the block is copied or unpickled.
    """

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self._traced: Traced | None = None

    @property
    def traced(self) -> Traced:
        if self._traced is None:
            self._traced = traced(self.block)
        return self._traced

    @property
    def layers(self) -> list[str]:
        """The names of the low-rank layers that take something over."""
        return self.traced.layers

    def __getstate__(self) -> dict[str, object]:
        return {"block": self.block}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.block, self._traced = state["block"], None

    def __call__(self, *args: object, **kwargs: object) -> object:
        fused = self.traced
        if kwargs or len(args) != fused.inputs or self.block.training != fused.training or not fused.is_same(args):
            return type(self.block).forward(self.block, *args, **kwargs)
        return fused.function(self.block, *args)


class Traced:
    """What the tracer made of a block in one mode.

    graph: rewritten. silent: the modules that are no longer called.
    """

    def __init__(self, block: nn.Module, graph: Graph, silent: list[str], layers: list[str]) -> None:
        self.graph, self.training, self.layers = graph, block.training, layers
        self.inputs = sum(node.op == "placeholder" for node in graph.nodes)
        places = [name.rpartition(".") for name in silent]
        owners = [(block.get_submodule(path), key) for path, _, key in places]
        self.silent = [(owner._modules, key, owner._modules[key]) for owner, key in owners]
        self.function = type(GraphModule(block, graph)).forward  # which takes the block as its `self`

    def is_same(self, args: tuple[object, ...]) -> bool:
        """Whether the rewritten graph still says what the block would do."""
        for modules, key, module in self.silent:
            if modules.get(key) is not module or not is_untouched(module):
                return False
            if isinstance(module, nn.Dropout) and module.training and module.p:
                return False
        return all(isinstance(each, Tensor) for each in args)


def traced(block: nn.Module) -> Traced:
    """The block's graph with the ends of its low-rank layers in their calls; NotFusedError if there is nothing to do,
    or if it cannot be followed."""
    _check_inputs(block)
    tracer = _BlockTracer()
    try:
        graph = tracer.trace(block)
    except DOES_NOT_RUN as error:
        raise NotFusedError(f"its forward cannot be traced: {type(error).__name__}: {error}") from error
    silent, names = set(tracer.looked_into), []

    def calls(node: Node, kind: type[nn.Module]) -> bool:
        if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            return False
        return isinstance(block.get_submodule(node.target), kind)

    known = {"is_identity": lambda user: _is_dropout(block, user), "alike": lambda *_: True}
    for node in list(graph.nodes):
        if not calls(node, LowRankLayer):
            continue
        end = End.of(node, input_of=lambda each: each.args[0] if calls(each, LED) else None, **known)
        if end:
            names += [node.target, *([end.value.target] if end.value is not None else [])]
            _replace(graph, node, end)
        elif calls(node, LED):
            end = End.of_halves(node, node.args[0], block.get_submodule(node.target).out_features, **known)
            if end:
                names.append(node.target)
                _replace_halves(graph, node, end)
        silent.update(passed.target for passed in (end.passed if end else ()))
    if not names:
        raise NotFusedError("nothing follows its low-rank layers that they could take over")
    graph.lint()
    return Traced(block, graph, sorted(silent), names)


def _check_inputs(block: nn.Module) -> None:
    """NotFusedError unless all inputs of the forward must be given, by their places."""
    parameters = inspect.signature(type(block).forward).parameters.values()
    own = list(parameters)[1:]
    if any(each.kind is not each.POSITIONAL_OR_KEYWORD or each.default is not each.empty for each in own):
        raise NotFusedError("its forward has optional arguments")


def _is_dropout(block: nn.Module, node: Node) -> bool:
    return node.op == "call_module" and isinstance(block.get_submodule(node.target), nn.Dropout)


def _replace(graph: Graph, node: Node, end: End) -> None:
    with graph.inserting_before(end.last):
        layer, x = graph.create_node("get_attr", node.target), node.args[0]
        if end.value is None:
            fused = graph.call_function(finish, (layer, x, end.activation, end.residual))
        else:
            value = graph.create_node("get_attr", end.value.target)
            fused = graph.call_function(finish_gated, (layer, value, x, end.activation))
    take_place(graph, fused, end.last)


def _replace_halves(graph: Graph, node: Node, end: End) -> None:
    with graph.inserting_before(end.last):
        layer, x = graph.create_node("get_attr", node.target), node.args[0]
        fused = graph.call_function(finish_halves, (layer, x, end.activation, end.gate_is_first))
    take_place(graph, fused, end.last)
