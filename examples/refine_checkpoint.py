"""Refine a checkpoint of ADVENT, AdaptSegNet, CyCADA, SynSeg-Net, CycleGAN or SIFA on unlabelled images.

    python examples/refine_checkpoint.py advent model_80000.pth --images target/ --out refined.pth

`--images` is a folder of unlabelled target images of one size: 8-bit images (.png, .jpg) or .npy files. Each .npy file
contains a slice (H, W) or a volume (S, H, W) of uint8 values or floats in [0, 1]. SIFA needs raw intensities and one
volume per file. A volume is one patient: small components of an organ are ignored in it.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image

from apl_lightning import APLModule, PseudoLabelCallback, TargetDataModule
from apl_lightning.checkpoints import Translated, load

FORMATS = (".npy", ".png", ".jpg", ".jpeg")
GREY = ("1", "L", "LA", "P")  # modes of images in one channel


def raw_slices(path: Path) -> torch.Tensor:
    """Read the slices of one file as (S, 1, H, W), or a colour image as (1, 3, H, W)."""
    if path.suffix.lower() == ".npy":
        array = np.load(path, allow_pickle=False)
        return torch.from_numpy(array.reshape(-1, 1, *array.shape[-2:]))
    with Image.open(path) as picture:
        if picture.mode not in (*GREY, "RGB", "RGBA"):
            raise SystemExit(f"Expected an image of 8 bits, but {path} has mode {picture.mode}: save it as .npy.")
        array = np.asarray(picture.convert("L" if picture.mode in GREY else "RGB"))
    return torch.tensor(array)[None, None] if array.ndim == 2 else torch.tensor(array).permute(2, 0, 1)[None]


def samples_of(files: dict[str, torch.Tensor]) -> list[Any]:
    """One sample per slice, with the patient (`case`) if there are volumes."""
    if all(len(slices) == 1 for slices in files.values()):
        return [slices[0] for slices in files.values()]
    return [{"image": image, "case": name} for name, slices in files.items() for image in slices]


def read_network(arguments: argparse.Namespace) -> torch.nn.Module:
    """Load the network; with `--translator`, images pass through the CycleGAN generator first."""
    options = {} if arguments.bounds is None else {"bounds": tuple(arguments.bounds)}
    if arguments.no_tanh:
        options["tanh"] = False
    network = load(arguments.system, arguments.checkpoint, arguments.classes, **options)
    return network if arguments.translator is None else Translated(load("cyclegan", arguments.translator), network)


def main(argv: list[str] | None = None) -> torch.nn.Module:
    """Run the command line and return the refined network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", help="advent, adaptsegnet, cycada, synseg, sifa-v1, sifa-v2 or sifa-pytorch")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("refined.pth"))
    parser.add_argument("--classes", type=int, default=5)
    parser.add_argument("--translator", type=Path, help="CycleGAN generator that maps target images to source images")
    parser.add_argument("--no-tanh", action="store_true", help="for SynSeg-Net of the fork without the final Tanh")
    parser.add_argument(
        "--bounds", type=float, nargs=2, help="z-scores that SIFA maps to -1 and 1; by default those of its CT data"
    )
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    if arguments.out.exists():
        raise SystemExit(f"Expected --out to be a new file, but {arguments.out} exists.")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)  # fails here, and not after the refinement
    pl.seed_everything(arguments.seed, workers=True)

    network = read_network(arguments)
    files = sorted(path for path in arguments.images.iterdir() if path.suffix.lower() in FORMATS)
    if not files:
        raise SystemExit(f"Expected {' or '.join(FORMATS)} files in {arguments.images}, but found none.")
    samples = samples_of({path.name: network.preprocess(raw_slices(path)) for path in files})
    print(f"{len(samples)} images from {len(files)} files")

    module = APLModule(network, arguments.classes)
    data = TargetDataModule(samples, batch_size=arguments.batch_size)
    run = pl.Trainer(max_epochs=arguments.epochs, callbacks=[PseudoLabelCallback()], enable_checkpointing=False)
    run.fit(module, data)
    refined = module.export()
    torch.save(refined.state_dict(), arguments.out)
    print(f"Refined network: {arguments.out}")
    return refined


if __name__ == "__main__":
    main()
