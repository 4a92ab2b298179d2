"""Dice of a plain network, independent of the refinement module."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from apl_lightning.checkpoints import DeepLabV2, Translated
from apl_lightning.metrics import CaseDice


@torch.no_grad()
def predict(network: nn.Module, dataset: Dataset[Any]) -> list[Tensor]:
    """Predict the label map of each image."""
    device = next(network.parameters()).device
    network.eval()
    loader = DataLoader(dataset, batch_size=32)
    return [labels for batch in loader for labels in main_logits(network, batch["image"].to(device)).argmax(1).cpu()]


def main_logits(network: nn.Module, image: Tensor) -> Tensor:
    """The logits of the network's main classifier, (B, C, *S)."""
    return logits_of(network, image)[0]


def logits_of(network: nn.Module, image: Tensor) -> list[Tensor]:
    """The logits of all classifiers of the network, the main one first, each (B, C, *S)."""
    output: Any = network(image)
    levels = list(output) if isinstance(output, tuple) else [output]
    segmenter = network.segmenter if isinstance(network, Translated) else network
    return levels[::-1] if isinstance(segmenter, DeepLabV2) else levels  # DeepLabV2 returns (aux, main)


def organ_dice(predictions: list[Tensor], dataset: Any, class_names: list[str]) -> dict[str, float]:
    """Dice in % per organ, computed per patient and averaged over patients, and the `average` over organs.

    An organ that neither predictions nor references have is NaN and not in the average.
    """
    dice = 100 * _count(predictions, dataset, len(class_names)).compute()[1:]
    return {**dict(zip(class_names[1:], dice.tolist(), strict=True)), "average": float(dice.nanmean())}


def patient_dice(predictions: list[Tensor], dataset: Any, class_names: list[str]) -> dict[str, dict[str, float]]:
    """Dice in % of each patient and organ; organs that neither prediction nor reference has are left out."""
    cases = _count(predictions, dataset, len(class_names)).per_case()
    return {
        case: {
            name: 100 * float(value) for name, value in zip(class_names[1:], dice[1:], strict=True) if not value.isnan()
        }
        for case, dice in cases.items()
    }


def _count(predictions: list[Tensor], dataset: Any, classes: int) -> CaseDice:
    dice = CaseDice(classes)
    for index, prediction in enumerate(predictions):
        sample = dataset[index]
        dice.update(prediction[None], sample["label"][None], [sample["case"]], [index])
    return dice


def table(rows: dict[str, list[dict[str, float]]]) -> str:
    """Format a Markdown table with one row per network: mean and, for several runs, standard deviation."""
    columns = list(next(iter(rows.values()))[0])
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, runs in rows.items():
        cells = []
        for column in columns:
            values = torch.tensor([run[column] for run in runs])
            spread = f" ± {values.std():.1f}" if len(runs) > 1 else ""
            cells.append(f"{values.mean():.1f}{spread}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_results(folder: Path, name: str, results: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Write the Dice `before` and `after` of each seed, and the gain, to `results-NAME.json` and `table-NAME.md`.

    Returns them by row: `before`, `after` and `gain`, each with one entry per seed.
    """
    rows = {row: [result[row] for result in results] for row in ("before", "after")}
    rows["gain"] = [{c: result["after"][c] - result["before"][c] for c in result["after"]} for result in results]
    (folder / f"results-{name}.json").write_text(json.dumps(rows, indent=1))
    (folder / f"table-{name}.md").write_text(table(rows) + "\n")
    print(f"\nDice (%), {name}, {len(results)} seed(s):\n\n{table(rows)}")
    return rows
