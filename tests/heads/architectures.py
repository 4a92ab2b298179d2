"""All architectures that the tests run with two heads, and their table in the documentation.

`python tests/heads/architectures.py` writes the table to docs/architectures.md; a test compares each row with a run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import monai.networks.nets as monai_nets
import segmentation_models_pytorch as smp
import torch
import torchvision.models.segmentation as torchvision_nets
import transformers as hf
from torch import Tensor, nn

from apl_lightning import DualHeadModel, add_dual_heads
from apl_lightning.heads.find_classifier import example_input

CLASSES = 5
PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
START, END = "<!-- start:table, written by tests/heads/architectures.py -->\n", "<!-- end:table -->\n"


def smp_net(name: str, encoder: str = "resnet18", **options: Any) -> nn.Module:
    return getattr(smp, name)(encoder, encoder_weights=None, in_channels=1, classes=CLASSES, **options)


def torchvision_net(name: str, **options: Any) -> nn.Module:
    return getattr(torchvision_nets, name)(weights=None, weights_backbone=None, num_classes=CLASSES, **options)


SMP = {
    **{
        f"smp {name}": partial(smp_net, name)
        for name in (
            "Unet UnetPlusPlus MAnet Linknet FPN PSPNet PAN DeepLabV3 DeepLabV3Plus UPerNet".split()  # noqa: SIM905
        )
    },
    "smp Segformer": partial(smp_net, "Segformer", "mit_b0"),
    "smp DPT": partial(smp_net, "DPT", "tu-vit_tiny_patch16_224", dynamic_img_size=True),
}
TORCHVISION = {
    "torchvision DeepLabV3": partial(torchvision_net, "deeplabv3_mobilenet_v3_large", aux_loss=False),
    "torchvision DeepLabV3 with aux": partial(torchvision_net, "deeplabv3_mobilenet_v3_large", aux_loss=True),
    "torchvision FCN": partial(torchvision_net, "fcn_resnet50", aux_loss=False),
    "torchvision FCN with aux": partial(torchvision_net, "fcn_resnet50", aux_loss=True),
    "torchvision LRASPP": partial(torchvision_net, "lraspp_mobilenet_v3_large"),
}


def monai_net(dimensions: int) -> dict[str, Callable[[], nn.Module]]:
    """Small versions of MONAI's networks in two or three dimensions."""
    side = (64, 64) if dimensions == 2 else (32, 32, 32)
    unet = partial(monai_nets.UNet, dimensions, 1, CLASSES, (8, 16, 32), (2, 2))
    basic = {"features": (8, 8, 16, 16, 32, 8)}
    nested = partial(monai_nets.BasicUNetPlusPlus, dimensions, 1, CLASSES, features=(4, 4, 8, 8, 8, 4))
    dynamic = partial(
        monai_nets.DynUNet, dimensions, 1, CLASSES, [3] * 4, [1, 2, 2, 2], [2] * 3, filters=[4, 8, 12, 16]
    )
    ahnet = partial(monai_nets.AHNet, (1,) * 4, dimensions, 1, CLASSES)
    backbone = "efficientnet-b0" if dimensions == 2 else "resnet10"
    transformer = {"feature_size": 8, "hidden_size": 48, "mlp_dim": 96, "num_heads": 4, "spatial_dims": dimensions}
    blocks = {"blocks_down": (1,) * 4, "blocks_bottleneck": 1, "blocks_up": (1,) * 4, "kernel_size": 3}
    mednext = partial(monai_nets.MedNeXt, dimensions, 4, 1, CLASSES, **blocks)
    swin: dict[str, Any] = {"depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1), "window_size": 2, "norm_name": "batch"}
    highres = [
        {"name": "conv_0", "n_features": 8, "kernel_size": 3},
        {"name": "res_1", "n_features": 8, "kernels": (3, 3), "repeat": 2},
        {"name": "conv_1", "n_features": 12, "kernel_size": 1},
        {"name": "conv_2", "kernel_size": 1},
    ]
    return {
        "UNet": unet,
        "UNet with residual units": partial(unet, num_res_units=2),
        "BasicUNet": partial(monai_nets.BasicUNet, dimensions, 1, CLASSES, **basic),
        "BasicUNetPlusPlus": nested,
        "BasicUNetPlusPlus, deep supervision": partial(nested, deep_supervision=True),
        "AttentionUnet": partial(monai_nets.AttentionUnet, dimensions, 1, CLASSES, (8, 16, 32), (2, 2)),
        "SegResNet": partial(monai_nets.SegResNet, dimensions, 8, 1, CLASSES),
        "SegResNetDS": partial(monai_nets.SegResNetDS, dimensions, 8, 1, CLASSES, dsdepth=2),
        "SegResNetVAE": partial(
            monai_nets.SegResNetVAE, side, spatial_dims=dimensions, init_filters=8, in_channels=1, out_channels=CLASSES
        ),
        "DynUNet": dynamic,
        "DynUNet, deep supervision": partial(dynamic, deep_supervision=True, deep_supr_num=2),
        "SwinUNETR": partial(monai_nets.SwinUNETR, 1, CLASSES, feature_size=12, spatial_dims=dimensions, **swin),
        "UNETR": partial(monai_nets.UNETR, 1, CLASSES, side, **transformer),
        "VNet": partial(monai_nets.VNet, dimensions, 1, CLASSES),
        "FlexibleUNet": partial(monai_nets.FlexibleUNet, 1, CLASSES, backbone, spatial_dims=dimensions),
        "HighResNet": partial(monai_nets.HighResNet, dimensions, 1, CLASSES, layer_params=highres),
        "AHNet": partial(ahnet, psp_block_num=0 if dimensions == 3 else 4),
        "MedNeXt": mednext,
        "MedNeXt, deep supervision": partial(mednext, deep_supervision=True),
    }


MONAI = {f"MONAI {name} {d}D": build for d in (2, 3) for name, build in monai_net(d).items()}


def hugging_face_net(name: str) -> nn.Module:
    stages: dict[str, Any] = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32], "num_channels": 1}
    encoder: dict[str, Any] = {
        "num_channels": 1,
        "image_size": 64,
        "patch_size": 16,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    if name == "Segformer":
        config = hf.SegformerConfig(num_labels=CLASSES, decoder_hidden_size=16, **stages)
    elif name == "UperNet":
        backbone = hf.ConvNextConfig(out_features=["stage1", "stage2", "stage3", "stage4"], **stages)
        sizes = {"hidden_size": 16, "auxiliary_in_channels": 24, "auxiliary_channels": 8}
        config = hf.UperNetConfig(backbone_config=backbone, num_labels=CLASSES, **sizes)
    elif name == "DPT":
        necks = {"neck_hidden_sizes": [8, 16, 24, 32], "fusion_hidden_size": 16, "backbone_out_indices": [0, 1, 2, 3]}
        config = hf.DPTConfig(num_labels=CLASSES, **necks, **encoder)
    else:
        config = hf.BeitConfig(num_labels=CLASSES, out_indices=[1, 2, 3, 4], auxiliary_channels=8, **encoder)
    return getattr(hf, f"{name}ForSemanticSegmentation")(config)


HUGGING_FACE = {f"Hugging Face {n}": partial(hugging_face_net, n) for n in ("Segformer", "UperNet", "DPT", "Beit")}

ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {**SMP, **TORCHVISION, **MONAI, **HUGGING_FACE}


def row(name: str, model: DualHeadModel) -> str:
    """The table row of a network: classifier, second head and resolution."""
    image = example_input(model.network)
    main, _ = model.eval()(image)
    scale = image.shape[-1] // main.shape[-1]
    second = "a perturbed copy" if model.second is not None else "its own second output"
    return f"| {name} | `{model.head}` | {second} | {'full' if scale == 1 else f'1/{scale}'} |\n"


def table() -> str:
    """Run all architectures and format the table."""
    rows = [row(name, add_dual_heads(build().eval(), CLASSES)) for name, build in ARCHITECTURES.items()]
    return '| network | classifier | second head (`aux="auto"`) | resolution |\n|---|---|---|---|\n' + "".join(rows)


def routing(model: DualHeadModel, image: Tensor) -> None:
    """Check that each pair of logits has gradients on its side only, equal to those of a plain forward pass."""
    for_heads, for_encoder = model.routed(image)
    plain = model(image)
    scale = max(z.abs().max().item() for z in plain)
    for logits in (for_heads, for_encoder):
        torch.testing.assert_close(logits.main, plain.main, rtol=1e-4, atol=1e-5 * scale)
        torch.testing.assert_close(logits.aux, plain.aux, rtol=1e-4, atol=1e-5 * scale)
    heads, encoder = model.head_parameters(), model.encoder_parameters()
    sum(z.square().mean() for z in plain).backward()
    expected = {id(p): p.grad for p in heads + encoder if p.grad is not None}
    for logits, mine, others in ((for_heads, heads, encoder), (for_encoder, encoder, heads)):
        model.zero_grad()
        sum(z.square().mean() for z in logits).backward(retain_graph=True)
        assert all(p.grad is None or not p.grad.any() for p in others)
        norm = max(expected[id(p)].abs().max().item() for p in mine if id(p) in expected)
        for parameter in mine:
            if id(parameter) in expected:
                torch.testing.assert_close(parameter.grad, expected[id(parameter)], rtol=1e-3, atol=1e-5 * norm)
    model.zero_grad()


if __name__ == "__main__":
    before, rest = PAGE.read_text().split(START)
    PAGE.write_text(before + START + table() + END + rest.split(END)[1])
