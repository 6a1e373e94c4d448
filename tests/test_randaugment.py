"""Batches of RandAugment against torchvision's, image by image.

Truth: v2.RandAugment's own table of magnitudes and its own calls of v2.functional (two private
names of torchvision, which the program uses too, for whole batches). All comparisons are exact: no
grey level and no pixel may differ.
"""

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import v2

from utils.randaugment import RandAugment

TORCHVISION = v2.RandAugment()
OPS = list(TORCHVISION._AUGMENTATION_SPACE)


def torchvisions(image, op, sign, magnitude):
    levels, signed = TORCHVISION._AUGMENTATION_SPACE[OPS[op]]
    levels = levels(31, 32, 32)
    level = 0.0 if levels is None else float(levels[magnitude])
    return TORCHVISION._apply_image_or_video_transform(
        image,
        OPS[op],
        -level if signed and sign else level,
        TORCHVISION.interpolation,
        TORCHVISION._fill,
    )


@pytest.fixture(scope="module")
def images():
    """Random, of few greys, black and white, smooth, mostly of one grey, and of one alone."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8, generator=generator)
    row, column = torch.arange(32).view(-1, 1), torch.arange(32)
    smooth = torch.stack([row * 8 + column // 4, row * 3 + column * 3 + 40, 200 - row * column / 8])
    waves = torch.stack([row / 3 + column / 5, row / 7 - column, (row + column) / 4])
    waves = 128 + 100 * waves.sin()
    few, more = (torch.where(noise[0] < part, noise[1] // 2, 201) for part in (40, 100))
    flat = torch.tensor([0, 90, 255], dtype=torch.uint8).view(3, 1, 1).expand(3, 32, 32)
    made = torch.stack([smooth, waves, few, more, flat]).to(torch.uint8)
    return torch.cat([noise, noise[:2] // 16 + 100, noise[:1] // 128 * 255, made])


@pytest.mark.parametrize("op", range(14), ids=OPS)
def test_each_op_is_torchvisions(images, op):
    """At every magnitude and with both signs."""
    for magnitude in range(31):
        augment = RandAugment(1, magnitude)
        for sign in (0, 1):
            ours = augment(images, torch.tensor([op, sign]).expand(len(images), 1, 2))
            theirs = [torchvisions(image, op, sign, magnitude) for image in images]
            assert torch.equal(ours, torch.stack(theirs)), (magnitude, sign)


def test_a_mixed_batch_goes_through_its_ops_in_their_order():
    """Truth: torchvision's op of each round, on each of 300 images with its own three draws."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (300, 3, 32, 32), dtype=torch.uint8, generator=generator)
    augment = RandAugment(3, 13)
    draws = augment.draw(300, np.random.default_rng(0))
    assert len(draws[..., 0].unique()) == 14
    before = images.clone()
    ours = augment(images, draws)
    for image, mine, rounds in zip(images, ours, draws.tolist()):
        for op, sign in rounds:
            image = torchvisions(image, op, sign, 13)
        assert torch.equal(mine, image), rounds
    assert torch.equal(images, before)  # the caller's images stay


def test_an_image_is_changed_without_regard_to_the_others(images):
    """Alone, or in a batch in another order and memory layout, it comes out the same."""
    images = images.repeat(10, 1, 1, 1)
    augment = RandAugment()
    draws = augment.draw(len(images), np.random.default_rng(1))
    together = augment(images, draws)
    for i in range(len(images)):
        assert torch.equal(augment(images[i : i + 1], draws[i : i + 1])[0], together[i])
    order = torch.arange(len(images)).flip(0)
    rows = images[order].transpose(1, 2).contiguous()  # as TrainBatches stores them
    assert torch.equal(augment(rows.transpose(1, 2), draws[order]), together[order])


def test_each_image_draws_its_own_uniform_ops():
    """Truth: ops and signs, those of two rounds and those of two neighbours, are independent and
    uniform (chi-square); an op and its sign make 28 kinds."""
    draws = RandAugment().draw(100_000, np.random.default_rng(2))
    kinds = (draws[..., 0] * 2 + draws[..., 1]).numpy()
    first, second = kinds.T
    for one, other in ((first, second), (first[::2], first[1::2]), (second[::2], second[1::2])):
        table = np.bincount(one * 28 + other, minlength=28 * 28)
        assert len(table) == 28 * 28 and stats.chisquare(table).pvalue > 1e-3
    again = RandAugment().draw(100_000, np.random.default_rng(2))
    assert torch.equal(draws, again)


def test_magnitude_0_changes_nothing_but_by_three_ops(images):
    """Solarize inverts what is white; AutoContrast and Equalize have no magnitude."""
    for op, name in enumerate(OPS):
        for sign in (0, 1):
            draws = torch.tensor([op, sign]).expand(len(images), 1, 2)
            ours = RandAugment(1, 0)(images, draws)
            if name == "Solarize":
                assert torch.equal(ours, images.masked_fill(images == 255, 0))
            elif name in ("AutoContrast", "Equalize"):
                assert torch.equal(ours, RandAugment(1, 30)(images, draws))
                assert not torch.equal(ours, images)
            else:
                assert torch.equal(ours, images), name


def test_no_ops_change_nothing(images):
    augment = RandAugment(0)
    assert torch.equal(augment(images, augment.draw(len(images), np.random.default_rng())), images)
