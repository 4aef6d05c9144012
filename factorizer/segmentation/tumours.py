"""Brain tumours: which label value is which tissue differs from one release of the data to the next.

| | necrosis, non-enhancing core | oedema | enhancing tumour |
| --- | --- | --- | --- |
| BraTS 2012 to 2022 | 1 | 2 | 4 |
| BraTS 2023 and later | 1 | 2 | 3 |
| Medical Segmentation Decathlon, Task01 | 2 | 1 | 3 |

The last two have the same values in another order: only names tell them apart.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from factorizer.segmentation.cases import Task
from factorizer.segmentation.dataset import Regions
from factorizer.segmentation.errors import DataError

BRATS = {0, 1, 2, 4}
NAMES = {"edema": "edema", "core": "non-enhancing tumour", "enhancing": "enhancing tumour"}
_WORDS = {  # in this order: "non-enhancing" holds "enhancing"
    "core": r"necro|ncr|\bnet\b|non.?enh|core",
    "edema": r"o?edema|\bed\b|peri",
    "enhancing": r"enh|\bet\b|\bgd\b|active",
}


def brats_classes(task: Task) -> tuple[dict[int, str], Regions]:
    """The label values with their names, and the regions ET, TC and WT, in the task's own numbering.

    Tissues are recognised by the names in dataset.json, else by the values 1, 2, 4, which BraTS alone has.
    Regions that dataset.json gives are taken as they are.

    Raises:
        DataError: neither tells which value is which tissue.
    """
    if task.regions:
        return task.labels, task.regions
    tissues = _by_name(task.labels)
    if tissues is None and set(task.labels) == BRATS:
        tissues = {"core": 1, "edema": 2, "enhancing": 4}
    if tissues is None:
        raise DataError(
            f"data: 'labels' is {task.labels} in dataset.json; for the bundle of brain tumours their names "
            "must say which value is edema, which necrosis or non-enhancing tumour, and which enhancing "
            'tumour; or give "regions": {"ET": [4], "TC": [1, 4], "WT": [1, 2, 4]} there, in the numbers of '
            "the data"
        )
    core, edema, enhancing = tissues["core"], tissues["edema"], tissues["enhancing"]
    labels = {value: NAMES.get(_tissue_of(tissues, value), "background") for value in sorted(task.labels)}
    regions = {"ET": (enhancing,), "TC": tuple(sorted((core, enhancing)))}
    return labels, regions | {"WT": tuple(sorted((core, edema, enhancing)))}


def _by_name(labels: Mapping[int, str]) -> dict[str, int] | None:
    """The value of each tissue, or None where the names do not tell all three, each once."""
    found: dict[str, int] = {}
    for value, name in labels.items():
        tissue = next((t for t, words in _WORDS.items() if re.search(words, name.lower())), None)
        if value and tissue is not None:
            if tissue in found:
                return None
            found[tissue] = value
    return found if len(found) == 3 == len(labels) - 1 else None


def _tissue_of(tissues: Mapping[str, int], value: int) -> str:
    return next((tissue for tissue, own in tissues.items() if own == value), "")
