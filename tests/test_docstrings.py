"""What the public functions promise is written where editors and the reference look for it."""

from __future__ import annotations

import inspect
import re

import pytest

import shrank

FUNCTIONS = [name for name in shrank.__all__ if inspect.isfunction(getattr(shrank, name))]
CLASSES = [name for name in shrank.__all__ if inspect.isclass(getattr(shrank, name))]


def section(text: str, name: str) -> str:
    """What stands indented below a heading."""
    found = re.search(rf"^{name}:\n((?:    .*\n|\n)+)", text + "\n", re.M)
    return found[1] if found else ""


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_documents_arguments_result_and_errors(name: str) -> None:
    function = getattr(shrank, name)
    text, signature = inspect.getdoc(function) or "", inspect.signature(function)
    assert re.match(r"[A-Z`].*\.$", text.split("\n\n")[0], re.S), "one sentence comes first"
    arguments = section(text, "Args")
    listed = re.findall(r"^ {4}(\*{0,2}\w+)(?: \(.*?\))?:", arguments, re.M)
    assert [argument.lstrip("*") for argument in listed] == list(signature.parameters)
    if signature.return_annotation != "None":
        assert section(text, "Returns") or section(text, "Yields")
    if re.search(r"^ +raise ", inspect.getsource(function), re.M):
        assert section(text, "Raises")


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_and_its_methods_say_what_they_are(name: str) -> None:
    kind = getattr(shrank, name)
    own = [value for key, value in vars(kind).items() if not key.startswith("_") and inspect.isfunction(value)]
    assert kind.__doc__ and not kind.__doc__.startswith(f"{name}(")
    # A method that is overridden may rely on what its base says.
    assert not [method.__qualname__ for method in own if not inspect.getdoc(getattr(kind, method.__name__))]
