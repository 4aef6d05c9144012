"""What a dataset.json says of modalities, classes and regions, in the Decathlon's words or nnU-Net's.

| | Decathlon, nnU-Net 1 | nnU-Net 2 |
| --- | --- | --- |
| channels | "modality": {"0": "CT"} | "channel_names": {"0": "CT"} |
| classes | "labels": {"0": "background", "1": "liver"} | "labels": {"background": 0, "liver": 1} |
| regions | "regions": {"organ": [1, 2]} beside "labels" | "labels": {"background": 0, "organ": [1, 2], ...} |

Every error is a `DataError` that names the field, what it got and what it needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from factorizer.segmentation.errors import DataError

Regions = dict[str, tuple[int, ...]]


def read_modalities(path: Path, content: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the channels, in the order of their numbers."""
    field = "channel_names" if "channel_names" in content else "modality"
    wanted = 'an object such as {"0": "MRI"}'
    if field not in content:
        raise DataError(
            f"{path}: the field 'modality' is missing; it must be {wanted} (nnU-Net's 'channel_names')"
        )
    found = content[field]
    if isinstance(found, list) and found and all(isinstance(name, str) for name in found):
        return tuple(found)
    if not isinstance(found, dict) or not found:
        raise DataError(f"{path}: {field!r} is {found!r}; it must be {wanted}")
    numbers = {_whole(number): str(name) for number, name in found.items()}
    if None in numbers:  # the other way round, as nnU-Net 2 writes labels
        numbers = {_whole(number): str(name) for name, number in found.items()}
    in_order = sorted(number for number in numbers if number is not None)
    if len(in_order) != len(found) or in_order != list(range(in_order[0], in_order[0] + len(found))):
        raise DataError(f"{path}: {field!r} is {found!r}; its numbers must be 0, 1, ..., each once")
    if in_order[0] not in (0, 1):
        raise DataError(f"{path}: {field!r} is {found!r}; its first number must be 0")
    return tuple(numbers[number] for number in in_order)


def read_labels_and_regions(path: Path, content: Mapping[str, Any]) -> tuple[dict[int, str], Regions]:
    """The label values with their names, 0 first, and the regions with the values that they unite.

    Without regions the second is empty. A value that regions give gets the name of the innermost one.
    """
    wanted = 'an object such as {"0": "background", "1": "tumour"}'
    if "labels" not in content:
        raise DataError(f"{path}: the field 'labels' is missing; it must be {wanted}")
    found = content["labels"]
    if not isinstance(found, dict) or not found:
        raise DataError(f"{path}: 'labels' is {found!r}; it must be {wanted}")
    by_value = all(_whole(value) is not None for value in found)
    if any(str(name).lower() == "ignore" for name in (found.values() if by_value else found)):
        raise DataError(
            f"{path}: 'labels' has nnU-Net's 'ignore', voxels that are not to be learned from; that is "
            "not supported. Leave the cases with such voxels out, or make them background"
        )
    _check_names(path, "labels", list(found.values()) if by_value else list(found))
    regions: Regions = {}
    if by_value:
        labels = {_whole(value): str(name) for value, name in found.items()}
        if len(labels) < len(found):
            raise DataError(f"{path}: 'labels' is {found!r}; it must have each value once")
    else:
        united = {str(name): _values(path, name, value) for name, value in found.items()}
        if any(isinstance(value, list) for value in found.values()):
            regions = {name: values for name, values in united.items() if values != (0,)}
            labels = {0: next((name for name, values in united.items() if values == (0,)), "background")}
            labels |= {value: name for name, value in own_values(str(path), regions).items()}
        else:
            labels = {value: name for name, (value,) in united.items()}
            if len(labels) < len(found):
                raise DataError(f"{path}: 'labels' is {found!r}; two names have one value")
    _check_classes(path, labels)
    if (united_by := content.get("regions")) is not None:
        if not isinstance(united_by, dict):
            raise DataError(
                f"{path}: 'regions' is {united_by!r}; it must be an object such as "
                '{"whole": [1, 2], "core": [2]}'
            )
        _check_names(path, "regions", list(united_by))
        regions = {name: _values(path, name, value) for name, value in united_by.items()}
        for name, values in regions.items():
            if unknown := set(values) - (set(labels) - {0}):
                raise DataError(
                    f"{path}: the region {name!r} unites the label values {list(values)}; there is no class "
                    f"for {sorted(unknown)[0]}"
                )
        own_values(str(path), regions)
    _check_order(path, content.get("regions_class_order"), regions)
    return dict(sorted((int(value), name) for value, name in labels.items() if value is not None)), regions


def own_values(source: str, regions: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """For each region, outer ones first, the label value that it has and no region inside it.

    Raises DataError where a region has none or several, or two regions overlap without one holding the
    other.
    """
    own: dict[str, int] = {}
    for name, united in sorted(regions.items(), key=lambda item: -len(set(item[1]))):
        inner = [set(other) for n, other in regions.items() if n != name and set(other) <= set(united)]
        rest = set(united).difference(*inner)
        crossing = [
            other
            for n, other in regions.items()
            if n != name and (common := set(other) & set(united)) and common not in (set(other), set(united))
        ]
        if len(rest) != 1 or crossing or 0 in united:
            raise DataError(
                f"{source}: the region {name!r} unites the label values {tuple(united)}; regions must lie "
                "in one another or apart, hold no background, and exactly one value of each must be in no "
                "region inside it"
            )
        own[name] = rest.pop()
    return own


def _check_names(path: Path, field: str, names: Sequence[Any]) -> None:
    for name in names:
        if not isinstance(name, str) or not name.strip():
            raise DataError(f"{path}: {field!r} has the name {name!r}; names must be texts, and not empty")


def _check_classes(path: Path, labels: Mapping[int | None, str]) -> None:
    values = [value for value in labels if value is not None]
    if 0 not in values or len(values) < 2 or not 0 <= min(values) <= max(values) <= 255:
        raise DataError(
            f"{path}: 'labels' has the values {sorted(values)}; it needs 0, the background, and at "
            "least one more, none above 255"
        )
    names = list(labels.values())
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise DataError(
            f"{path}: 'labels' calls two values {twice!r}; names must differ, as scores are told by name. "
            "Unite values in a region"
        )
    for value, name in labels.items():
        if value and name.strip().lower() == "background":
            raise DataError(f"{path}: 'labels' calls {value} background; the background must be 0")


def _check_order(path: Path, order: Any, regions: Regions) -> None:
    """Whether nnU-Net's regions_class_order, where it is given, says what the regions do."""
    if order is None or not regions:
        return
    own = own_values(str(path), regions)
    wanted = [own[name] for name in regions]
    if order != wanted:
        raise DataError(
            f"{path}: 'regions_class_order' is {order!r}; the values that are each region's own, in the "
            f"order of the regions, are {wanted}"
        )


def _values(path: Path, name: str, value: Any) -> tuple[int, ...]:
    values = [_whole(v) for v in (value if isinstance(value, list) else [value])]
    if not values or None in values or len(set(values)) < len(values):
        raise DataError(
            f"{path}: 'labels' must be label values by name, or names by label value; {name!r} has {value!r}"
        )
    return tuple(sorted(v for v in values if v is not None))


def _whole(value: Any) -> int | None:
    """A whole number, or a text that is one."""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        return None
    try:
        return int(value)
    except ValueError:
        return None
