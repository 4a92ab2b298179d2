"""Synthetic abdomens: the same anatomy as an MR-like and as a CT-like image.

Axial slices in radiological orientation (the patient's right is on the left): liver, two kidneys and spleen in a body
with fat, muscle, spine, aorta and bowel. Each contour and size is random.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

CLASS_NAMES = ["background", "liver", "right kidney", "left kidney", "spleen"]

# Mean intensity of each tissue per modality, and the strength of texture, noise and bias field.
LOOKS = {
    "mr": {"air": 0.02, "fat": 0.15, "muscle": 0.22, "bowel": 0.5, "bone": 0.05, "marrow": 0.33, "aorta": 0.08}
    | {"liver": 0.38, "right kidney": 0.78, "left kidney": 0.78, "spleen": 0.68},
    "ct": {"air": 0.0, "fat": 0.22, "muscle": 0.46, "bowel": 0.40, "bone": 0.95, "marrow": 0.52, "aorta": 0.72}
    | {"liver": 0.60, "right kidney": 0.74, "left kidney": 0.74, "spleen": 0.66},
}
TEXTURE = {"mr": 0.05, "ct": 0.03}
NOISE = {"mr": 0.03, "ct": 0.07}
BIAS = {"mr": 0.30, "ct": 0.0}

# Centre (x, y) and radii of each part in a frame from -1 to 1; later parts cover earlier ones.
ANATOMY = [
    ("fat", (0.0, 0.0), (0.92, 0.70)),
    ("muscle", (0.0, 0.02), (0.82, 0.60)),
    ("bowel", (0.12, -0.20), (0.30, 0.22)),
    ("liver", (-0.40, -0.08), (0.40, 0.36)),
    ("spleen", (0.58, 0.02), (0.15, 0.26)),
    ("right kidney", (-0.34, 0.32), (0.13, 0.17)),
    ("left kidney", (0.34, 0.30), (0.13, 0.17)),
    ("bone", (0.0, 0.42), (0.16, 0.15)),
    ("marrow", (0.0, 0.42), (0.13, 0.12)),
    ("aorta", (0.06, 0.20), (0.06, 0.06)),
]


class Phantoms(Dataset[dict[str, object]]):
    """Synthetic abdomens of one modality: dictionaries with `image` (1, S, S), `case` and, if labelled, `label` (S, S).

    Args:
        look: `"mr"` or `"ct"`.
        count: Number of patients; each has one slice.
        seed: Seed of the anatomies. The same seed draws the same patients in both modalities.
        size: Number of rows and columns.
        labelled: Whether samples have a label.
    """

    def __init__(self, look: str, count: int, seed: int, size: int = 96, labelled: bool = True) -> None:
        if count > 500:
            raise ValueError(f"Expected at most 500 patients, whose seeds differ, but got {count}: pass fewer.")
        self.samples = []
        for case in range(count):
            parts = draw_anatomy(torch.Generator().manual_seed(1000 * seed + case), size)
            image = render(parts, look, torch.Generator().manual_seed(1000 * seed + case + 500))
            sample: dict[str, object] = {"image": image, "case": f"patient {case}"}
            if labelled:
                sample["label"] = label_map(parts)
            self.samples.append(sample)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, object]:
        return self.samples[index]


def draw_anatomy(generator: torch.Generator, size: int) -> dict[str, Tensor]:
    """Draw one mask (S, S) per part, ordered from back to front."""
    axis = torch.linspace(-1, 1, size)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    stretch = 1 + 0.08 * torch.randn(2, generator=generator)
    parts = {}
    for name, (centre_x, centre_y), (radius_x, radius_y) in ANATOMY:
        jitter = 1 + 0.12 * torch.randn(2, generator=generator)
        move = 0.03 * torch.randn(2, generator=generator)
        dx = x / stretch[0] - centre_x - move[0]
        dy = y / stretch[1] - centre_y - move[1]
        angle = torch.atan2(dy, dx)
        contour = torch.ones_like(angle)
        for wave in (2, 3, 4):
            amount, phase = torch.randn(2, generator=generator)
            contour += 0.05 * amount * torch.cos(wave * angle + 6.3 * phase)
        parts[name] = (dx / (radius_x * jitter[0])) ** 2 + (dy / (radius_y * jitter[1])) ** 2 < contour**2
    return parts


def label_map(parts: dict[str, Tensor]) -> Tensor:
    """Class indices (S, S) of the frontmost part at each pixel."""
    label = torch.zeros_like(parts["fat"], dtype=torch.long)
    for name, mask in parts.items():
        label[mask] = CLASS_NAMES.index(name) if name in CLASS_NAMES else 0
    return label


def render(parts: dict[str, Tensor], look: str, generator: torch.Generator) -> Tensor:
    """Render an image (1, S, S) in [0, 1] with texture, blur, bias field and noise."""
    brightness = LOOKS[look]
    size = parts["fat"].shape[0]
    image = torch.full((size, size), brightness["air"])
    for name, mask in parts.items():
        image[mask] = brightness[name] * (1 + 0.06 * float(torch.randn((), generator=generator)))
    texture = F.interpolate(torch.randn(1, 1, size // 3, size // 3, generator=generator), (size, size), mode="bilinear")
    image = image + TEXTURE[look] * texture[0, 0] * (image > 0.1)
    blurred = F.avg_pool2d(image[None, None], 3, stride=1, padding=1)[0, 0]
    field = F.interpolate(torch.randn(1, 1, 3, 3, generator=generator), (size, size), mode="bicubic")[0, 0]
    image = blurred * torch.exp(BIAS[look] * field / math.sqrt(2))
    noise = NOISE[look] * torch.randn(size, size, generator=generator)
    return (image + noise).clamp(0, 1)[None]
