"""The data path against torchvision's transforms and datasets, and the batches' bookkeeping."""

import pickle

import numpy as np
import pytest
import torch
from programs import DATA, needs_cifar10
from scipy import stats
from small import augmentation
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as tv

from utils.data_utils import (
    Dataset,
    Resizer,
    TestBatches,
    TrainBatches,
    load_dataset,
    resize,
    sample_boxes,
    to_rows,
)
from utils.errors import UserError


def random_images(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator)


# ---------------------------------------------------------------- boxes


@pytest.fixture(scope="module")
def boxes():
    """20,000 boxes of ours and of torchvision, each (top, left, height, width)."""
    n = 20_000
    torch.manual_seed(0)
    image = torch.empty(3, 32, 32)
    theirs = [RandomResizedCrop.get_params(image, [0.05, 1.0], [3 / 4, 4 / 3]) for _ in range(n)]
    return sample_boxes(n, torch.Generator().manual_seed(1)).numpy(), np.array(theirs)


def same_law(ours, theirs):
    """The p-value of two samples of whole numbers having one distribution (chi-square)."""
    low, high = min(ours.min(), theirs.min()), max(ours.max(), theirs.max())
    table = np.array([np.bincount(x - low, minlength=high - low + 1) for x in (ours, theirs)])
    rare = table.sum(0) < 20  # pooled: the test wants no near-empty cells
    table = np.column_stack([table[:, ~rare], table[:, rare].sum(1)])
    return stats.chi2_contingency(table[:, table.sum(0) > 0]).pvalue


def test_boxes_lie_in_the_image(boxes):
    """Truth: the image has 32 pixels both ways; every size from the smallest to all is drawn."""
    top, left, height, width = boxes[0].T
    assert (top >= 0).all() and (left >= 0).all() and (height > 0).all() and (width > 0).all()
    assert (top + height <= 32).all() and (left + width <= 32).all()
    assert height.min() == width.min() == boxes[1][:, 2].min() == 6
    assert height.max() == width.max() == 32


def test_boxes_are_torchvisions(boxes):
    """Truth: 20,000 draws of RandomResizedCrop.get_params: sizes, areas, shapes and places."""
    (top, left, height, width), (top2, left2, height2, width2) = boxes[0].T, boxes[1].T
    for ours, theirs in zip(boxes[0].T, boxes[1].T):
        assert same_law(ours, theirs) > 1e-3
    assert same_law(height - width, height2 - width2) > 1e-3
    assert same_law(height * width // 16, height2 * width2 // 16) > 1e-3
    assert stats.ks_2samp(height * width, height2 * width2).pvalue > 1e-3
    assert stats.ks_2samp(height / width, height2 / width2).pvalue > 1e-3
    for low, high in ((6, 14), (15, 20), (21, 26), (27, 32)):
        ours, theirs = ((low <= h) & (h <= high) for h in (height, height2))
        assert same_law(top[ours], top2[theirs]) > 1e-3
        ours, theirs = ((low <= w) & (w <= high) for w in (width, width2))
        assert same_law(left[ours], left2[theirs]) > 1e-3


def test_box_places_are_uniform(boxes):
    """Truth: given its height h, the top is uniform on 0..32-h, and independent of the left."""
    top, left, height, width = boxes[0].T
    for h in (10, 16, 22, 28):
        counts = np.bincount(top[height == h], minlength=33 - h)
        assert len(counts) == 33 - h
        assert stats.chisquare(counts).pvalue > 1e-3
    chosen = (height <= 24) & (width <= 24)
    upper = top[chosen] * 2 < 32 - height[chosen]
    lefter = left[chosen] * 2 < 32 - width[chosen]
    table = np.histogram2d(upper, lefter, bins=2)[0]
    assert stats.chi2_contingency(table).pvalue > 1e-3


# ---------------------------------------------------------------- resizing


def torchvisions(image, box, size):
    pixels = image.double() / 255
    y = tv.resized_crop(pixels, *box, [size, size], InterpolationMode.BILINEAR, antialias=True)
    return ((y - 0.5) / 0.5).float()


@pytest.mark.parametrize("size", [224, 48, 32, 16])
def test_crops_are_torchvisions(size):
    """Truth: v2.functional.resized_crop(antialias=True) in float64, then (x - 0.5)/0.5."""
    images = random_images(24)
    boxes = sample_boxes(24, torch.Generator().manual_seed(2))
    boxes[:4] = torch.tensor([[0, 0, 32, 32], [26, 0, 6, 7], [0, 24, 8, 8], [31, 31, 1, 1]])
    got = Resizer(size)(to_rows(images), boxes)
    assert got.shape == (24, 3, size, size) and got.dtype == torch.float32
    expected = [torchvisions(image, box, size) for image, box in zip(images, boxes.tolist())]
    torch.testing.assert_close(got, torch.stack(expected), rtol=0, atol=1e-5)
    half = Resizer(size, dtype=torch.bfloat16)(to_rows(images), boxes)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), torch.stack(expected), rtol=0, atol=0.03)


