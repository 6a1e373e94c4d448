"""Attention rollout against other ways to it, figures against their data, programs as run."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread
from PIL import Image
from programs import call, refused, run, write_log

import plot_acc_loss
import plot_attn
from models.configs import CONFIGS
from models.modeling import VisionTransformer
from utils.attention_figures import attention_rollout, patches_figure
from utils.checkpoint import save_checkpoint
from utils.errors import UserError
from utils.vis_utils import comparison_figure, loss_accuracy_figure


def softmax_rows(rng, *shape):
    weights = np.exp(rng.normal(size=shape))
    return weights / weights.sum(axis=-1, keepdims=True)


def test_rollout_of_two_blocks_by_hand():
    # Means over the heads: [[.6, .4], [.2, .8]] and [[.5, .5], [0, 1]]; mixed with the identity:
    # [[.8, .2], [.1, .9]] and [[.75, .25], [0, 1]]. Class token: .75 * .2 + .25 * .9 = .375.
    first = np.array([[[0.9, 0.1], [0.4, 0.6]], [[0.3, 0.7], [0.0, 1.0]]])
    second = np.array([[[0.5, 0.5], [0.0, 1.0]]])
    np.testing.assert_allclose(attention_rollout([first, second]), [0.375])
    # Without a class token, the columns' means of the product [[.625, .375], [.1, .9]].
    both = attention_rollout([first, second], class_token=False)
    np.testing.assert_allclose(both, [0.3625, 0.6375])


def test_rollout_is_the_sum_over_paths():
    """Each path of tokens through the blocks adds the product of its weights."""
    rng = np.random.default_rng(0)
    weights = [softmax_rows(rng, 2, 4, 4) for _ in range(3)]
    weights[1] = weights[1] * rng.uniform(0.5, 2, size=(1, 4, 1))
    step = []
    for block in weights:
        matrix = [[0.0] * 4 for _ in range(4)]
        for i in range(4):
            for j in range(4):
                matrix[i][j] = (block[0][i][j] + block[1][i][j]) / 4 + (0.5 if i == j else 0.0)
        step.append([[value / sum(row) for value in row] for row in matrix])
    expected = [
        sum(step[2][0][b] * step[1][b][a] * step[0][a][patch] for a in range(4) for b in range(4))
        for patch in (1, 2, 3)
    ]
    np.testing.assert_allclose(attention_rollout(weights), expected, rtol=1e-12)


def test_heat_lies_over_the_patch_attended_to():
    patches = np.zeros(16)
    patches[1 * 4 + 3] = 1  # second row, last column
    image = np.zeros((32, 32, 3))
    image[16:24, :8] = 1  # third row, first column
    figure = patches_figure(image, {"block 0": patches}, "cat")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[::-1, :, :3].mean(axis=-1)  # rows from the bottom up
    box = figure.axes[1].get_window_extent()

    def brightness(row, column):
        x = round(box.x0 + (column + 0.5) * box.width / 4)
        y = round(box.y1 - (row + 0.5) * box.height / 4)
        return pixels[y, x]

    grid = np.array([[brightness(row, column) for column in range(4)] for row in range(4)])
    brightest = np.argsort(grid, axis=None)[::-1]
    assert brightest[0] == 1 * 4 + 3 and brightest[1] == 2 * 4 + 0
    assert grid.flat[brightest[1]] > 1.2 * grid.flat[brightest[2]]


def test_training_curves_hold_the_numbers_given():
    steps, loss, accuracy = [100, 200, 300], [2.0, float("nan"), 1.0], [0.25, 0.5, 0.75]
    loss_axes, accuracy_axes = loss_accuracy_figure(steps, loss, accuracy, "LN", 10).axes
    np.testing.assert_array_equal(loss_axes.lines[0].get_xydata().T, [steps, loss])
    np.testing.assert_array_equal(accuracy_axes.lines[0].get_xydata().T, [steps, [25, 50, 75]])
    assert "%" in accuracy_axes.get_ylabel() and accuracy_axes.get_ylim() == (0, 100)
    none = [float("nan")] * 3
    highest = 2.302585 * 1.1
    for loss, top in (([2.0, 1.0, float("inf")], highest), ([2.0, 3.0, 1.0], 3.3), (none, highest)):
        loss_axes, _ = loss_accuracy_figure(steps, loss, accuracy, "LN", 10).axes
        assert loss_axes.get_ylim() == pytest.approx((0, top))

    many = [(f"run {i}", steps, [i, i, i], [0.01 * i] * 3) for i in range(12)]
    figure = comparison_figure(many)
    accuracy_axes, loss_axes = figure.axes
    assert [line.get_ydata()[0] for line in loss_axes.lines] == list(range(12))
    np.testing.assert_allclose([line.get_ydata()[0] for line in accuracy_axes.lines], range(12))
    assert [text.get_text() for text in figure.legends[0].texts] == [run[0] for run in many]
    assert len({tuple(line.get_color()) for line in loss_axes.lines}) == 12


def test_our_points_on_the_reference_s_curves(tmp_path, monkeypatch):
    """Points where our logs have evaluations, curves up to five times the last step of ours."""
    evaluations = [(100, 2.5, 0.1), (200, 2.0, 0.2), (1000, 1.5, 0.5), (1100, 1.0, 0.6)]
    ours = write_log(tmp_path / "ours.txt", "LN", evaluations[:2])
    theirs = [write_log(tmp_path / f"{n}.txt", n, evaluations) for n in ("BN", "LN")]
    words = [ours, "--reference", *theirs, "--out_dir", tmp_path]
    figures = []
    monkeypatch.setattr(plot_acc_loss, "save_figure", lambda f, p: figures.append(f) or p)
    done = call(plot_acc_loss.main, *words)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/reference.png\n")
    accuracy, loss = figures[0].axes
    bn, ln, points = accuracy.lines
    np.testing.assert_allclose(bn.get_xydata(), [(100, 10), (200, 20), (1000, 50)])
    np.testing.assert_allclose(points.get_xydata(), [(100, 10), (200, 20)])
    np.testing.assert_allclose(loss.lines[1].get_ydata(), [2.5, 2.0, 1.5])
    assert ln.get_color() == points.get_color() != bn.get_color()
    assert (points.get_linestyle(), points.get_marker()) == ("None", "o")


class Stub(torch.nn.Module):
    """Stands for a model of 5 blocks, 2 heads and 3x3 patches; refuses to run in training mode."""

    def __init__(self, class_token):
        super().__init__()
        self.tokens = 9 + class_token
        self.transformer = SimpleNamespace(embeddings=SimpleNamespace(has_class_token=class_token))

    def forward(self, x):
        assert not self.training and not torch.is_grad_enabled()
        rng, shape = np.random.default_rng(1), (len(x), 2, self.tokens, self.tokens)
        return None, [torch.tensor(softmax_rows(rng, *shape)) for _ in range(5)]


def is_drawn(path) -> bool:
    """Whether the image has more in it than its background."""
    return len(np.unique(imread(path)[..., :3] @ [1, 256, 256**2])) > 50  # a number per color


@pytest.mark.parametrize("class_token", [True, False])
def test_plot_attention_draws_the_blocks_there_are(tmp_path, class_token):
    model, image = Stub(class_token).train(), torch.rand(1, 3, 24, 24) * 2 - 1
    paths = plot_attn.plot_attention(model, image, "BN", (0, 3, 6, 9), tmp_path / "a")
    assert [path.name for path in paths] == ["BN_layer_0.png", "BN_layer_3.png", "BN_attention.png"]
    assert all(is_drawn(path) for path in paths)
    assert not np.array_equal(imread(paths[0]), imread(paths[1]))
    assert model.training
    figure = plot_attn.attention_figure(model, image)
    grids = [axes.images[1].get_array() for axes in figure.axes[1:]]
    assert [grid.shape for grid in grids] == [(3, 3)] * 3
    with torch.no_grad():
        means = [a[0].mean(0) for a in model.eval()(image)[1]]
    expected = means[3][0, 1:] if class_token else means[3].mean(0)
    np.testing.assert_allclose(grids[1].flatten(), expected, rtol=1e-6)
    with pytest.raises(UserError, match="blocks 0 to 4"):
        plot_attn.plot_attention(model, image, "BN", (5, -1), tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_plot_acc_loss_of_one_log(tmp_path):
    """As its user runs it, without a display."""
    log = write_log(tmp_path / "log.txt", "LN", [(100, 0.9, 0.1), (200, 0.5, 0.5)])
    done = run([log], tmp_path, env={"DISPLAY": "", "MPLBACKEND": ""}, program="plot_acc_loss.py")
    assert (done.stdout, done.stderr) == ("img/plot_acc_loss/LN_loss_acc.png\n", "")
    figure = tmp_path / "img/plot_acc_loss/LN_loss_acc.png"
    assert is_drawn(figure) and [figure] == list(figure.parent.iterdir())


def test_figures_of_pretrained_runs_have_names_of_their_own(tmp_path):
    """Beside those of the same norm type from scratch."""
    log = write_log(tmp_path / "log.txt", "LN", [(100, 0.9, 0.1)])
    log.write_text(log.read_text().replace("pretrained_dir=None", "pretrained_dir='auto'"))
    done = call(plot_acc_loss.main, log, "--out_dir", tmp_path)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/LN_pretrained_loss_acc.png\n")


def test_plot_acc_loss_of_several_logs(tmp_path, monkeypatch):
    """A log without an evaluation is left out; runs alike are told apart by their files."""
    log = write_log(tmp_path / "LN.txt", "LN", [(100, 0.9, 0.1)])
    logs = [log, shutil.copy(log, tmp_path / "again.txt")]
    logs += [write_log(tmp_path / "BN.txt", "BN", [(100, 0.8, 0.2)])]
    empty = write_log(tmp_path / "GN.txt", "GN")
    drawn = []

    def draw(curves):
        drawn.extend(curves)
        return comparison_figure(curves)

    monkeypatch.setattr(plot_acc_loss, "comparison_figure", draw)
    done = call(plot_acc_loss.main, *logs, empty, "--out_dir", tmp_path / "img")
    figure = tmp_path / "img" / "comparison.png"
    assert (done.returncode, done.stdout) == (0, f"{figure}\n")
    assert done.stderr.count("\n") == 1 and str(empty) in done.stderr
    assert [curve[0] for curve in drawn] == ["LN", "again", "digits ViT-Ti_16 BN"]
    assert is_drawn(figure)


def test_plot_acc_loss_errors(tmp_path):
    good = write_log(tmp_path / "LN.txt", "LN", [(100, 0.9, 0.1)])
    empty = write_log(tmp_path / "GN.txt", "GN")
    (tmp_path / "notes.txt").write_text("no log")

    def fails(*args, out=tmp_path / "img"):
        done = call(plot_acc_loss.main, *args, "--out_dir", out)
        return refused(done, program="plot_acc_loss.py")

    assert f"{empty} holds no evaluation" in fails(empty)
    assert "no log holds an evaluation" in fails(empty, empty)
    for bad in (tmp_path / "missing.txt", tmp_path / "notes.txt"):
        assert str(bad) in fails(bad) and str(bad) in fails(good, bad)
    assert str(good) in fails(good, out=good / "img")
    assert not (tmp_path / "img").exists()


@pytest.fixture(scope="module")
def checkpoint():
    flags = {"model_type": "ViT-Ti_16", "norm_type": "Rescale", "img_size": 32, "dataset": "digits"}
    model = VisionTransformer(CONFIGS["ViT-Ti_16"], 32, "Rescale", num_classes=10)
    return {"model": model.state_dict(), "flags": flags}


def test_plot_attn_of_a_checkpoint(tmp_path, checkpoint):
    save_checkpoint(checkpoint, tmp_path / "run.bin")
    args = ("--image", 7, "--out_dir", tmp_path / "img")
    done = call(plot_attn.main, tmp_path / "run.bin", *args)
    assert (done.returncode, done.stderr) == (0, "")
    names = [f"Rescale_layer_{i}.png" for i in (0, 3, 6, 9)] + ["Rescale_attention.png"]
    paths = [tmp_path / "img" / name for name in names]
    assert done.stdout.splitlines() == [str(path) for path in paths]
    assert all(is_drawn(path) for path in paths)


@pytest.mark.parametrize(
    ("args", "flags", "words"),
    [
        (["--image", 9999], {}, ["--image 9999"]),
        (["--layers", 12], {}, ["blocks 0 to 11"]),
        ([], {"model_type": "ViT-X_1"}, ["run.bin", "model_type ViT-X_1"]),
        ([], {"norm_type": "XN"}, ["run.bin", "norm_type XN"]),
        ([], {"dataset": "mnist"}, ["run.bin", "dataset mnist"]),
        ([], {"model_type": "ViT-S_16"}, ["run.bin", "do not fit"]),
        ([], None, ["run.bin", "flags"]),
    ],
)
def test_plot_attn_errors(tmp_path, checkpoint, args, flags, words):
    content = checkpoint["model"]  # as the reference writes it
    if flags is not None:
        content = checkpoint | {"flags": checkpoint["flags"] | flags}
    torch.save(content, tmp_path / "run.bin")
    done = call(plot_attn.main, tmp_path / "run.bin", *args, "--out_dir", tmp_path / "img")
    refused(done, *words, program="plot_attn.py")
    assert not (tmp_path / "img").exists()


def test_plot_attn_of_a_missing_file(tmp_path):
    done = call(plot_attn.main, tmp_path / "none.bin")
    refused(done, tmp_path / "none.bin", "no such file", program="plot_attn.py")


def test_figures_below_the_curves(tmp_path):
    """Truth: the pixels: each picture is there as wide as the whole, in its own proportions."""
    logs = [write_log(tmp_path / f"{n}.txt", n, [(1, 0.9, 0.1), (2, 0.8, 0.2)]) for n in ("A", "B")]
    for name, color in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        Image.new("RGB", (400, 100), color).save(tmp_path / f"{name}.png")
    below = [tmp_path / "red.png", tmp_path / "blue.png"]
    done = call(plot_acc_loss.main, *logs, "--out_dir", tmp_path, "--above", *below)
    names = [tmp_path / "comparison.png", tmp_path / "overview.png"]
    assert done.stdout.splitlines() == [str(name) for name in names]
    curves, whole = (Image.open(name).convert("RGB") for name in names)
    top = whole.width * curves.height / curves.width
    assert abs(whole.height - top - whole.width / 2) <= 2
    for share, color in ((0.125, (255, 0, 0)), (0.375, (0, 0, 255))):
        for x in (0.02, 0.5, 0.98):
            assert whole.getpixel((int(x * whole.width), int(top + share * whole.width))) == color
    done = call(plot_acc_loss.main, *logs, "--out_dir", tmp_path, "--above", logs[0])
    refused(done, logs[0], "no picture", program="plot_acc_loss.py")
