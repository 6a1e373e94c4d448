"""Augmented batches against torchvision's transforms and written formulas, image by image."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small import augmentation
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from recipes import small
from utils.augmentation import mixed, shifted
from utils.data_utils import Dataset, Resizer, TrainBatches, sample_boxes, to_rows
from utils.randaugment import RandAugment

CLASSES = 10
MIXING = {"mixup": 0.8, "cutmix": 1.0, "mix_share": 0.7}
EVERYTHING = {"crop": "shift", "flip": True, "randaugment_ops": 2, "label_smoothing": 0.1, **MIXING}


def random_images(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator)


def labels_of(n):
    return torch.arange(n) * 7 % CLASSES


def scaled(images):
    return images.float() * (2 / 255) - 1


def augmented(images, size=32, seed=0, **entries):
    """Images and targets of a batch, and its draws."""
    augment = augmentation(Resizer(size), CLASSES, **entries)
    generator = torch.Generator().manual_seed(seed)
    draws = augment.draw(len(images), generator, np.random.default_rng(seed))
    return *augment(to_rows(images), labels_of(len(images)), draws), draws


# Crop and flip


@pytest.mark.parametrize("reach", [0, 1, 4, 16])
@pytest.mark.parametrize("flip", [False, True])
def test_shift_and_flip_are_torchvisions(reach, flip):
    """Truth: pad with reflection, crop and hflip of v2.functional; every shift that can be."""
    images = random_images(200)
    x, labels, draws = augmented(images, crop="shift", shift=reach, flip=flip)
    assert torch.equal(labels, labels_of(200))
    padded = v2.Pad(reach, padding_mode="reflect")(images)
    for i, (row, column) in enumerate(draws["shift"].tolist()):
        expected = tv.crop(padded[i], reach + row, reach + column, 32, 32)
        if flip and draws["flipped"][i]:
            expected = tv.horizontal_flip(expected)
        assert torch.equal(x[i], scaled(expected))
    drawn = {tuple(s) for s in draws["shift"].tolist()}
    assert len(drawn) == (2 * reach + 1) ** 2 if reach < 2 else len(drawn) > 60
    assert draws["shift"].abs().amax(0).tolist() == [reach, reach]


def test_a_shift_to_the_right_shows_what_was_there():
    """Truth: an image whose pixel (i, j) is 3i + j, cropped at row 2 and column -3, by hand."""
    pixel = torch.arange(32)
    image = (3 * pixel[:, None] + pixel).to(torch.uint8).expand(1, 3, 32, 32)
    got = shifted(to_rows(image), torch.tensor([[2, -3]]))[0, 0]
    assert got[0, :5].tolist() == [6 + 3, 6 + 2, 6 + 1, 6 + 0, 6 + 1]
    assert got[27:, 5].tolist() == [3 * row + 2 for row in (29, 30, 31, 30, 29)]


@pytest.mark.parametrize("size", [16, 32, 48])
def test_flipped_crops(size):
    """Truth: the resizer's crop by the image's own box, which test_data_utils.py holds against
    torchvision's, and hflip."""
    images = random_images(40)
    x, _, draws = augmented(images, size, flip=True)
    crops = Resizer(size)(to_rows(images), draws["box"])
    assert 8 < draws["flipped"].sum() < 32
    for i, is_flipped in enumerate(draws["flipped"]):
        assert torch.equal(x[i], tv.horizontal_flip(crops[i]) if is_flipped else crops[i])


def test_randaugment_comes_first():
    """Truth: RandAugment's images, then torchvision's crop and flip."""
    images = random_images(60)
    x, _, draws = augmented(images, crop="shift", flip=True, randaugment_ops=2)
    colored = RandAugment(2, 9)(images, draws["ops"])
    padded = v2.Pad(4, padding_mode="reflect")(colored)
    assert (colored != images).flatten(1).any(1).sum() > 40
    for i, (row, column) in enumerate(draws["shift"].tolist()):
        expected = tv.crop(padded[i], 4 + row, 4 + column, 32, 32)
        expected = tv.horizontal_flip(expected) if draws["flipped"][i] else expected
        assert torch.equal(x[i], scaled(expected))


# Mixing


