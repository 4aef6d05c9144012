"""The instructions of a kernel's machine code, counted by class: what a regression shows in first."""

import re

# By the beginnings of their names, on compute capabilities 8.0 to 10.0.
CLASSES = {
    "all": ("",),
    "fp32": ("FADD", "FMUL", "FFMA", "FSEL", "FSET", "FMNMX"),
    "special": ("MUFU",),
    "shuffle": ("SHFL",),
    "global": ("LDG", "STG"),
    "shared": ("LDS", "STS"),
    "local": ("LDL", "STL"),
    "barrier": ("BAR",),
}

# As in "        /*0a30*/              @!P0 FFMA R12, R4, R5, R12 ;"
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)


def instructions(listing: str) -> dict[str, int]:
    """How many of each class stand in a listing of cuobjdump -sass: those of a loop once."""
    names = _INSTRUCTION.findall(listing)
    return {of: sum(name.startswith(starts) for name in names) for of, starts in CLASSES.items()}
