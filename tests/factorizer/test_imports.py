"""Imports run one way: commands, nnunet, segmentation, models, layers, kernels; and in no circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import factorizer

ROOT = Path(factorizer.__file__).parent
MODULES = {
    ".".join(("factorizer", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}
FLOORS = ("layers", "models", "segmentation", "nnunet", "commands")
SEG_ALONE = {
    "monai",
    "nibabel",
    "scipy",
    "matplotlib",
    "rich",
    "typer",
    "tensorboard",
    "pydicom",
    "highdicom",
    "SimpleITK",
}


def imports_of(module):
    """The modules that a module imports, wherever in its text, but for type checking."""
    path, found = MODULES[module], set()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    tree = ast.parse(path.read_text())
    for node in tree.body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            source = ".".join(filter(None, (base, node.module)))
            for name in node.names:
                below = f"{source}.{name.name}"
                found.add(below if below in MODULES else source)
    return found


def floor_of(module):
    parts = module.split(".")
    return FLOORS.index(parts[1]) if len(parts) > 1 and parts[1] in FLOORS else None


@pytest.mark.parametrize("module", MODULES)
def test_no_import_runs_up(module):
    own = floor_of(module)
    for other in imports_of(module):
        if own is not None and other.startswith("factorizer.") and floor_of(other) is not None:
            assert floor_of(other) <= own, f"{module} imports {other}"
        if own is not None and FLOORS[own] in ("layers", "models"):
            assert other.split(".")[0] not in SEG_ALONE, f"{module} imports {other}"


def test_nothing_imports_the_commands_but_the_entry_point():
    importers = {m for m in MODULES for other in imports_of(m) if floor_of(other) == FLOORS.index("commands")}
    assert {m for m in importers if floor_of(m) != FLOORS.index("commands")} == {"factorizer.__main__"}


def test_imports_run_in_no_circle():
    graph = {m: {o for o in imports_of(m) if o in MODULES and o not in ("factorizer", m)} for m in MODULES}
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_no_module_needs_posix():
    """What Windows does not have is imported where its absence does no harm, never atop a module."""
    posix = {"resource", "fcntl", "pwd", "grp", "termios", "tty", "pty", "posix", "syslog", "readline"}
    for module, path in MODULES.items():
        tree = ast.parse(path.read_text())
        for node in tree.body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not posix & set(names), module
        calls = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not calls & {"os.fork", "os.getuid", "os.geteuid", "os.uname", "os.kill", "signal.SIGKILL"}, (
            module
        )
