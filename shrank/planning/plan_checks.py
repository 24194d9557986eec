"""Whether plain data, such as JSON gives, is a plan; what is wrong with anything else."""

from __future__ import annotations

from collections.abc import Collection

from ..linalg.grids import BITS, ONE_OF_BITS
from .checking import are_numbers, check_count
from .narrowed import check_narrowed

FORMAT = 3
_READABLE = (1, 2, 3)
_OF_STORAGE = {"grid", "corrected", "factor_grid", "activations"}


def check_plan(data: object, layer_keys: Collection[str], shape_keys: Collection[str]) -> None:
    """Raise ValueError, which names the layer and the entry, unless `data` is what `RankPlan.to_dict` writes.

    layer_keys, shape_keys: what the entries of a layer and of its shape are called.
    """
    if not isinstance(data, dict) or "layers" not in data:
        raise ValueError("not a shrank plan: expected an object with the key 'layers'")
    if data.get("format") not in _READABLE:
        raise ValueError(
            f"plan of format {data.get('format')!r}; this version of shrank reads formats "
            f"{', '.join(map(str, _READABLE))}"
        )
    layers = data["layers"]
    if not isinstance(layers, list):
        raise ValueError(f"'layers' must be a list, got {type(layers).__name__}")
    for entry in layers:
        _check_layer(entry, layer_keys, shape_keys)
    names = [entry["fqn"] for entry in layers]
    if repeated := sorted({n for n in names if names.count(n) > 1}):
        raise ValueError(f"the plan lists layers twice: {', '.join(repeated)}")
    check_narrowed(data.get("narrowed", []), {entry["fqn"]: entry for entry in layers})
    check_count(data.get("other_params", 0), "other_params")
    _check_trade_off(data.get("trade_off", []), data.get("spent"))


def _check_trade_off(trade_off: object, spent: object) -> None:
    points = [*trade_off, *([] if spent is None else [spent])] if isinstance(trade_off, list) else [None]
    if not all(isinstance(p, list) and len(p) == 2 and are_numbers(p) for p in points):
        raise ValueError(f"'trade_off' must be a list of pairs of numbers and 'spent' one, got {points!r:.80}")


def _check_layer(entry: object, keys: Collection[str], shape_keys: Collection[str]) -> None:
    if not isinstance(entry, dict) or not isinstance(entry.get("fqn"), str):
        raise ValueError(f"a layer of the plan must be an object with a string 'fqn', got {entry!r:.80}")
    name = f"layer {entry['fqn']!r}"
    if unknown := entry.keys() - set(keys):
        raise ValueError(f"{name}: unknown keys {', '.join(sorted(unknown))}")
    rank, shape, spectrum = entry.get("rank"), entry.get("shape"), entry.get("spectrum", [])
    if rank is not None:
        check_count(rank, f"{name}: rank", least=1)
    if rank is not None and shape is None:
        raise ValueError(f"{name}: has a rank but no shape")
    for key in ("error", "measured"):
        if (value := entry.get(key)) is not None and not are_numbers([value]):
            raise ValueError(f"{name}: {key} must be a number or null, got {value!r}")
    if not isinstance(spectrum, list | tuple) or not are_numbers(spectrum):
        raise ValueError(f"{name}: spectrum must be a list of numbers, got {spectrum!r:.80}")
    if not isinstance(entry.get("kind"), str) or not isinstance(entry.get("reason", ""), str):
        raise ValueError(f"{name}: 'kind' and 'reason' must be strings")
    check_count(entry.get("size"), f"{name}: size")
    if not isinstance(entry.get("narrowed", False), bool):
        raise ValueError(f"{name}: narrowed must be true or false, got {entry['narrowed']!r}")
    if shape is not None:
        _check_shape(shape, name, shape_keys)
    if (storage := entry.get("storage")) is not None:
        _check_storage(storage, name, rank, shape)


def _check_storage(storage: object, name: str, rank: int | None, shape: object) -> None:
    if not isinstance(storage, dict) or storage.keys() - _OF_STORAGE:
        raise ValueError(f"{name}: storage must have the keys {', '.join(sorted(_OF_STORAGE))}, got {storage!r:.80}")
    grids = {key: storage.get(key) for key in ("grid", "factor_grid")}
    for key, grid in grids.items():
        if grid is None:
            continue
        if not isinstance(grid, dict) or grid.keys() != {"bits", "group_size"}:
            raise ValueError(f"{name}: {key} must have exactly the keys bits and group_size, got {grid!r:.80}")
        if grid["bits"] not in BITS:
            raise ValueError(f"{name}: bits of {key} must be {ONE_OF_BITS}, got {grid['bits']!r}")
        if grid["group_size"] is not None:
            check_count(grid["group_size"], f"{name}: group_size of {key}", least=1)
    corrected = storage.get("corrected", False)
    if not isinstance(corrected, bool):
        raise ValueError(f"{name}: corrected must be true or false, got {corrected!r}")
    if grids["grid"] is None and (corrected or grids["factor_grid"] is not None):
        raise ValueError(f"{name}: a correction is of a weight on a grid, and there is none")
    if corrected and rank is None:
        raise ValueError(f"{name}: a correction needs a rank")
    if grids["factor_grid"] is not None and not corrected:
        raise ValueError(f"{name}: factor_grid without a correction")
    if grids["grid"] is not None and shape is None:
        raise ValueError(f"{name}: has a grid but no shape")
    if (activations := storage.get("activations")) not in (None, "int8") or (activations and grids["grid"] is None):
        raise ValueError(f"{name}: activations must be 'int8', beside a grid, or null, got {activations!r:.80}")


def _check_shape(shape: object, name: str, keys: Collection[str]) -> None:
    if not isinstance(shape, dict) or {"pivoted": False, **shape}.keys() != set(keys):
        raise ValueError(f"{name}: shape must have exactly the keys {', '.join(keys)}")
    if not isinstance(pivoted := shape.get("pivoted", False), bool):
        raise ValueError(f"{name}: pivoted must be true or false, got {pivoted!r}")
    for key, value in shape.items():
        if key != "pivoted":
            check_count(value, f"{name}: {key}", least=1)
