"""Hugging Face: `pixel_values` are found, and `from_pretrained` reads the refined network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from page import code_of, short
from torch.utils.data import DataLoader
from transformers import BatchFeature, SegformerConfig, SegformerForSemanticSegmentation

from apl_lightning import APLModule, PseudoLabelCallback, TargetDataModule
from apl_lightning.data import Keys, read_sample

CLASSES = 3


def segformer() -> SegformerForSemanticSegmentation:
    stages: dict[str, Any] = {"depths": [1] * 4, "hidden_sizes": [8, 16, 24, 32]}
    config = SegformerConfig(num_labels=CLASSES, decoder_hidden_size=16, **stages)
    network = SegformerForSemanticSegmentation(config).eval()
    with torch.no_grad():
        network.decode_head.classifier.weight.mul_(100)  # predictions with a margin, which have a weight
    return network


def samples(count: int, labelled: bool = False) -> list[BatchFeature]:
    """Samples as image processors make them: a `BatchFeature` is no `dict`."""
    images = [BatchFeature({"pixel_values": torch.rand(3, 64, 64)}) for _ in range(count)]
    for sample in images if labelled else []:
        sample["labels"] = torch.randint(CLASSES, (64, 64))
        sample["labels"][:8] = 255
    return images


def test_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("apl_lightning.guard.Guard.is_harmed", lambda *_: False)  # these images are noise
    source = segformer()
    source.save_pretrained("source")
    scope: dict[str, Any] = {"target_images": samples(4), "labelled": samples(2, labelled=True)}
    exec(short(code_of("huggingface")), scope)
    assert 0 < scope["trainer"].callback_metrics["val/dice"] < 1
    refined = SegformerForSemanticSegmentation.from_pretrained("refined")
    assert refined.config.to_diff_dict().keys() == source.config.to_diff_dict().keys()
    image = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        before, after = source(image).logits, refined(image).logits
        assert torch.equal(after, scope["module"].export()(image).logits)
    assert not torch.allclose(after, before, atol=1e-4)


def test_a_given_key_wins() -> None:
    first, second, label = torch.rand(1, 4, 4), torch.rand(1, 4, 4), torch.ones(4, 4).long()
    sample = {"image": first, "pixel_values": second, "label": label, "labels": 2 * label}
    assert torch.equal(read_sample(sample, Keys(), 0)["image"], first)
    assert torch.equal(read_sample(sample, Keys(), 0)["label"], label)
    assert torch.equal(read_sample(sample, Keys(image="pixel_values", label="labels"), 0)["label"], 2 * label)
    del sample["image"]
    assert torch.equal(read_sample(sample, Keys(), 0)["image"], second)
    assert torch.equal(read_sample(sample, Keys(), 0)["label"], label)
    with pytest.raises(TypeError, match=r"with the key 'scan', but got the keys \['label', 'labels', 'pixel_values'\]"):
        read_sample(sample, Keys(image="scan"), 0)
    with pytest.raises(TypeError, match=r"with the key 'image', but got the keys \['labels'\]: pass `image_key`"):
        read_sample({"labels": label}, Keys(), 0)


class Project(pl.LightningDataModule):
    """Has a `collate_fn` and a hook, which know the keys of Hugging Face alone."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(samples(4, labelled=True), 2, collate_fn=stack)  # type: ignore[arg-type]

    val_dataloader = train_dataloader

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        assert set(batch) == {"pixel_values", "labels"}
        return {**batch, "pixel_values": batch["pixel_values"] - 0.5}


def stack(chosen: list[Any]) -> dict[str, Any]:
    return {key: torch.stack([sample[key] for sample in chosen]) for key in ("pixel_values", "labels")}


def test_existing_data_module(trainer: Any) -> None:
    module = APLModule(segformer(), CLASSES, ignore_index=255)
    run = trainer(callbacks=[PseudoLabelCallback(guard="off")])
    run.fit(module, TargetDataModule.from_datamodule(Project()))
    assert {"val/dice", "pseudo/dice"} <= set(run.callback_metrics)
