"""Imports point one way, and each outside door has one file."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "apl_lightning"

# The rooms, low to high: a file imports only from files above it in this list.
ROOMS = [
    "_lightning",
    "ranks",
    "outputs",
    "probe",
    "source",
    "resizing",
    "routing",
    "dual",
    "second_head",
    "proof",
    "heads",
    "losses",
    "predictor",
    "connected",
    "denoisers.apl",
    "denoisers.confidence",
    "denoisers.histogram",
    "denoisers.threshold",
    "denoisers.bdl",
    "denoisers.cbst",
    "denoisers.crst",
    "denoisers.mrnet",
    "denoisers.iast",
    "denoisers.dpl",
    "denoisers.upl",
    "denoisers.chebyshev",
    "denoisers.protocol",
    "denoisers",
    "round_files",
    "exchange",
    "store",
    "components",
    "samples",
    "randomness",
    "sampler",
    "transforms",
    "augment",
    "dataset",
    "datamodule",
    "metrics",
    "batchnorm",
    "warmup",
    "teacher",
    "module",
    "self_training",
    "tent",
    "validators",
    "statistics",
    "guard",
    "healthy_round",
    "progress",
    "preemption",
    "strategies",
    "target_images",
    "label_pass",
    "labelling",
    "callback",
    "visualize",
    "presets",
    "checkpoints.error",
    "checkpoints.crc32c",
    "checkpoints.leveldb",
    "checkpoints.bundle",
    "checkpoints.torch_file",
    "checkpoints.raw_image",
    "checkpoints.legacy_resize",
    "checkpoints.vgg",
    "checkpoints.deeplab",
    "checkpoints.drn",
    "checkpoints.fcn8s",
    "checkpoints.resnet_generator",
    "checkpoints.sifa",
    "checkpoints.sifa_generator",
    "checkpoints.sifa_bundle",
    "checkpoints.systems",
    "checkpoints.match",
    "checkpoints.loading",
    "checkpoints.identify",
    "checkpoints.translated",
    "checkpoints",
    "checkpoints.__main__",
]


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def room(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def own_rooms(path: Path) -> set[str]:
    names = {name.removeprefix("apl_lightning.") for name in imports(path) if name.startswith("apl_lightning.")}
    return {max((r for r in ROOMS if name == r or name.startswith(f"{r}.")), key=len) for name in names}


def test_every_file_has_its_room() -> None:
    assert sorted(map(room, FILES)) == sorted(ROOMS)


@pytest.mark.parametrize("path", FILES, ids=room)
def test_imports_point_down(path: Path) -> None:
    above = ROOMS[: ROOMS.index(room(path))]
    assert own_rooms(path) <= set(above)


@pytest.mark.parametrize(("package", "door"), [("pytorch_lightning", "_lightning"), ("wandb", "visualize")])
def test_one_door(package: str, door: str) -> None:
    users = {room(path) for path in FILES if any(name.split(".")[0] == package for name in imports(path))}
    assert users <= {door}


def test_module_and_callback_meet_only_in_the_store() -> None:
    reached = {name: own_rooms(PACKAGE / f"{name}.py") for name in ("module", "callback", "labelling", "label_pass")}
    assert not reached["module"] & {"callback", "label_pass", "store"}
    assert not (reached["callback"] | reached["labelling"] | reached["label_pass"]) & {"losses", "module"}