@pytest.mark.parametrize("size", [224, 48, 32, 16])
def test_whole_images_are_torchvisions(size):
    """Truth: v2.functional.resize(antialias=True); at 32 the pixels themselves."""
    images = random_images(4)
    got = resize(images, size)
    expected = tv.resize(images.double() / 255, [size, size], antialias=True) * 2 - 1
    torch.testing.assert_close(got, expected.float(), rtol=0, atol=1e-5)
    whole = torch.tensor([[0, 0, 32, 32]]).expand(4, 4)
    assert torch.equal(Resizer(size)(to_rows(images), whole), got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_pixel_from_outside_the_box(dtype):
    """Truth: the same images with every pixel outside the box changed give the same crops."""
    images = random_images(32)
    boxes = sample_boxes(32, torch.Generator().manual_seed(3))
    changed = 255 - images
    for image, other, (top, left, height, width) in zip(images, changed, boxes.tolist()):
        inside = slice(top, top + height), slice(left, left + width)
        other[:, *inside] = image[:, *inside]
    for size in (40, 16):
        resizer = Resizer(size, dtype=dtype)
        got, expected = (resizer(to_rows(x), boxes) for x in (changed, images))
        assert torch.equal(got, expected)
        # And the pixels inside do matter: the inverted images give the negative.
        inverted = resizer(to_rows(255 - images), boxes)
        torch.testing.assert_close(inverted, -expected, rtol=0, atol=0.03)


# ---------------------------------------------------------------- batches


def tiny_dataset(n=50, n_test=23):
    """Image k is filled with the number k, and its label is k: a batch tells whom it holds."""

    def split(n):
        labels = torch.arange(n)
        return labels.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 32, 32).contiguous(), labels

    return Dataset(*split(n), *split(n_test), [str(k) for k in range(n)])


def pictured(images):
    """The numbers that the images of `tiny_dataset` show."""
    return ((images[:, 0, 0, 0] + 1) * 127.5).round().long()


def batches_of(n=50, batch_size=8, seed=5, **kwargs):
    return TrainBatches(
        tiny_dataset(n), batch_size, augmentation(Resizer(16)), seed, "cpu", **kwargs
    )


