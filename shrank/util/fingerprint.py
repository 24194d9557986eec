"""A hash of everything that distinguishes values, functions and models; or the statement of what cannot be hashed.

Nothing is known by its address or its `repr`: what has no value that can be read raises Unhashable.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
import sysconfig
from collections import deque
from collections.abc import Iterable, Iterator, Set
from contextlib import contextmanager
from functools import cache
from pathlib import Path, PurePath
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType

import torch
from torch import Tensor, nn

from . import nested

# What `repr` tells wholly.
_PLAIN = {
    str,
    bytes,
    bool,
    int,
    float,
    complex,
    type(None),
    type(...),
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    torch.Size,
}
# Of a module, what does not bear on what its layers see in eval mode: where it came from, how it is stored and loaded,
# and what accelerate wraps around it.
_IRRELEVANT = {
    "training",
    "warnings_issued",
    "_parameters",
    "_buffers",
    "_modules",
    "_hf_hook",
    "_old_forward",
    "hf_device_map",
    "_name_or_path",
    "name_or_path",
    "_commit_hash",
    "_original_object_hash",  # of a generation config: another one in every process
    "_non_persistent_buffers_set",
    "_is_hf_initialized",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
    "_compiled_call_impl",
    "_is_full_backward_hook",
    "_flat_weights",
    "_flat_weight_refs",
    "_output_capturing_hooks_installed",
    "main_input_name",
}
_BY_NUMBER = {
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
}
_OF_EVERY_CLASS = {
    "__dict__",
    "__weakref__",
    "__module__",
    "__doc__",
    "__annotations__",
    "__annotate__",
    "__slots__",
    "__firstlineno__",
    "__static_attributes__",
    "__abstractmethods__",
    "_abc_impl",
    "__orig_bases__",
    "__parameters__",
    "__dataclass_fields__",
    "__dataclass_params__",
    "__match_args__",
    "__qualname__",
    "__annotate_func__",
    "__annotations_cache__",
}
_ENTERED = (list, tuple, deque)
_HEAP_TYPE = 1 << 9  # in the flags of a class: it was not made in C
_INSTALLED = {Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")}


class Unhashable(TypeError):
    """A value that has nothing to be hashed by; says which, and where it is."""


def fingerprint(*values: object) -> str:
    """A hash of these values; raises Unhashable."""
    return _Digest().of(values).hexdigest()


class _Digest:
    """One hash in the making: it knows objects that it met before by their number."""

    def __init__(self) -> None:
        self._hash, self._met = hashlib.sha256(), {}

    def of(self, value: object, path: str = "") -> hashlib._Hash:
        self._add(value, path)
        return self._hash

    def _tell(self, text: str) -> None:
        self._hash.update(f"{len(text)}:{text}".encode())

    def _add(self, value: object, path: str) -> None:
        if type(value) in _PLAIN or isinstance(value, PurePath):
            return self._tell(f"{type(value).__name__} {value!r}")
        if isinstance(value, Tensor):
            return self._add_tensor(value, path)
        if id(value) in self._met:
            return self._tell(f"again {self._met[id(value)][0]}")
        self._met[id(value)] = (len(self._met), value)
        for kinds, add in (
            (nn.Module, self._add_module),
            (type, self._add_class),
            (ModuleType, self._add_import),
            (FunctionType, self._add_function),
            (CodeType, self._add_code),
            (MethodType, self._add_method),
            (BuiltinFunctionType, self._add_builtin),
            (dict, self._add_dict),
            (Set, self._add_set),
        ):
            if isinstance(value, kinds):
                return add(value, path)
        return self._add_object(value, path)

    def _add_all(self, entries: Iterable[tuple[str, object]], path: str) -> None:
        for way, entry in entries:
            self._tell(way)
            self._add(entry, path + way)
        self._tell("end")

    def _add_tensor(self, value: Tensor, path: str) -> None:
        if hasattr(value, "__tensor_flatten__"):  # a subclass that is made of other tensors
            names, context = value.__tensor_flatten__()
            self._add(type(value), path)
            return self._add_all([*((f".{n}", getattr(value, n)) for n in names), (" context", context)], path)
        self._tell(f"tensor {value.dtype} {tuple(value.shape)}")
        if value.is_meta or value.layout is not torch.strided or value.is_quantized or value.is_nested:
            what = "on the meta device" if value.is_meta else f"that is sparse, quantized or nested ({value.layout})"
            raise Unhashable(f"{path or 'the value'} is a tensor {what}")
        value = value.detach().cpu().resolve_conj().resolve_neg().contiguous().flatten()
        self._hash.update(value.view(torch.uint8).numpy())

    def _add_module(self, module: nn.Module, path: str) -> None:
        """The state, with buffers that are not saved, the structure and the settings."""
        self._add(type(module), path)
        with _on_hand(module):
            self._add_all([(f".{n}", t) for n, t in (*module._parameters.items(), *module._buffers.items())], path)
        self._add_all([(f".{name}", child) for name, child in module._modules.items()], path)
        for name, value in sorted(vars(module).items()):
            if name in _BY_NUMBER:
                self._add_all([(f".{name}", hook) for hook in value.values()], path)
            elif name not in _IRRELEVANT and not (name == "forward" and hasattr(module, "_hf_hook")):
                self._add_all([(f".{name}", value)], path)

    def _add_class(self, kind: type, path: str) -> None:
        self._tell(_name(kind))
        if not _is_installed(kind.__module__):
            self._add_all([(f".{base.__name__}", base) for base in kind.__bases__], path)
            self._add_all(
                [
                    (f".{n}", part)
                    for n, v in sorted(vars(kind).items())
                    if n not in _OF_EVERY_CLASS
                    for part in _parts(v)
                ],
                path,
            )

    def _add_import(self, module: ModuleType, path: str) -> None:
        self._tell(f"module {module.__name__}")

    def _add_builtin(self, function: BuiltinFunctionType, path: str) -> None:
        self._tell(f"builtin {function.__qualname__}")
        self._add(function.__self__, path)

    def _add_method(self, method: MethodType, path: str) -> None:
        self._add_all([(".__func__", method.__func__), (".__self__", method.__self__)], path)

    def _add_function(self, function: FunctionType, path: str) -> None:
        """Its code, its defaults, what it closes over, and the globals that it reads unless it is installed."""
        self._tell(_name(function))
        closure = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        read = {} if _is_installed(function.__module__) else _globals(function)
        self._add_all(
            [
                (".__code__", function.__code__),
                (".__defaults__", function.__defaults__),
                (".__kwdefaults__", function.__kwdefaults__),
                *((f" closing over {name}", _content(cell)) for name, cell in closure),
                *((f" reading {name}", value) for name, value in read.items()),
            ],
            path,
        )

    def _add_code(self, code: CodeType, path: str) -> None:
        self._tell(code.co_code.hex())
        self._add_all(
            [(" names", code.co_names), (" variables", code.co_varnames), (" constants", code.co_consts)], path
        )

    def _add_dict(self, value: dict, path: str) -> None:
        self._add(type(value), path)
        for key, entry in value.items():
            self._add(key, f"{path}: the key {key!r}")
            self._add(entry, f"{path}[{key!r}]")
        self._add_all([(f".{n}", v) for n, v in nested.attributes(value).items() if n not in value], path)

    def _add_set(self, value: Set, path: str) -> None:
        self._add(type(value), path)
        self._tell(" ".join(sorted(_Digest().of(entry, path).hexdigest() for entry in value)))

    def _add_object(self, value: object, path: str) -> None:
        """By its entries and attributes; where it has none, by what pickle would keep of it."""
        self._add(type(value), path)
        held = nested.children(value)
        self._add_all([(way, x) for way, x in held if way.removeprefix(".") not in _IRRELEVANT], path)
        if isinstance(value, _ENTERED) or (held and _solid_base(type(value)) is object):
            return None
        try:
            kept = value.__reduce_ex__(2)
        except TypeError as error:
            raise Unhashable(
                f"{path or 'the value'} is a {type(value).__name__}, which has no value to hash by"
            ) from error
        if isinstance(kept, str):  # the name of something that there is once
            return self._tell(f"{type(value).__module__} {kept}")
        states = (list(part) if isinstance(part, Iterator) else part for part in kept)
        return self._add_all([(f" part {i}", state) for i, state in enumerate(states)], path)


@contextmanager
def _on_hand(module: nn.Module) -> Iterator[None]:
    """With the parameters that accelerate has put away."""
    if not hasattr(module, "_hf_hook"):
        yield
        return
    from accelerate.utils import align_module_device

    with align_module_device(module, "cpu"):
        yield


def _name(value: type | FunctionType) -> str:
    """Its place, and the version of what is installed there."""
    root = sys.modules.get((value.__module__ or "").partition(".")[0])
    version = getattr(root, "__version__", "") if _is_installed(value.__module__) else ""
    return f"{value.__module__}.{value.__qualname__} {version}"


@cache
def _is_installed(module: str | None) -> bool:
    """Whether a module belongs to Python or to a package, whose code goes by its version."""
    name = module or ""
    if name.partition(".")[0] == __package__:
        return True
    file = getattr(sys.modules.get(name), "__file__", None)
    if file is None:
        return name in sys.builtin_module_names
    return any(Path(file).is_relative_to(folder) for folder in _INSTALLED)


def _globals(function: FunctionType) -> dict[str, object]:
    """The globals that a function and those inside it read, and what they read of modules that are not installed."""
    codes, names = [function.__code__], []
    for code in codes:
        names += code.co_names
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    found = {name: function.__globals__[name] for name in names if name in function.__globals__}
    modules = {n: m for n, m in found.items() if isinstance(m, ModuleType) and not _is_installed(m.__name__)}
    return found | {f"{n}.{name}": vars(m)[name] for n, m in modules.items() for name in names if name in vars(m)}


def _solid_base(kind: type) -> type:
    """The class in C that an object's memory starts with: `object` if attributes are all that it has."""
    return next(base for base in kind.__mro__ if not base.__flags__ & _HEAP_TYPE)


def _parts(member: object) -> list[object]:
    """What of a member of a class can be hashed: the functions inside of properties and class methods, or itself."""
    names = ("fget", "fset", "__func__", "func")
    if inner := [getattr(member, name) for name in names if getattr(member, name, None) is not None]:
        return inner
    return [] if inspect.isdatadescriptor(member) or inspect.ismemberdescriptor(member) else [member]


def _content(cell: CellType) -> object:
    """Of a variable that a function closes over; nothing if it is not set yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None
