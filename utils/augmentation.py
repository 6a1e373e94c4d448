"""Augmentation of training batches on their device, with separate draws for each image.

torchvision's transforms draw once per call, so for a whole batch. Here all draws of an epoch are
made at once, from its generators, and each batch takes those of its images.
"""

import torch
import torch.nn.functional as F

from utils.data_utils import SIDE, sample_boxes
from utils.randaugment import RandAugment


class Augmentation:
    """RandAugment, crop and flip, then mixup or cutmix, as the entries of `recipe` say.

    `draw` makes the draws of n images; `__call__` makes a batch's images and targets with its
    share of the draws. `resizer` is a `Resizer`; `classes` counts the labels.
    """

    def __init__(self, recipe, resizer, classes):
        self.recipe, self.resizer, self.classes = recipe, resizer, classes
        if recipe.randaugment_ops:
            self.randaugment = RandAugment(recipe.randaugment_ops, recipe.randaugment_magnitude)

    def draw(self, n, generator, rng):
        """Draw for n images, a dict of tensors (n, ...); rng is NumPy's generator."""
        recipe, draws = self.recipe, {}
        if recipe.crop == "resized":
            draws["box"] = sample_boxes(n, generator, (recipe.smallest_crop, 1.0))
        else:
            draws["shift"] = rng.integers(-recipe.shift, recipe.shift + 1, (n, 2))
        if recipe.randaugment_ops:
            draws["ops"] = self.randaugment.draw(n, rng)
        if recipe.flip:
            draws["flipped"] = rng.random(n) < 0.5
        if recipe.mixup or recipe.cutmix:
            chance = 0.5 if recipe.mixup and recipe.cutmix else float(bool(recipe.cutmix))
            draws["is_cut"] = rng.random(n) < chance
            draws["is_mixed"] = rng.random(n) < recipe.mix_share
            draws["mixup"] = rng.beta(*[recipe.mixup or 1.0] * 2, n)
            draws["cutmix"] = rng.beta(*[recipe.cutmix or 1.0] * 2, n)
            draws["center"] = rng.random((n, 2))
        draws = {name: torch.as_tensor(values) for name, values in draws.items()}
        # Apple's MPS knows no float64.
        return {n: d.float() if d.is_floating_point() else d for n, d in draws.items()}

    def __call__(self, images, labels, draws):
        """images (B, 32, 3, 32) uint8, labels (B,): images (B, 3, S, S) in [-1, 1] and targets.

        Targets are the labels, or probabilities (B, classes) where labels are smoothed or mixed.
        """
        if self.recipe.randaugment_ops:
            images = self.randaugment(images.transpose(1, 2), draws["ops"])
            images = images.transpose(1, 2)
        if self.recipe.crop == "shift":
            x = shifted(images, draws["shift"], draws.get("flipped"))
            x = (x.float() * (2 / 255) - 1).to(self.resizer.dtype)
        else:
            x = self.resizer(images.contiguous(), draws["box"])
            if self.recipe.flip:
                x = torch.where(draws["flipped"][:, None, None, None], x.flip(-1), x)
        smoothing, mixes = self.recipe.label_smoothing, "center" in draws
        if smoothing or mixes:
            labels = F.one_hot(labels, self.classes) * (1 - smoothing) + smoothing / self.classes
        return mixed(x, labels, draws) if mixes else (x, labels)


def shifted(images, shifts, flipped=None):
    """Images (B, 32, 3, 32) moved by shifts (B, 2), rows and columns, borders reflected; flipped.

    A crop of the padded image: pixel (i, j) is that at (i + row, j + column). Returns
    (B, 3, 32, 32).
    """
    pixel = torch.arange(SIDE, device=images.device)

    def reflected(shift):
        place = (pixel + shift[:, None]).abs()
        return (SIDE - 1) - ((SIDE - 1) - place).abs()

    rows, columns = reflected(shifts[:, 0]), reflected(shifts[:, 1])
    if flipped is not None:
        columns = torch.where(flipped[:, None], columns.flip(1), columns)
    number = torch.arange(len(images), device=images.device)
    x = images[number[:, None], rows]  # (B, 32, 3, 32); rows first, as each is contiguous
    return x.gather(3, columns[:, None, None, :].expand_as(x)).transpose(1, 2)


def mixed(x, targets, draws):
    """Mixup or cutmix of each image with the one before it in the batch.

    x (B, 3, S, S), targets (B, classes). An image keeps a part w of each pixel (mixup) or of its
    area (cutmix: all but a box). Source: Zhang et al. 2018; Yun et al. 2019.
    """
    side = x.shape[-1]
    edge = torch.sqrt(1 - draws["cutmix"])[:, None] / 2  # half a box's, the image's being 1
    low = ((draws["center"] - edge).clamp(0, 1) * side).round()
    high = ((draws["center"] + edge).clamp(0, 1) * side).round()
    pixel = torch.arange(side, device=x.device)
    inside = (pixel >= low[..., None]) & (pixel < high[..., None])  # (B, 2, S)
    outside = ~(inside[:, 0, :, None] & inside[:, 1, None, :])  # (B, S, S)
    kept = torch.where(
        draws["is_cut"][:, None, None], outside.float(), draws["mixup"][:, None, None]
    )
    kept = torch.where(draws["is_mixed"][:, None, None], kept, 1.0).to(x.dtype)
    weight = kept.float().mean(dim=(1, 2))[:, None]
    x = torch.lerp(x.roll(1, 0), x, kept[:, None])
    return x, torch.lerp(targets.roll(1, 0), targets, weight)