@pytest.mark.parametrize(("n", "batch_size", "last"), [(50, 8, 2), (48, 8, 8), (50, 64, 50)])
def test_epochs_use_each_image_once(n, batch_size, last):
    """Truth: an epoch is a permutation of the training set, the short last batch included."""
    batches = batches_of(n, batch_size)
    per_epoch = -(-n // batch_size)
    orders = []
    for epoch in range(3):
        labels = []
        for i in range(epoch * per_epoch, (epoch + 1) * per_epoch):
            images, chosen = batches(i)
            assert torch.equal(pictured(images), chosen)
            assert torch.equal(batches.indices(i), chosen)
            labels.append(chosen)
        assert [len(x) for x in labels] == [batch_size] * (per_epoch - 1) + [last]
        orders.append(torch.cat(labels))
        assert torch.equal(orders[-1].sort().values, torch.arange(n))
    assert not torch.equal(orders[0], orders[1]) and not torch.equal(orders[1], orders[2])


def test_a_batch_depends_on_seed_and_number_alone():
    """Truth: the same batch from a fresh object, asked out of order, whatever torch's own seed."""
    dataset = tiny_dataset()
    dataset.train_images = random_images(50)  # so that the boxes show
    numbers = [0, 3, 6, 7, 13, 14, 40]

    def fresh(seed=5):
        return TrainBatches(dataset, 8, augmentation(Resizer(16)), seed, "cpu")

    batches = fresh()
    expected = {i: batches(i) for i in numbers}
    for i in (14, 0, 40, 6, 3, 13, 7, 0):
        for source in (batches, fresh()):
            torch.manual_seed(i)
            images, labels = source(i)
            assert torch.equal(images, expected[i][0]) and torch.equal(labels, expected[i][1])
    other_images, other_labels = fresh(6)(0)
    assert not torch.equal(other_labels, expected[0][1])
    # Boxes are drawn anew in each epoch, and belong to the image: compared image by image.
    boxes = []
    for epoch in (0, 1):
        batches(7 * epoch)
        boxes.append(batches.draws["box"])
    assert (boxes[0] == boxes[1]).all(dim=1).sum() < 10


def test_batches_are_the_images_crops():
    """Truth: torchvision's crop of each chosen image by its box."""
    dataset = tiny_dataset()
    dataset.train_images = random_images(50)
    batches = TrainBatches(dataset, 8, augmentation(Resizer(24)), 5, "cpu")
    images, labels = batches(9)
    for image, label, box in zip(images, labels, batches.draws["box"][labels].tolist()):
        expected = torchvisions(dataset.train_images[label], box, 24)
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("n", [48, 50, 51, 53])
def test_processes_share_each_batch(n):
    """Truth: one process with the same global batch; three hold its images between them.

    A rest that cannot give each of the three an image is left out, as documented.
    """
    ranks = [batches_of(n, 4, rank=rank, world_size=3) for rank in range(3)]
    alone = batches_of(n, 12)
    rest = n % 12
    assert {r.per_epoch for r in ranks} == {n // 12 + (rest >= 3)}
    epochs = []
    for i in range(2 * ranks[0].per_epoch):
        epoch, place = divmod(i, ranks[0].per_epoch)
        parts = [r(i)[1] for r in ranks]
        lengths = [len(part) for part in parts]
        assert min(lengths) > 0 and max(lengths) - min(lengths) <= 1
        epochs.append(torch.cat(parts))
        assert torch.equal(epochs[-1], alone(epoch * alone.per_epoch + place)[1])
        assert all(torch.equal(r.indices(i), epochs[-1]) for r in ranks)  # the label is the index
    first_epoch = torch.cat(epochs[: ranks[0].per_epoch])
    assert len(first_epoch.unique()) == len(first_epoch) == (n if rest >= 3 else n - rest)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("batch_size", [4, 23, 100])
def test_test_batches_hold_each_image_once(world_size, batch_size):
    """Truth: the test set, in order; batches are full but for each process's last."""
    dataset, seen = tiny_dataset(), []
    for rank in range(world_size):
        batches = TestBatches(dataset, batch_size, Resizer(16), "cpu", rank, world_size)
        for _ in range(2):  # every evaluation again
            share = list(batches)
        assert len(share) == len(batches)
        assert all(len(labels) == batch_size for _, labels in share[:-1])
        for images, labels in share:
            assert torch.equal(pictured(images), labels)
            seen.append(labels)
    assert torch.equal(torch.cat(seen), torch.arange(23))


# ---------------------------------------------------------------- datasets


def test_digits():
    """Truth: scikit-learn's own images, enlarged by repetition to 32x32 and 3 channels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    dataset = load_dataset("digits", "/nonexistent")  # needs no folder
    assert len(dataset.classes) == 10
    assert dataset.train_images.shape == (1437, 3, 32, 32) and len(dataset.train_labels) == 1437
    assert dataset.test_images.shape == (360, 3, 32, 32) and len(dataset.test_labels) == 360
    assert dataset.train_images.dtype == torch.uint8 and dataset.train_labels.dtype == torch.int64
    test = np.arange(1797) % 5 == 0
    for images, labels, chosen in (
        (dataset.train_images, dataset.train_labels, ~test),
        (dataset.test_images, dataset.test_labels, test),
    ):
        enlarged = np.kron(digits.images[chosen], np.ones((4, 4))) * (255 / 16)
        for channel in range(3):
            assert np.abs(images[:, channel].numpy() - enlarged).max() <= 0.5
        assert np.array_equal(labels.numpy(), digits.target[chosen])
    assert dataset.train_images.min() == 0 and dataset.train_images.max() == 255


CIFARS = [("cifar10", CIFAR10, "airplane", "truck"), ("cifar100", CIFAR100, "apple", "worm")]


@pytest.mark.parametrize(("name", "cifar", "first", "last"), CIFARS)
def test_cifar(name, cifar, first, last):
    """Truth: balanced classes; torchvision's own dataset; the means that papers normalize by."""
    needs_cifar10(cifar.base_folder)
    dataset = load_dataset(name, str(DATA))
    assert (dataset.classes[0], dataset.classes[-1]) == (first, last)
    count = len(dataset.classes)
    for train, n, images, labels in (
        (True, 50_000, dataset.train_images, dataset.train_labels),
        (False, 10_000, dataset.test_images, dataset.test_labels),
    ):
        assert images.shape == (n, 3, 32, 32)
        assert torch.equal(labels.bincount(), torch.full((count,), n // count))
        theirs = cifar(DATA, train=train)
        for i in (0, 1, 4321, n - 1):
            picture, label = theirs[i]
            assert np.array_equal(np.asarray(picture), images[i].permute(1, 2, 0).numpy())
            assert label == labels[i]
    if name == "cifar10":
        totals = dataset.train_images.sum(dim=(0, 2, 3), dtype=torch.int64)
        means = (totals / (50_000 * 32 * 32 * 255)).tolist()
        assert means == pytest.approx([0.4914, 0.4822, 0.4465], abs=1e-3)


def refused(name, folder, *words):
    """The documented error: one line that names the flag, with `words`."""
    with pytest.raises(UserError) as error:
        load_dataset(name, str(folder))
    message = str(error.value)
    assert "\n" not in message
    assert all(str(word) in message for word in ("--data_dir", *words)), message


@pytest.mark.parametrize(("name", "cifar"), [("cifar10", CIFAR10), ("cifar100", CIFAR100)])
def test_damaged_files(tmp_path, name, cifar):
    """Truth: the error names the folder, and nothing is downloaded."""
    folder = tmp_path / cifar.base_folder
    folder.mkdir()
    file, _ = cifar.train_list[0]
    refused(name, tmp_path, folder, "incomplete")  # an empty one
    # A file that reads well but is another:
    (folder / file).write_bytes(pickle.dumps({"data": np.zeros((1, 3072), "u1"), "labels": [0]}))
    refused(name, tmp_path, folder, "damaged")
    assert list(folder.iterdir()) == [folder / file]


def test_truncated_file(tmp_path):
    """Truth: of the real files, one cut in the middle."""
    needs_cifar10()
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    for file in (DATA / CIFAR10.base_folder).iterdir():
        (folder / file.name).symlink_to(file)
    victim = folder / "data_batch_3"
    content = victim.read_bytes()
    victim.unlink()
    victim.write_bytes(content[: len(content) // 2])
    refused("cifar10", tmp_path, folder, "damaged")


def test_data_dir_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    refused("cifar10", tmp_path / "file")
