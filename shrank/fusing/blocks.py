"""A block's forward with fewer calls: its low-rank layers take over the norms, activations, residuals and products that
follow them, and those of one input become one call."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection, Iterator

from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node, Tracer
from torch.fx.proxy import TraceError
from torch.nn.modules.batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm

from ..layers.ced import CED
from ..layers.led import LED
from ..layers.low_rank import LowRankLayer
from ..layers.plain import is_untouched
from .end import End, Reading
from .finish import finish, finish_gated, finish_halves, finish_normed, finish_siblings
from .graph import take_place
from .siblings import join_siblings

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
_NORMS = (BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm)


class NotFusedError(Exception):
    """Why a block is left as it is."""


class _BlockTracer(Tracer):
    """Looks into modules that have nothing of their own, such as activations, and into those named: all others are
    calls."""

    def __init__(self, inside: Collection[str]) -> None:
        super().__init__()
        self.inside, self.looked_into = inside, []

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        has_own = next(module.children(), None) is not None or module._parameters or module._buffers
        closed = has_own and qualified_name not in self.inside
        if closed or isinstance(module, nn.Dropout) or not is_untouched(module):
            return True
        self.looked_into.append(qualified_name)
        return False


class FusedForward:
    """Stands in for the forward of one block, on its instance.

    The block's own forward runs where it would not be the same: in another mode of training than what was traced, with
    dropout, with hooks on a module that is no longer called, for other arguments than tensors by their places. It is
    made again where the block is copied or unpickled.

    inside: the names of the modules in the block that its forward becomes one with.
    """

    def __init__(self, block: nn.Module, inside: Collection[str] = ()) -> None:
        self.block, self.inside = block, inside
        self._traced: Traced | None = None

    @property
    def traced(self) -> Traced:
        if self._traced is None:
            self._traced = Traced(self.block, self.inside)
        return self._traced

    @property
    def layers(self) -> list[str]:
        """The names of the low-rank layers that take something over, or are called together."""
        return self.traced.layers

    def __getstate__(self) -> dict[str, object]:
        return {"block": self.block, "inside": self.inside}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.block, self.inside, self._traced = state["block"], state["inside"], None

    def __call__(self, *args: object, **kwargs: object) -> object:
        fused = self.traced
        if kwargs or len(args) != fused.inputs or self.block.training != fused.training or not fused.is_same(args):
            return type(self.block).forward(self.block, *args, **kwargs)
        return fused.function(self.block, *args)


class Traced:
    """What the tracer made of a block in one mode; NotFusedError if it cannot be followed.

    graph: with the ends of low-rank layers in their calls. gain: how many calls there are less. looked_into: the names
    of modules that the graph has become one with. silent: those and others that are no longer called, where they are,
    and in which mode.
    """

    def __init__(self, block: nn.Module, inside: Collection[str] = ()) -> None:
        _check_inputs(block)
        tracer = _BlockTracer(inside)
        try:
            self.graph = tracer.trace(_copy_of(block))
        except DOES_NOT_RUN as error:
            raise NotFusedError(f"its forward cannot be traced: {type(error).__name__}: {error}") from error
        if any(node.op == "get_attr" and node.target.startswith("_tensor_constant") for node in self.graph.nodes):
            raise NotFusedError("its forward has tensors that are neither parameters nor buffers")
        self.training, self.layers, self.gain = block.training, [], 0
        self.inputs = sum(node.op == "placeholder" for node in self.graph.nodes)
        self.looked_into = tracer.looked_into
        silent = {*self.looked_into, *self._rewrite(block)}
        self.graph.lint()
        places = [name.rpartition(".") for name in sorted(silent)]
        owners = [(block.get_submodule(path)._modules, key) for path, _, key in places]
        self.silent = [(modules, key, modules[key], modules[key].training) for modules, key in owners]
        self.function = type(GraphModule(block, self.graph)).forward  # which takes the block as its `self`

    def is_same(self, args: tuple[object, ...]) -> bool:
        """Whether the rewritten graph still says what the block would do."""
        for modules, key, module, training in self.silent:
            if modules.get(key) is not module or module.training is not training or not is_untouched(module):
                return False
            if training and isinstance(module, nn.Dropout) and module.p:
                return False
        return all(isinstance(each, Tensor) for each in args)

    def _rewrite(self, block: nn.Module) -> Iterator[str]:
        """Changes the graph; the names of the modules whose calls were dropped."""
        reading = _reading_of(block, self.graph)
        for node in list(self.graph.nodes):
            layer = _called(block, node)
            if not isinstance(layer, LowRankLayer) or not layer.takes_ends:
                continue
            end = End.of(node, reading, 1 if isinstance(layer, CED) else None)
            if end and end.norm and end.gain == 1:
                continue  # to fold a norm takes two calls
            if end is None and isinstance(layer, LED):
                end = End.of_halves(node, node.args[0], layer.out_features, reading)
                replace = _replace_halves
            else:
                replace = _replace
            if end:
                self.gain += end.gain
                self.layers += [node.target, *_names(end)]
                replace(self.graph, node, end)
                yield from (passed.target for passed in end.passed)
        for joined in join_siblings(self.graph, reading.input_of, lambda _: [], _together):
            self.gain += len(joined) - 1
            self.layers += [node.target for node in joined]


def _copy_of(block: nn.Module) -> nn.Module:
    """One with the same tensors: a forward may keep what it computes, as a cache, and of a trace that is no tensor."""
    return copy.deepcopy(block, {id(each): each for each in (*block.parameters(), *block.buffers())})


def _check_inputs(block: nn.Module) -> None:
    """NotFusedError unless all inputs of the forward must be given, by their places."""
    parameters = inspect.signature(type(block).forward).parameters.values()
    own = list(parameters)[1:]
    if any(each.kind is not each.POSITIONAL_OR_KEYWORD or each.default is not each.empty for each in own):
        raise NotFusedError("its forward has optional arguments")


def _called(block: nn.Module, node: Node) -> nn.Module | None:
    """The module that a node calls with one input."""
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return None
    return block.get_submodule(node.target)


def _reading_of(block: nn.Module, graph: Graph) -> Reading:
    modules = {node: _called(block, node) for node in graph.nodes}
    return Reading(
        is_identity=lambda node: isinstance(modules.get(node), nn.Dropout),
        alike=lambda *_: True,
        input_of=lambda node: node.args[0] if isinstance(modules.get(node), LED) else None,
        norm_of=lambda node: node.target if _is_settled(modules.get(node)) else None,
        quiet=tuple(node for node, module in modules.items() if _is_quiet(module)),
    )


def _is_settled(module: nn.Module | None) -> bool:
    """Whether a module is a batch norm that does not learn its statistics."""
    return type(module) in _NORMS and not module.training and module.running_mean is not None and is_untouched(module)


def _is_quiet(module: nn.Module | None) -> bool:
    """Whether a module is known to do nothing to its input, or to what autograd and autocast do."""
    if module is None or not is_untouched(module) or getattr(module, "inplace", False):
        return False
    return isinstance(module, LowRankLayer) or type(module).__module__.startswith("torch.nn.modules.")


def _names(end: End) -> list[str]:
    return [] if end.value is None or end.value.op != "call_module" else [end.value.target]


def _replace(graph: Graph, node: Node, end: End) -> None:
    with graph.inserting_before(end.last):
        layer, x = graph.create_node("get_attr", node.target), node.args[0]
        if end.value is not None:
            value = graph.create_node("get_attr", end.value.target)
            fused = graph.call_function(finish_gated, (layer, value, x, end.activation))
        elif end.norm:
            norm = graph.create_node("get_attr", end.norm)
            fused = graph.call_function(finish_normed, (layer, norm, x, end.activation, end.residual))
        else:
            fused = graph.call_function(finish, (layer, x, end.activation, end.residual))
    take_place(graph, fused, end.last)


def _replace_halves(graph: Graph, node: Node, end: End) -> None:
    with graph.inserting_before(end.last):
        layer, x = graph.create_node("get_attr", node.target), node.args[0]
        fused = graph.call_function(finish_halves, (layer, x, end.activation, end.gate_is_first))
    take_place(graph, fused, end.last)


def _together(graph: Graph, x: Node, nodes: list[Node]) -> Node:
    layers = [graph.create_node("get_attr", node.target) for node in nodes]
    return graph.call_function(finish_siblings, (x, *layers))
