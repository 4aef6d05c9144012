"""Whether classes are told apart by the side that they lie on: then mirror images have wrong labels.

Names tell it in English and in Latin's abbreviations; whatever the names say, or say not, the masks do: two
classes that lie on different sides of the volume, case after case, are a pair of sides.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence

from factorizer.segmentation.survey import Geometry

# Words for left and right that mean nothing else in the name of a class.
_SIDES = (
    {"left", "right"},
    {"lt", "rt"},
    {"lh", "rh"},
    {"sin", "dex"},
    {"sinister", "dexter"},
    {"sinistra", "dextra"},
    {"links", "rechts"},
    {"linke", "rechte"},
    {"gauche", "droite"},
    {"gauche", "droit"},
    {"izquierdo", "derecho"},
    {"izquierda", "derecha"},
    {"esquerdo", "direito"},
    {"esquerda", "direita"},
    {"sinistro", "destro"},
    {"l", "r"},
    {"li", "re"},
    {"g", "d"},
)
_ALONE = {"left", "right", "links", "rechts", "gauche", "droite", "izquierdo", "derecho", "lh", "rh"}
ALWAYS = 0.9  # share of the cases in which masks must lie alike
GAP = 0.2  # of half the volume's width, between two masks that lie apart
MIN_CASES = 3  # in which a pair of classes is there; one class alone needs two more


def mirrored_axes(labels: Mapping[int, str], geometries: Sequence[Geometry]) -> tuple[tuple[int, ...], str]:
    """The axes along which a mirror image is as likely as its original, and why: left to right, or none."""
    names = {value: name for value, name in labels.items() if value}
    by_name = _side_names(names.values())
    if by_name:
        return (), f"classes are named after sides ({by_name})"
    for (a, name_a), (b, name_b) in itertools.combinations(names.items(), 2):
        both = [(g.sides[a], g.sides[b]) for g in geometries if a in g.sides and b in g.sides]
        apart = [_apart(one, other) for one, other in both]
        if len(both) >= MIN_CASES and max(apart.count(-1), apart.count(1)) >= ALWAYS * len(both):
            cases = f"{max(apart.count(-1), apart.count(1))} of {len(both)} cases"
            return (), f"{name_a!r} and {name_b!r} lie on different sides in {cases}"
    for value, name in names.items():
        sides = [g.sides[value] for g in geometries if value in g.sides]
        left = sum(high < 0 for _, high in sides)
        right = sum(low > 0 for low, _ in sides)
        if len(sides) >= MIN_CASES + 2 and max(left, right) >= ALWAYS * len(sides):
            return (), f"{name!r} lies on one side in {max(left, right)} of {len(sides)} cases"
    return (0,), "no class is bound to a side, by its name or by where it lies"


def _side_names(names: Iterable[str]) -> str:
    """The names that say a side, or nothing: a pair of them, or a word that means nothing else."""
    words = {name: _words(name) for name in names}
    for (name, own), (other, others) in itertools.combinations(words.items(), 2):
        if _twins(own, others):
            return f"{name!r}, {other!r}"
    return next((repr(name) for name, own in words.items() if _ALONE.intersection(own)), "")


def _words(name: str) -> list[str]:
    """left_hippocampus, LeftHippocampus, hippocampus.L, rThalamus -> its words, in small letters."""
    split = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name)
    return [word.lower() for word in re.split(r"[\W_]+", split) if word]


def _twins(own: Sequence[str], other: Sequence[str]) -> bool:
    """Whether two names differ by their side alone."""
    if len(own) != len(other):
        return False
    differing = [{a, b} for a, b in zip(own, other, strict=True) if a != b]
    if differing and all(pair in _SIDES for pair in differing):
        return True
    # Written together: lhippocampus, hippocampusL, lefthippocampus.
    a, b = "".join(own), "".join(other)
    for pair in _SIDES:
        one, two = sorted(pair)
        for x, y in ((one, two), (two, one)):
            for start in (True, False):
                rest = a[len(x) :] if start else a[: len(a) - len(x)]
                begins = a.startswith(x) if start else a.endswith(x)
                if begins and len(rest) > 2 and b == (y + rest if start else rest + y):
                    return True
    return False


def _apart(one: tuple[float, float], other: tuple[float, float]) -> int:
    """-1 where the first lies left of the second, 1 right of it, 0 where they overlap, or lie on one side.

    The sides are those of the volume; where its middle is elsewhere, a gap between the masks serves.
    """
    if one[1] < other[0]:
        across = one[1] < 0 < other[0] or other[0] - one[1] > GAP
        return -1 if across else 0
    if other[1] < one[0]:
        across = other[1] < 0 < one[0] or one[0] - other[1] > GAP
        return 1 if across else 0
    return 0
