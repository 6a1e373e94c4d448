"""Attention rollout against other ways to it, figures against their data, programs as run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread

import plot_acc_loss
from models.modeling import CONFIGS, VisionTransformer
from plot_attn import plot_attention
from utils.checkpoint import save_checkpoint
from utils.run_logger import RunLogger
from utils.vis_utils import (
    attention_rollout,
    class_token_figure,
    comparison_figure,
    loss_accuracy_figure,
)

ROOT = Path(__file__).parent.parent


def softmax_rows(rng, *shape):
    weights = np.exp(rng.normal(size=shape))
    return weights / weights.sum(axis=-1, keepdims=True)


def test_rollout_of_two_blocks_by_hand():
    # Means over the heads: [[.6, .4], [.2, .8]] and [[.5, .5], [0, 1]]; mixed with the identity:
    # [[.8, .2], [.1, .9]] and [[.75, .25], [0, 1]]. Class token: .75 * .2 + .25 * .9 = .375.
    first = np.array([[[0.9, 0.1], [0.4, 0.6]], [[0.3, 0.7], [0.0, 1.0]]])
    second = np.array([[[0.5, 0.5], [0.0, 1.0]]])
    np.testing.assert_allclose(attention_rollout([first, second]), [0.375])


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
    figure = class_token_figure(image, {"block 0": patches}, "cat")
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
    loss_axes, accuracy_axes = loss_accuracy_figure(steps, loss, accuracy, "LN").axes
    np.testing.assert_array_equal(loss_axes.lines[0].get_xydata().T, [steps, loss])
    np.testing.assert_array_equal(accuracy_axes.lines[0].get_xydata().T, [steps, [25, 50, 75]])
    assert "%" in accuracy_axes.get_ylabel()

    many = [(f"run {i}", steps, [i, i, i], [0.01 * i] * 3) for i in range(12)]
    figure = comparison_figure(many)
    accuracy_axes, loss_axes = figure.axes
    assert [line.get_ydata()[0] for line in loss_axes.lines] == list(range(12))
    np.testing.assert_allclose([line.get_ydata()[0] for line in accuracy_axes.lines], range(12))
    assert [text.get_text() for text in figure.legends[0].texts] == [run[0] for run in many]
    assert len({tuple(line.get_color()) for line in loss_axes.lines}) == 12


class Stub(torch.nn.Module):
    """Stands for a model of 5 blocks, 2 heads and 3x3 patches; refuses to run in training mode."""

    def forward(self, x):
        assert not self.training and not torch.is_grad_enabled()
        rng = np.random.default_rng(1)
        return None, [torch.tensor(softmax_rows(rng, len(x), 2, 10, 10)) for _ in range(5)]


def test_plot_attention_draws_the_blocks_there_are(tmp_path):
    model, image = Stub().train(), torch.rand(1, 3, 24, 24) * 2 - 1
    paths = plot_attention(model, image, "BN", (0, 3, 6, 9), tmp_path / "a")
    assert [path.name for path in paths] == ["BN_layer_0.png", "BN_layer_3.png", "BN_attention.png"]
    assert all(is_drawn(path) for path in paths)
    assert not np.array_equal(imread(paths[0]), imread(paths[1]))
    assert model.training
    with pytest.raises(ValueError, match="blocks 0 to 4"):
        plot_attention(model, image, "BN", (5, -1), tmp_path / "b")
    assert not (tmp_path / "b").exists()


def is_drawn(path) -> bool:
    """Whether the image has more in it than its background."""
    return len(np.unique(imread(path)[..., :3].reshape(-1, 3), axis=0)) > 50


def run(script, *arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DISPLAY": "", "MPLBACKEND": ""}
    command = [sys.executable, script, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


def assert_one_clear_line(outcome, *words):
    assert outcome.returncode == 2, outcome.stderr
    assert outcome.stderr.count("\n") == 1 and outcome.stderr.startswith("plot_")
    for word in words:
        assert str(word) in outcome.stderr


@pytest.fixture
def write_log(tmp_path):
    def write(norm_type, accuracy):
        logger = RunLogger(tmp_path / f"{norm_type}.txt", tmp_path / "logs")
        logger.warning("Process rank: -1")
        logger.info(
            f"Training parameters Namespace(dataset='digits', fp16=False, img_size=32, "
            f"model_type='ViT-Ti_16', norm_type='{norm_type}', pretrained_dir=None)"
        )
        for i, value in enumerate(accuracy):
            logger.log_evaluation(100 * (i + 1), 1 - value, value)
        return logger.log_file

    return write


def test_plot_acc_loss_of_one_log(tmp_path, write_log):
    outcome = run("plot_acc_loss.py", write_log("LN", [0.1, 0.5]), "--out_dir", tmp_path / "img")
    figure = tmp_path / "img" / "LN_loss_acc.png"
    assert (outcome.returncode, outcome.stdout, outcome.stderr) == (0, f"{figure}\n", "")
    assert is_drawn(figure) and [figure] == list((tmp_path / "img").iterdir())


def test_plot_acc_loss_of_several_logs(tmp_path, write_log):
    logs = [write_log("LN", [0.1, 0.5]), write_log("BN", [0.2, 0.6]), write_log("GN", [])]
    outcome = run("plot_acc_loss.py", *logs, "--out_dir", tmp_path / "img")
    figure = tmp_path / "img" / "comparison.png"
    assert (outcome.returncode, outcome.stdout) == (0, f"{figure}\n")
    assert outcome.stderr.count("\n") == 1 and str(logs[2]) in outcome.stderr
    assert is_drawn(figure)


def test_runs_alike_are_told_apart_by_their_files(tmp_path, write_log, monkeypatch):
    log = write_log("LN", [0.1])
    logs = [log, shutil.copy(log, tmp_path / "again.txt"), write_log("BN", [0.2])]
    drawn = []
    monkeypatch.setattr(plot_acc_loss, "comparison_figure", drawn.extend)
    monkeypatch.setattr(plot_acc_loss, "save_figure", lambda figure, path: path)
    plot_acc_loss.plot_comparison(logs)
    assert [curve[0] for curve in drawn] == ["LN", "again", "digits ViT-Ti_16 BN"]


def test_plot_acc_loss_errors(tmp_path, write_log):
    good, empty = write_log("LN", [0.1]), write_log("GN", [])
    (tmp_path / "notes.txt").write_text("no log")
    out = ("--out_dir", tmp_path / "img")
    assert_one_clear_line(run("plot_acc_loss.py", empty, *out), empty, "no evaluation")
    for bad in ("missing.txt", "notes.txt"):
        assert_one_clear_line(run("plot_acc_loss.py", tmp_path / bad, *out), bad)
        assert_one_clear_line(run("plot_acc_loss.py", good, tmp_path / bad, *out), bad)
    outcome = run("plot_acc_loss.py", empty, empty, *out)
    assert outcome.returncode == 2 and "Traceback" not in outcome.stderr
    assert_one_clear_line(run("plot_acc_loss.py", good, "--out_dir", good / "img"), good)
    assert not (tmp_path / "img").exists()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    flags = {"model_type": "ViT-Ti_16", "norm_type": "Rescale", "img_size": 32, "dataset": "digits"}
    model = VisionTransformer(CONFIGS["ViT-Ti_16"], 32, "Rescale", num_classes=10)
    path = tmp_path_factory.mktemp("checkpoint") / "run.bin"
    save_checkpoint({"model": model.state_dict(), "flags": flags}, path)
    return path


def test_plot_attn_of_a_checkpoint(tmp_path, checkpoint):
    outcome = run("plot_attn.py", checkpoint, "--image", 7, "--out_dir", tmp_path / "img")
    assert outcome.returncode == 0 and outcome.stderr == ""
    names = [f"Rescale_layer_{i}.png" for i in (0, 3, 6, 9)] + ["Rescale_attention.png"]
    paths = [tmp_path / "img" / name for name in names]
    assert outcome.stdout.splitlines() == [str(path) for path in paths]
    assert all(is_drawn(path) for path in paths)


def test_plot_attn_errors(tmp_path, checkpoint):
    out = ("--out_dir", tmp_path / "img")
    assert_one_clear_line(run("plot_attn.py", tmp_path / "none.bin", *out), "none.bin")
    assert_one_clear_line(run("plot_attn.py", checkpoint, "--image", 9999, *out), "--image 9999")
    assert_one_clear_line(run("plot_attn.py", checkpoint, "--layers", 12, *out), "blocks 0 to 11")
    bare = tmp_path / "bare.bin"
    torch.save({"head.weight": torch.zeros(10, 192)}, bare)
    assert_one_clear_line(run("plot_attn.py", bare, *out), bare, "flags")
    assert not (tmp_path / "img").exists()
