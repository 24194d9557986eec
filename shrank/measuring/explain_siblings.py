"""What `shrank explain` says of several layers of one input, as query, key and value: which share their launches."""

from __future__ import annotations

from rich.table import Table

from .explain import explain, microseconds_text, whole_numbers

MOST_TOGETHER = 3  # ShrinkExpandTile::kMostLayers in csrc/select/shrink_expand_tile.h


def parse_sibling(text: str) -> tuple[int, int, bool]:
    """'1024,64' -> N, R, False: out_features, rank, whether the layer is pivoted, as '1024,64p' says."""
    wanted = "N,R or N,Rp: two whole numbers above 0, such as 1024,64, and p of a pivoted layer"
    N, R = whole_numbers("--sibling", text.removesuffix("p"), wanted, 2)
    return N, R, text.endswith("p")


def explain_siblings(
    shape: tuple[int, int, int, int],
    siblings: list[tuple[int, int, bool]],
    dtype: str,
    gpu: str | None,
    bias: bool,
    pivoted: bool = False,
) -> dict:
    """What `explain` says of each layer alone, in inference, and the numbers of those that run together.

    `low_rank_linear_multi` runs so, in order, layers that each would take the kernels for a few rows, pivoted or not.
    ValueError and RuntimeError as of `explain`.

    pivoted: whether the first layer is.
    """
    M, K, *first = shape
    layers = [
        explain((M, K, N, R), dtype, gpu, bias=bias, pivoted=pivots) for N, R, pivots in ((*first, pivoted), *siblings)
    ]
    few = [i for i, each in enumerate(layers) if each["decision"]["kernel"] == "shrink_expand"]
    groups = [few[i : i + MOST_TOGETHER] for i in range(0, len(few), MOST_TOGETHER)]
    return {"layers": layers, "together": [group for group in groups if len(group) > 1]}


def siblings_table(facts: dict) -> Table:
    """The facts for people."""
    problem = facts["layers"][0]["problem"]
    title = f"M {problem['M']}, K {problem['K']}, {problem['dtype']}, {facts['layers'][0]['device']['name']}"
    shown = Table("layer", "kernel", "because", "alone", "launched with", title=title, title_justify="left")
    with_others = {i: group for group in facts["together"] for i in group}
    for i, layer in enumerate(facts["layers"]):
        predicted = layer["decision"]["microseconds"]
        others = [str(other + 1) for other in with_others.get(i, ()) if other != i]
        shown.add_row(
            f"{i + 1}: N {layer['problem']['N']}, R {layer['problem']['R']}{'p' * layer['problem']['pivoted']}",
            layer["decision"]["kernel"],
            layer["decision"]["reason"],
            "-" if predicted is None else microseconds_text(predicted),
            ", ".join(others) or "none",
        )
    return shown
