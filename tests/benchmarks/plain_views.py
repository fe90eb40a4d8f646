"""The multi-crop recipe the plain way: torchvision and timm transforms on PIL images,
nothing of ours.

Crops, flips, jitter, blur and erasing are drawn by the transforms themselves; strong crops augment
the whole image first. Floats, normalized in the worker, come out.
"""

import random
from pathlib import Path

import torch
from PIL import Image, ImageFilter, ImageOps
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torch.utils.data import DataLoader, RandomSampler
from torchvision import transforms as T
from torchvision.datasets import ImageFolder

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LARGE, SMALL = (0.25, 1.0), (0.05, 0.25)


class Blur:
    """PIL's Gaussian blur with probability p."""

    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self, image: Image.Image) -> Image.Image:
        if random.random() >= self.p:
            return image
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


def resized_crop(size: int, scale: tuple[float, float]) -> torch.nn.Module:
    return T.RandomResizedCrop(size, scale=scale, interpolation=T.InterpolationMode.BICUBIC)


def weak(size: int, scale: tuple[float, float], blur: float, solarize: float = 0.0) -> T.Compose:
    steps = [
        resized_crop(size, scale),
        T.RandomHorizontalFlip(),
        T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
        T.RandomGrayscale(0.2),
        Blur(blur),
    ]
    if solarize:
        steps.append(T.RandomSolarize(128, p=solarize))
    return T.Compose([*steps, T.ToTensor(), T.Normalize(MEAN, STD)])


def strong(size: int, scale: tuple[float, float]) -> T.Compose:
    return T.Compose(
        [
            T.RandomHorizontalFlip(),
            rand_augment(),
            resized_crop(size, scale),
            T.ToTensor(),
            RandomErasing(0.25, mode="pixel", max_count=1, device="cpu"),
            T.Normalize(MEAN, STD),
        ]
    )


def rand_augment() -> object:
    """timm's, but for posterizing to 0 bits, which Pillow refuses: it gives a black image."""
    augment = rand_augment_transform("rand-m9-mstd0.5-inc1", {"img_mean": (124, 116, 104)})
    for operation in augment.ops:
        if operation.name.startswith("Posterize"):
            operation.aug_fn = posterize
    return augment


def posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    """Keep the upper bits of each value."""
    return ImageOps.posterize(image, bits) if bits else Image.new("RGB", image.size)


class MultiCrop:
    """Image -> 14 crops: two for the teacher, two large and ten small ones for the student."""

    def __init__(self) -> None:
        self.weak = (weak(224, LARGE, 1.0), weak(224, LARGE, 0.1, 0.2))
        self.strong, self.weak_small, self.strong_small = (
            strong(224, LARGE),
            weak(96, SMALL, 0.5),
            strong(96, SMALL),
        )

    def __call__(self, image: Image.Image) -> list[torch.Tensor]:
        student = (self.strong, self.strong) if random.random() > 0.5 else self.weak
        small = [self.strong_small if random.random() > 0.5 else self.weak_small for _ in range(10)]
        return [transform(image) for transform in (*self.weak, *student, *small)]


def plain_loader(
    folder: Path, batch_size: int, workers: int, passes: int
) -> "DataLoader[list[torch.Tensor]]":
    """The images of a folder, shuffled, several times; its worker processes stay."""
    images = ImageFolder(folder, MultiCrop())
    return DataLoader(
        images,
        batch_size=batch_size,
        sampler=RandomSampler(images, num_samples=passes * len(images)),
        num_workers=workers,
        persistent_workers=True,
        pin_memory=torch.cuda.is_available(),
        drop_last=True,
    )
