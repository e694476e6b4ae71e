"""The house: imports point down, and what torch has not promised is used in one room."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path

import pytest

import fastsn
from helpers import sweeps

ROOT = Path(fastsn.__file__).parent
# From the ground up; what stands in one line is one storey, whose rooms may use each other's.
STOREYS = [
    ["layout", "reference", "torch_internals", "_C", "report"],
    ["ops", "cuda", "triton", "sharded.placements", "sharded.shares", "recompute"],
    ["backends"],
    ["engine", "means", "sharded"],
    ["weights"],
    ["checkpoints"],
    ["grouping", "parametrizations", "hooks", "functional"],
    ["nn"],
    ["model"],
    ["", "__main__"],
]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").strip("."): path
    for path in ROOT.rglob("*.py")
}


def storey(module):
    """That of a module, by the longest name that a line above has."""
    parts = module.split(".")
    for length in range(len(parts), -1, -1):
        name = ".".join(parts[:length])
        for i, names in enumerate(STOREYS):
            if name in names and (name or not module):
                return i
    raise AssertionError(f"no storey for {module}")


def imported_names(path):
    """All that a file imports, wherever in it, with the module's name in front."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imports(path):
    """The modules of the package that a file imports."""
    found = set()
    for name in imported_names(path):
        if name.split(".")[0] != "fastsn":
            continue
        own = name.removeprefix("fastsn").strip(".")
        # The longest part of the name that is a file; the rest is what is in it.
        while own and own not in FILES and own != "_C":
            own = own.rpartition(".")[0]
        found.add(own)
    return found


GRAPH = {module: imports(path) - {"_C"} for module, path in FILES.items()}


def test_the_graph_is_that_of_the_package():
    assert "engine" in GRAPH["weights.normalizer"] and "reference" in GRAPH["backends"]
    assert storey("weights.normalizer") == storey("weights") > storey("engine")


@pytest.mark.parametrize("module", sorted(FILES))
def test_imports_point_down(module):
    up = {other for other in GRAPH[module] if storey(other) > storey(module)}
    assert not up, f"{module} imports {sorted(up)}"
    if module != "__main__":
        assert "" not in GRAPH[module], f"{module} imports the package itself"


def test_no_imports_go_in_a_circle():
    rest = {module: set(others) for module, others in GRAPH.items()}
    while rest:
        free = [module for module, others in rest.items() if not others & rest.keys()]
        assert free, f"a circle among {sorted(rest)}"
        for module in free:
            del rest[module]


def _private(path):
    """The names of torch's with an underscore in front that a file uses, by where they stand."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            parts = [*node.module.split("."), *(alias.name for alias in node.names)]
            yield from (part for part in parts if part.startswith("_") and part != "__future__")
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            text = ast.unparse(node)
            if text.startswith("torch.") and not node.attr.startswith("__"):
                yield node.attr
        elif isinstance(node, ast.Attribute) and node.attr in ("f_locals", "f_back", "_getframe"):
            yield node.attr


# The classes that the drop-ins are and whose state they share: torch's names in its own documents,
# in pickles and checkpoints. What is missing there is missing at import, not in a forward.
DERIVED = {
    "weights.parametrized": {"_SpectralNorm"},
    "nn.convert": {"_NormBase"},
    "nn.pairs": {"_NormBase"},
    "nn.batch_norms": {"_BatchNorm", "_NormBase"},
    "nn.sync": {"_BatchNorm"},
}


@pytest.mark.parametrize("module", sorted(m for m in FILES if not m.startswith("torch_internals")))
def test_what_torch_has_not_promised_is_used_in_one_room(module):
    found = set(_private(FILES[module])) - DERIVED.get(module, set())
    assert not found, f"{module} uses {sorted(found)}: that belongs into torch_internals"


def test_private_names_would_be_found():
    internals = [path for module, path in FILES.items() if module.startswith("torch_internals.")]
    assert len(set(itertools.chain.from_iterable(map(_private, internals)))) > 5


def test_files_are_small():
    sizes = {module: len(path.read_text().splitlines()) for module, path in FILES.items()}
    large = {module: size for module, size in sizes.items() if size > 460}
    assert not large, large


# The tests' own house

TESTS = Path(__file__).parents[1]
FOLDERS = {path.parent.name for path in TESTS.glob("*/test_*.py")}


def test_every_file_of_tests_has_its_place():
    """Tests are in the folders, what they share in helpers, and one program beside the fixtures."""
    for path in TESTS.rglob("*.py"):
        folder = path.parent.relative_to(TESTS).as_posix()
        if folder == ".":
            assert path.name in ("conftest.py", "gpu_sanitize.py"), path
        else:
            assert (folder == "helpers") != path.name.startswith("test_"), path
            assert folder in FOLDERS | {"helpers"}, path
    assert {"ops", "weights", "nn", "model", "checkpoints", "sharded"} < FOLDERS


def test_no_two_test_files_have_the_same_name():
    """They are modules by this name alone, also in the processes that some tests start."""
    names = sorted(path.name for path in TESTS.rglob("test_*.py"))
    assert len(names) == len(set(names)), [n for n in names if names.count(n) > 1]


@pytest.mark.parametrize(
    "path", sorted(TESTS.rglob("*.py")), ids=lambda path: path.relative_to(TESTS).as_posix()
)
def test_no_file_imports_a_test_file(path):
    """What several need is in helpers, each of which is named in full."""
    names = imported_names(path)
    modules = {name.split(".")[0] for name in names}
    assert not [name for name in modules if name.startswith("test_")]
    assert not modules & ({"tests", "conftest"} | FOLDERS - {"benchmarks"})
    helpers = {own.stem for own in (TESTS / "helpers").glob("*.py")}
    assert not modules & (helpers - {"__init__"}), "from helpers import ..."
    for name in names:
        if name.startswith("helpers."):
            assert name.split(".")[1] in helpers, name


# What an ordinary run takes of many combinations


@pytest.mark.parametrize("strength, count", [(1, 5), (2, 20), (3, 40)])
def test_a_sweep_brings_all_values_together(strength, count):
    rows = list(itertools.product(range(5), range(4), range(2)))
    chosen = [rows[i] for i in sweeps.covering(rows, strength)]
    assert len(chosen) == count
    for columns in itertools.combinations(range(3), strength):
        parts = [{tuple(row[c] for c in columns) for row in some} for some in (chosen, rows)]
        assert parts[0] == parts[1]
    if strength == 1:
        assert {sum(row[2] == value for row in chosen) for value in (0, 1)} == {2, 3}