def written_mix(x, targets, draws, i):
    """Image i and its target, mixed with those of the one before by plain numbers."""
    side, own = x.shape[-1], np.ones((x.shape[-1],) * 2)
    if draws["is_mixed"][i]:
        if draws["is_cut"][i]:
            half = np.sqrt(1 - draws["cutmix"][i].item()) / 2
            (top, bottom), (left, right) = (
                [round(min(max(c + s * half, 0), 1) * side) for s in (-1, 1)]
                for c in draws["center"][i].tolist()
            )
            own[top:bottom, left:right] = 0
        else:
            own[:] = draws["mixup"][i].item()
    image = own * x[i].double().numpy() + (1 - own) * x[i - 1].double().numpy()
    share = own.mean()
    target = share * targets[i].double().numpy() + (1 - share) * targets[i - 1].double().numpy()
    return image, target


@pytest.mark.parametrize("entries", [{"mixup": 0.2}, {"cutmix": 1.0}, MIXING], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixing_is_as_written(entries, smoothing):
    """Truth: mixup's and cutmix's formulas for each image, with the one before it in the batch."""
    images = random_images(100)
    x, targets, draws = augmented(images, crop="shift", label_smoothing=smoothing, **entries)
    plain, labels, _ = augmented(images, crop="shift")  # draws the same shifts
    whole = F.one_hot(labels, CLASSES) * (1 - smoothing) + smoothing / CLASSES
    kinds = {"mixup": {False}, "cutmix": {True}, "mix_share": {False, True}}[list(entries)[-1]]
    assert set(draws["is_cut"].tolist()) == kinds
    for i in range(100):
        image, target = written_mix(plain, whole, draws, i)
        np.testing.assert_allclose(x[i].numpy(), image, rtol=0, atol=1e-6)
        np.testing.assert_allclose(targets[i].numpy(), target, rtol=0, atol=1e-6)
    torch.testing.assert_close(targets.sum(1), torch.ones(100))
    assert len(targets.unique(dim=0)) > 50  # the images of a batch have draws of their own


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_target_is_the_share_of_the_pixels(dtype):
    """Truth: images of one grey, black and white in turn, whose mean tells the share."""
    n = 64
    greys = (torch.arange(n) % 2 * 2.0 - 1).to(dtype)
    x = greys.view(-1, 1, 1, 1).expand(-1, 3, 32, 32)
    augment = augmentation(Resizer(32), 2, **MIXING)
    draws = augment.draw(n, torch.Generator(), np.random.default_rng(3))
    mixture, targets = mixed(x, F.one_hot(torch.arange(n) % 2, 2).float(), draws)
    assert mixture.dtype == dtype and targets.dtype == torch.float32
    white = (mixture.double().mean((1, 2, 3)) + 1) / 2
    tolerance = 1e-6 if dtype == torch.float32 else 4e-3
    np.testing.assert_allclose(targets[:, 1].numpy(), white.numpy(), rtol=0, atol=tolerance)
    assert ((targets[:, 1] > 0.01) & (targets[:, 1] < 0.99)).sum() > 20


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_mix_share(share):
    """Truth: so many of 2,000 images differ from their own (5 standard deviations)."""
    images = random_images(2000)
    x, targets, draws = augmented(images, crop="shift", mixup=1.0, mix_share=share)
    plain, labels, _ = augmented(images, crop="shift")
    is_own = (x == plain).flatten(1).all(1)
    assert torch.equal(is_own, ~draws["is_mixed"])
    assert abs((~is_own).double().mean() - share) <= 5 * (share * (1 - share) / 2000) ** 0.5
    assert torch.equal(targets[is_own], F.one_hot(labels, CLASSES)[is_own].float())


def test_the_laws_of_the_draws():
    """Truth: Beta(a, a) has mean 1/2 and variance 1 / (4 (2a + 1)); the rest is uniform."""
    augment = augmentation(Resizer(32), CLASSES, **EVERYTHING | {"mixup": 0.2, "cutmix": 2.0})
    draws = augment.draw(40_000, torch.Generator(), np.random.default_rng(1))
    for name, a in (("mixup", 0.2), ("cutmix", 2.0)):
        assert draws[name].mean() == pytest.approx(0.5, abs=0.01)
        assert draws[name].var() == pytest.approx(1 / (4 * (2 * a + 1)), rel=0.03)
    for name, mean in (("is_cut", 0.5), ("is_mixed", 0.7), ("flipped", 0.5)):
        assert draws[name].double().mean() == pytest.approx(mean, abs=0.015), name
    columns = [draws["center"], draws["shift"], draws["flipped"][:, None], draws["mixup"][:, None]]
    table = np.corrcoef(torch.cat([c.double() for c in columns], 1).numpy().T)
    assert np.abs(table - np.eye(len(table))).max() < 0.03
    assert draws["center"].min() < 0.001 and draws["center"].max() > 0.999


# Labels


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_smoothed_labels(smoothing):
    """Truth: F.cross_entropy of the plain labels with label_smoothing."""
    _, targets, _ = augmented(random_images(50), crop="shift", label_smoothing=smoothing)
    logits = torch.randn(50, CLASSES, generator=torch.Generator().manual_seed(4))
    expected = F.cross_entropy(logits, labels_of(50), label_smoothing=smoothing)
    torch.testing.assert_close(F.cross_entropy(logits, targets), expected)
    assert targets.is_floating_point() == bool(smoothing)


# Batches


def batches_of(seed=5, n=90, size=32, **entries):
    images, labels = random_images(n), labels_of(n)
    dataset = Dataset(images, labels, images[:1], labels[:1], list("0123456789"))
    augment = augmentation(Resizer(size), CLASSES, **entries)
    return TrainBatches(dataset, 20, augment, seed, "cpu")


def test_draws_depend_on_seed_and_epoch_alone():
    """Truth: a fresh object, asked out of order, whatever the seeds of torch and NumPy."""
    expected = [batches_of(**EVERYTHING)(i) for i in range(12)]
    batches = batches_of(**EVERYTHING)
    for i in (11, 3, 0, 4, 7, 5, 10):
        torch.manual_seed(i)
        np.random.seed(i)
        for mine, truth in zip(batches(i), expected[i]):
            assert torch.equal(mine, truth)
    draws = []
    for seed, i in ((5, 0), (5, 5), (6, 0)):
        batches = batches_of(seed, **EVERYTHING)
        batches(i)
        draws.append(copy.deepcopy(batches.draws))
    for name, values in draws[0].items():
        for other in draws[1:]:
            same = (values == other[name]).flatten(1 if values.ndim > 1 else 0)
            assert same.double().mean() < 0.8, name


def test_an_image_has_its_own_draws_wherever_it_is():
    """Truth: torchvision's crop of each image of each batch by the draws under its number."""
    batches = batches_of(crop="shift", flip=True)
    padded = v2.Pad(4, padding_mode="reflect")(random_images(90))
    for i in (4, 5):  # an epoch's last batch, and the first of the next
        x, _ = batches(i)
        assert len(x) == (10 if i == 4 else 20)
        for image, number in zip(x, batches.indices(i)):
            row, column = batches.draws["shift"][number]
            expected = tv.crop(padded[number], 4 + row, 4 + column, 32, 32)
            flip = batches.draws["flipped"][number]
            assert torch.equal(image, scaled(tv.horizontal_flip(expected) if flip else expected))


def test_the_reference_recipe_draws_boxes_alone():
    """Truth: the program before there were recipes: order and boxes from the epoch's generator,
    the crop of each by the resizer, and labels as numbers."""
    batches = batches_of(size=24)
    for epoch in (0, 1):
        x, labels = batches(5 * epoch + 1)
        seed = np.random.SeedSequence([5, epoch]).generate_state(1)[0]
        generator = torch.Generator().manual_seed(int(seed))
        chosen = torch.randperm(90, generator=generator)[20:40]
        boxes = sample_boxes(90, generator)
        assert list(batches.draws) == ["box"] and torch.equal(batches.draws["box"], boxes)
        assert torch.equal(x, Resizer(24)(to_rows(random_images(90)[chosen]), boxes[chosen]))
        assert torch.equal(labels, labels_of(90)[chosen])


def test_the_small_recipe():
    """Truth: its page: shifts of up to 4 pixels, flips, targets 0.1 smooth, and nothing else."""
    batches = batches_of(**small().to_dict())
    x, targets = batches(0)
    assert sorted(batches.draws) == ["flipped", "shift"]
    assert batches.draws["shift"].abs().max() == 4
    values = targets.unique()
    torch.testing.assert_close(values, torch.tensor([0.01, 0.91]))
    assert torch.equal(targets.argmax(1), labels_of(90)[batches.indices(0)])
