"""Imports go one way: the first law of docs/architecture.md."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the bottom to the top: a module imports from its own line and from the lines above it. The families of
# operators are in the order in which they build on one another.
LAYERS = (
    "factorizer_kernels.shared",
    "factorizer_kernels.choice",
    "factorizer_kernels.ops",
    "factorizer_kernels.ops.windows",
    "factorizer_kernels.ops.nmf",
    "factorizer_kernels.ops.swin_nmf",
    "factorizer_kernels",
    "factorizer.layers",
    "factorizer.models",
    "factorizer.segmentation",
    "factorizer",
    "factorizer.nnunet",
    "factorizer.commands",
    "factorizer.__main__",
)


def modules(root: Path) -> dict[str, Path]:
    """The modules of both packages by name."""
    files = [
        file for package in ("factorizer", "factorizer_kernels") for file in (root / package).rglob("*.py")
    ]
    return {".".join(f.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): f for f in files}


def imports(name: str, file: Path, known: dict[str, Path]) -> set[str]:
    """The modules of ``known`` that the module ``name`` imports, anywhere in it."""
    found = set()
    package = name.split(".") if file.stem == "__init__" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, node.module] if node.module else base)
            found |= {full if (full := f"{source}.{alias.name}") in known else source for alias in node.names}
    return found & known.keys()


def layer(name: str) -> int:
    return max(
        (i for i, prefix in enumerate(LAYERS) if f"{name}.".startswith(f"{prefix}.")),
        key=lambda i: len(LAYERS[i]),
    )


def check(root: Path) -> None:
    """Every import in the packages below ``root`` goes down or stays in its layer, and none goes round."""
    known = modules(root)
    graph = {name: imports(name, file, known) for name, file in known.items()}
    up = [f"{a} imports {b}" for a, others in graph.items() for b in others if layer(b) > layer(a)]
    assert not up, up
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the modules


def test_no_import_goes_up_or_round():
    check(ROOT)


def test_networks_take_of_the_kernels_what_knows_no_backend():
    allowed = {
        "factorizer_kernels",
        "factorizer_kernels.shared.checks",
        "factorizer_kernels.shared.dtypes",
        "factorizer_kernels.ops.windows.geometry",
        "factorizer_kernels.ops.nmf.reference",
    }
    known = modules(ROOT)
    taken = {
        (name, other)
        for name, file in known.items()
        if name.startswith("factorizer.")
        for other in imports(name, file, known)
        if other.startswith("factorizer_kernels") and other not in allowed
    }
    assert not taken


def test_shared_names_no_operator():
    families = [folder.name for folder in (ROOT / "factorizer_kernels/ops").iterdir() if folder.is_dir()]
    for file in (ROOT / "factorizer_kernels/shared").glob("*.py"):
        names = {node.id for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Name)}
        text = {n.value for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Constant)}
        assert not any(family in str(word) for family in ("nmf", *families) for word in names | text), file


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("factorizer_kernels/shared/checks.py", "import factorizer_kernels.choice"),
        ("factorizer_kernels/ops/nmf/cpu.py", "from factorizer_kernels.ops.swin_nmf import reference"),
        ("factorizer/layers/norm.py", "def late():\n    from ..models import unet"),
        ("factorizer_kernels/shared/dtypes.py", "from factorizer_kernels.shared import checks"),  # a circle
    ],
)
def test_a_wrong_import_is_seen(file, line, tmp_path):
    for source in modules(ROOT).values():
        copy = tmp_path / source.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(source.read_text())
    check(tmp_path)
    (tmp_path / file).write_text((tmp_path / file).read_text() + f"\n{line}\n")
    with pytest.raises((AssertionError, ValueError), match=r"imports|cycle"):
        check(tmp_path)
