"""Imports point one way, folders are entered by their door, and each outside package has one door."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "apl_lightning"

# Low to high: a layer imports only from layers above it in this list.
LAYERS = [
    "_support",
    "losses",
    "metrics",
    "heads",
    "denoisers",
    "store",
    "nifti",
    "data",
    "guard",
    "labels",
    "refinement",
    "callback",
    "visualize",
    "preflight",
    "presets",
    "checkpoints",
    "pytorch_lightning",
    "lightning_pytorch",
    "folders",
    "nnunet",
    "cli",
]


def imported_names(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def parts_of(path: Path) -> tuple[str, ...]:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]
MODULES = {".".join(parts_of(path)) for path in FILES}


def module_of(name: str) -> str:
    """The longest module of the package in an imported name."""
    return max((module for module in MODULES if f"{name}.".startswith(f"{module}.")), key=len)


def own_imports(path: Path) -> set[str]:
    names = {name.removeprefix("apl_lightning.") for name in imported_names(path) if name.startswith("apl_lightning.")}
    return {module_of(name) for name in names}


def test_every_file_has_its_layer() -> None:
    assert {parts_of(path)[0] for path in FILES} == set(LAYERS)
    assert len(list(PACKAGE.glob("*.py"))) <= 10


@pytest.mark.parametrize("path", FILES, ids=lambda path: ".".join(parts_of(path)))
def test_imports_point_down_and_go_through_the_door_of_a_folder(path: Path) -> None:
    layer = parts_of(path)[0]
    for module in own_imports(path):
        other, *inside = module.split(".")
        if other != layer:
            assert LAYERS.index(other) < LAYERS.index(layer)
            assert not inside or other == "_support", f"import from apl_lightning.{other}, not from {module}"


@pytest.mark.parametrize("layer", LAYERS)
def test_no_cycle_in_a_folder(layer: str) -> None:
    imports = {".".join(parts_of(path)): own_imports(path) for path in FILES if parts_of(path)[0] == layer}
    left = {module: found & set(imports) for module, found in imports.items()}
    while free := {module for module, found in left.items() if not found & set(left)}:
        left = {module: found for module, found in left.items() if module not in free}
    assert not left


@pytest.mark.parametrize(
    ("package", "doors"),
    [
        ("pytorch_lightning", {"_support.lightning", "pytorch_lightning"}),
        ("lightning", {"lightning_pytorch"}),
        ("wandb", {"visualize"}),
        ("PIL", {"visualize"}),
    ],
)
def test_doors(package: str, doors: set[str]) -> None:
    users = {
        ".".join(parts_of(path)) for path in FILES if any(n.split(".")[0] == package for n in imported_names(path))
    }
    assert users <= doors


def test_both_doors_have_the_same_classes() -> None:
    """They differ in nothing but the package."""
    doors = [ast.parse((PACKAGE / f"{name}.py").read_text()) for name in ("pytorch_lightning", "lightning_pytorch")]
    first, second = ([ast.dump(node) for node in door.body if isinstance(node, ast.ClassDef)] for door in doors)
    assert first == second
    assert len(first) == 8


def test_other_parts_of_lightning_are_used_through_the_door() -> None:
    behind = {"_signal_connector", "fit_loop", "launcher", "precision_plugin", "progress_bar_callback", "strategy"}
    for path in FILES:
        if parts_of(path) != ("_support", "lightning"):
            used = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
            assert not used & behind, path


def test_module_and_callback_meet_only_in_the_store() -> None:
    def layers(folder: str) -> set[str]:
        return {m.split(".")[0] for path in FILES if parts_of(path)[0] == folder for m in own_imports(path)}

    assert not layers("refinement") & {"callback", "labels", "store"}
    assert not (layers("callback") | layers("labels")) & {"losses", "refinement"}


def test_folders_of_the_tests_are_those_of_the_package() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir()} - {"__pycache__"}
    tests = {path.parent.name for path in Path(__file__).parent.rglob("test_*.py")} - {"tests"}
    assert tests - {"have", "runs"} == folders
