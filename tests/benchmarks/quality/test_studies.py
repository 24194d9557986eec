"""The quality benchmark: baselines that are what they say, scores of speech, and prose out of markup."""

from __future__ import annotations

import ast

import pytest
import torch
from torch import Tensor, nn

import shrank
from benchmarks.data.speech import distance, parse, word_error_rate, words
from benchmarks.data.texts import paragraphs
from benchmarks.provenance import RESULTS
from benchmarks.quality import baselines
from benchmarks.quality.studies import STUDIES, column, table
from shrank.calibration.batches import Batch, as_batches
from tests.common.models import WIDTH, draw, mlp
from tests.common.tolerances import assert_close


def half_square(output: Tensor, batch: Batch) -> Tensor:
    return output.square().sum() / 2


def seen(model: nn.Module, x: Tensor) -> dict[str, baselines.Statistics]:
    found = baselines.statistics(model, as_batches([x]), half_square, ())
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return found


def correlated() -> Tensor:
    return draw(400, WIDTH) @ torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(3)).exp()


@pytest.mark.parametrize("method", baselines.METHODS)
def test_at_full_rank_the_weight_is_as_it_was(method: str) -> None:
    model = mlp(2)
    found = baselines.approximations(model, method, seen(model, correlated()), ())
    for name, approximate in found.items():
        assert_close(approximate(WIDTH).float(), model.get_submodule(name).weight.detach())
        singular = torch.linalg.svdvals(approximate(5))
        assert singular[5] < 1e-6 * singular[0] < singular[4]


def test_each_method_is_best_at_what_it_minimises() -> None:
    model, x = mlp(2), correlated()
    statistics = seen(model, x)
    W = {name: baselines.matrix(module) for name, module in baselines.layers(model, ()).items()}
    found = {method: baselines.approximations(model, method, statistics, ()) for method in baselines.METHODS}
    for name, entry in statistics.items():
        moment = entry.inputs.double() / entry.tokens
        left = baselines._roots(baselines._shrunk(entry.gradients.double() / entry.tokens, 0.3))[0]
        right = baselines._roots(baselines._shrunk(moment, 0.1))[0]
        losses = {m: W[name] - found[m][name](6) for m in found}
        frobenius = {m: error.norm() for m, error in losses.items()}
        outputs = {m: (error @ moment @ error.T).trace() for m, error in losses.items()}
        weighted = {m: (left @ error @ right).norm() for m, error in losses.items()}
        assert min(frobenius, key=frobenius.get) == "plain SVD"
        assert min(outputs, key=outputs.get) == "SVD-LLM"
        assert min(weighted, key=weighted.get) == "K-FAC"


def test_convolutions_are_whitened_by_their_outputs() -> None:
    model = nn.Sequential(nn.Conv1d(4, 16, 3), nn.ReLU(), nn.Conv1d(16, 8, 3)).eval()
    x = torch.randn(8, 4, 40, generator=torch.Generator().manual_seed(0))
    statistics = baselines.statistics(model, as_batches([x]), None, ())
    error = {}
    for method in ("plain SVD", "SVD-LLM"):
        small = baselines.compressed(model, baselines.approximations(model, method, statistics, ("2",)), 0.5)
        error[method] = (small[0](x) - model[0](x)).norm()
    assert error["SVD-LLM"] < error["plain SVD"]


@pytest.mark.parametrize("a, b, edits", [("", "", 0), ("a b c", "a c", 1), ("a b", "b a", 2), ("a", "x y", 2)])
def test_edit_distance(a: str, b: str, edits: int) -> None:
    assert distance(a.split(), b.split()) == edits


def test_words_are_compared_as_spoken() -> None:
    assert words("Mr. Smith's 2 voice-mail, OK?") == ["mister", "smith's", "two", "voicemail", "okay"]
    assert word_error_rate([("one two three four", "1 2 three four"), ("five six", "five")]) == pytest.approx(1 / 6)


@pytest.mark.parametrize(
    "line, parsed",
    [
        ("vm-goodbye: thank you for calling and good bye", ("vm-goodbye", "thank you for calling and good bye")),
        ("; a comment: with a colon and six more words", ("", "")),
        ("short: too few words", ("", "")),
        ("digits/1: press 1 to hear this message again", ("", "")),
        ("note: [a note about this one sound file]", ("", "")),
    ],
)
def test_lines_of_the_list_of_prompts(line: str, parsed: tuple[str, str]) -> None:
    assert parse(line) == parsed


def test_prose_is_what_remains_of_markup() -> None:
    prose = (
        "'''Anarchism''' is a [[political philosophy|philosophy]] that<ref>A book.</ref> is described {{cite|x}} "
        "at length in this paragraph, which ends with a full stop. "
    ) * 2
    text = f"{{{{Infobox\n|a=b}}}}\n[[File:x.png|thumb|A caption]]\n{prose}\n* a list\n== References ==\n{prose}"
    (found,) = paragraphs(text)
    assert found.startswith("Anarchism is a philosophy that is described") and "[[" not in found


def test_a_table_has_a_column_per_keep() -> None:
    results = {
        "rows": [
            {"method": "dense", "keep": 1.0, "score": 1.0},
            {"method": "a", "keep": 0.9, "score": 0.5},
            {"method": "a", "keep": 0.8, "score": 0.25},
            {"method": "b", "keep": 0.8, "score": 0.75},
        ]
    }
    assert table(results).splitlines() == [
        "| score (dense 1) | keep 0.9 | keep 0.8 |",
        "|---|---|---|",
        "| a | 0.5 | 0.25 |",
        "| b |  | 0.75 |",
    ]


@pytest.mark.parametrize("name", ["studies", "tasks", "baselines", "int8"])
def test_only_public_names_are_measured(name: str) -> None:
    tree = ast.parse((RESULTS.parent / "quality" / f"{name}.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "shrank":
            assert node.module == "shrank" and {alias.name for alias in node.names} <= set(shrank.__all__)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "shrank":
            assert node.attr in shrank.__all__
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name | ast.Attribute)]
    assert not any("patch" in ast.unparse(name) for name in names)


def test_a_column_is_a_study_of_one_keep() -> None:
    alone = column(STUDIES["smollm2"], 0.8)
    assert (alone.keeps, alone.steps_at, alone.anchored_at) == ((0.8,), (), ())
    with pytest.raises(ValueError, match=r"measures at keep 0\.9, 0\.8, 0\.7, 0\.6, not at 0\.55"):
        column(STUDIES["smollm2"], 0.55)
