"""Each block's signal against other ways to its numbers, and plot_signal.py as run."""

import copy
import io
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread
from programs import call, events, refused, run, scalars
from scipy.stats import entropy
from small import NORMS, batch, random_state, small_model

import plot_attn
import plot_signal
from models.configs import CONFIGS
from models.fast_cpu import accelerate
from models.modeling import VisionTransformer, build_model
from models.norms import MEASURING_STEPS, NORM_TYPES
from utils.args import parse_args
from utils.checkpoint import load_model, save_checkpoint
from utils.data_utils import load_dataset, resize
from utils.signal_stats import PART, _effective_rank, signal_stats
from utils.vis_utils import SIGNAL_LABELS, signal_figure

TOKENS = 5  # of the small model: 2x2 patches and the class token


def trained_model(norm_type, **kwargs):
    model = small_model(norm_type, **kwargs)
    model.load_state_dict(random_state(model))
    return model


@pytest.mark.parametrize("size", [6, PART + 9])  # in one pass and in two, the last a short one
@pytest.mark.parametrize("norm_type", NORMS)
def test_numbers_are_those_of_other_ways(norm_type, size):
    """Truth: hooks and autograd.grad on a double precision copy, SciPy's entropy, NumPy's SVD."""
    model, (images, labels) = trained_model(norm_type, dropout=0.3, vis=True), batch(size=size)
    stats = signal_stats(model, images, labels)
    # Without vis the last block would compute the class token alone.
    plain = signal_stats(trained_model(norm_type, dropout=0.3), images, labels)
    assert plain == stats

    model = model.double().eval()
    outputs = []
    blocks = model.transformer.encoder.layer
    for block in blocks:
        block.register_forward_hook(lambda block, inputs, x: outputs.append(x))
    logits, weights = model(images.double())
    loss = F.cross_entropy(logits, labels)
    assert outputs[-1].shape == (size, TOKENS, 24)
    for i, (block, x) in enumerate(zip(blocks, outputs)):
        assert stats["activation_rms"][i] == pytest.approx(x.pow(2).mean().item() ** 0.5, rel=1e-5)
        grads = torch.autograd.grad(loss, list(block.parameters()), retain_graph=True)
        norm = sum(grad.pow(2).sum().item() for grad in grads) ** 0.5
        assert stats["grad_norm"][i] == pytest.approx(norm, rel=1e-4)
        expected = entropy(weights[i].detach().numpy(), axis=-1).mean()
        assert stats["attention_entropy"][i] == pytest.approx(expected, rel=1e-5)
        s = [np.linalg.svd(y, compute_uv=False) for y in x[:32].detach().numpy()]
        expected = np.mean([np.exp(entropy(values)) for values in s])
        assert stats["effective_rank"][i] == pytest.approx(expected, rel=1e-5)


def test_effective_rank_in_closed_form():
    rng = np.random.default_rng(0)
    alike = torch.tensor(rng.normal(size=(3, 9, 1)) * rng.normal(size=(3, 1, 24)))
    assert _effective_rank(alike).item() == pytest.approx(1, abs=1e-6)
    rows = torch.tensor(np.linalg.qr(rng.normal(size=(24, 9)))[0].T.copy())  # orthonormal
    assert _effective_rank(7e5 * rows[None]).item() == pytest.approx(9, rel=1e-9)
    # Singular values 3 and 1: p = 3/4, 1/4, and exp of their entropy is 4 / 3^(3/4).
    two = torch.stack([3 * rows[0], rows[1]])
    assert _effective_rank(two[None]).item() == pytest.approx(4 / 3**0.75, rel=1e-9)
    mean = (9 + 4 / 3**0.75) / 2
    pair = torch.stack([rows, F.pad(two, (0, 0, 0, 7))])
    assert _effective_rank(pair).item() == pytest.approx(mean, rel=1e-9)


@pytest.mark.parametrize("norm_type", NORMS)
def test_uniform_attention_has_the_log_of_its_tokens(norm_type):
    model = trained_model(norm_type)
    for block in model.transformer.encoder.layer:
        torch.nn.init.zeros_(block.attn.query.weight)
        torch.nn.init.zeros_(block.attn.query.bias)
    found = signal_stats(model, *batch())["attention_entropy"]
    assert found == pytest.approx([math.log(TOKENS)] * 2, rel=1e-6)


def everything(model):
    """State dict, and what else a pass could change: plain attributes of every module."""
    attributes = {
        (name, key): value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, bool | int | float | None)
    }
    hooks = [
        len(vars(m)[kind])
        for m in model.modules()
        for kind in vars(m)
        if kind.endswith("_hooks") and vars(m)[kind] is not None
    ]
    return {k: v.clone() for k, v in model.state_dict().items()}, attributes, hooks


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_model_and_random_state_are_left_as_they_were(norm_type, training):
    """At the start too, where AddBias has still to measure; dropout would draw numbers."""
    model, (images, labels) = small_model(norm_type, dropout=0.5).train(training), batch()
    frozen = next(model.transformer.encoder.layer[0].parameters()).requires_grad_(False)
    (state, attributes, hooks), random = everything(model), torch.get_rng_state()
    with torch.no_grad():  # the gradients are taken all the same
        stats = signal_stats(model, images, labels)
    assert all(len(values) == 2 and np.isfinite(values).all() for values in stats.values())
    assert list(stats) == list(SIGNAL_LABELS)
    after, attributes_after, hooks_after = everything(model)
    assert attributes_after == attributes and hooks_after == hooks
    assert state.keys() == after.keys() and all(torch.equal(state[k], after[k]) for k in state)
    assert torch.equal(random, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters()) and not frozen.requires_grad
    frozen.requires_grad_(True)
    assert signal_stats(model, images, labels) == stats


def test_in_the_middle_of_a_training():
    """Gradients stay; vis's weights, half precision and what speeds up training do not disturb."""
    model, (images, labels) = trained_model("LN", vis=True).train(), batch()
    expected = signal_stats(model, images, labels)
    model(images, labels).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    weights = [block.attn.weights for block in model.transformer.encoder.layer]
    copies = [w.clone() for w in weights]
    model.transformer.encoder.grad_checkpointing = True
    with torch.autocast("cpu", torch.bfloat16):
        assert signal_stats(model, images, labels) == expected
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), grads))
    for block, kept, old in zip(model.transformer.encoder.layer, weights, copies):
        assert block.attn.weights is kept and torch.equal(kept, old)

    plain = trained_model("LN").to(torch.bfloat16)
    fast = copy.deepcopy(plain)
    accelerate(fast)
    images = images.to(torch.bfloat16)
    expected = signal_stats(plain.float(), images.float(), labels)
    for name, values in signal_stats(fast, images, labels).items():
        assert values == pytest.approx(expected[name], rel=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_what_is_not_finite_is_passed_through(value):
    """In the first of two blocks nothing is wrong, but for the gradients that reach it."""
    model = trained_model("Rescale")
    with torch.no_grad():
        model.transformer.encoder.layer[1].ffn.fc2.bias[0] = value
    stats = signal_stats(model, *batch())
    for name in ("activation_rms", "attention_entropy", "effective_rank"):
        assert math.isfinite(stats[name][0])
    if math.isfinite(value):  # its square is beyond fp32
        assert stats["activation_rms"][1] == pytest.approx(1e30 * (0.5 / 24) ** 0.5, rel=0.3)
    else:
        assert not math.isfinite(stats["activation_rms"][1])
        assert math.isnan(stats["effective_rank"][1]) and math.isnan(stats["grad_norm"][0])
    model.load_state_dict(random_state(model))
    with torch.no_grad():
        model.transformer.encoder.layer[0].attn.query.bias[0] = math.nan
    assert math.isnan(signal_stats(model, *batch())["attention_entropy"][0])


def test_log_signal_of_a_training(tmp_path):
    """Truth: the last step's checkpoint, on the first 128 test images; its figure of the first.

    An evaluation's batch has fewer images.
    """
    flags = "--name signal --dataset digits --model_type ViT-64x4_4 --img_size 8 --num_steps 3"
    flags += " --warmup_steps 1 --eval_every 2 --eval_batch_size 50 --log_signal"
    run(flags.split(), tmp_path)
    model, flags = load_model(next(tmp_path.glob("output/*_final.bin")))
    dataset = load_dataset("digits")
    images = resize(dataset.test_images[:128], flags.img_size)
    expected = signal_stats(model, images, dataset.test_labels[:128])
    folder = next(tmp_path.glob("logs/signal_*"))
    logged = scalars(folder)
    for name, values in expected.items():
        for block, value in enumerate(values, start=1):
            step, got = logged[f"signal/{name}/block_{block}"][-1]
            assert (step, got) == (3, pytest.approx(value, rel=1e-4)), f"{name} of block {block}"
    assert len([tag for tag in logged if tag.startswith("signal/")]) == 4 * 4

    model, _ = load_model(next(tmp_path.glob("output/*_final.bin")), vis=True)
    canvas = FigureCanvasAgg(plot_attn.attention_figure(model, images[:1], "test image 0"))
    canvas.draw()
    figures = events(folder).Images("attention")
    assert [figure.step for figure in figures] == [2, 3]
    drawn = 255 * imread(io.BytesIO(figures[-1].encoded_image_string))
    np.testing.assert_allclose(drawn, np.asarray(canvas.buffer_rgba())[..., :3], atol=3)


def test_a_run_with_held_out_images(tmp_path, drawn):
    """Truth: the numbers that the training wrote to TensorBoard, of held-out images both."""
    flags = "--name signal --dataset digits --model_type ViT-64x4_4 --img_size 8 --num_steps 1"
    run([*flags.split(), *"--warmup_steps 1 --val_split 200 --log_signal".split()], tmp_path)
    call(plot_signal.main, next(tmp_path.glob("output/*_final.bin")), "--out_dir", tmp_path)
    logged = scalars(next(tmp_path.glob("logs/signal_*")))
    for name, values in drawn[0][3].items():
        for block, value in enumerate(values, start=1):
            got = logged[f"signal/{name}/block_{block}"][-1][1]
            assert got == pytest.approx(value, rel=1e-4), f"{name} of block {block}"


def test_figure_holds_the_numbers_given():
    values = {name: [i + 1.0, i + 2.0, math.nan] for i, name in enumerate(SIGNAL_LABELS)}
    lines = [("start", "LN", False, values), ("end", "LN", True, values)]
    lines += [(f"type {i}", f"type {i}", True, values) for i in range(21)]
    figure = signal_figure(lines)
    assert [axes.get_ylabel() for axes in figure.axes] == list(SIGNAL_LABELS.values())
    for axes, name in zip(figure.axes, SIGNAL_LABELS):
        assert len(axes.lines) == len(lines)
        for line in axes.lines:
            np.testing.assert_array_equal(line.get_xydata().T, [[1, 2, 3], values[name]])
        start, end, other = axes.lines[:3]
        assert start.get_color() == end.get_color() != other.get_color()
        assert (start.get_linestyle(), end.get_linestyle()) == ("--", "-")
        looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in axes.lines}
        assert len(looks) == len(lines)
    assert [text.get_text() for text in figure.legends[0].texts] == [line[0] for line in lines]


# ---------------------------------------------------------------- plot_signal.py


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "run.bin"
    flags = {"model_type": "ViT-Ti_16", "norm_type": "Rescale", "img_size": 16, "dataset": "digits"}
    model = VisionTransformer(CONFIGS["ViT-Ti_16"], 16, "Rescale", num_classes=10)
    save_checkpoint({"model": model.state_dict(), "flags": flags | {"seed": 3}}, path)
    return path


def test_checkpoint_and_start_as_the_user_runs_it(tmp_path, checkpoint):
    args = [checkpoint, "--norm_type", "LN", "Rescale"]
    done = run(args, tmp_path, env={"DISPLAY": "", "MPLBACKEND": ""}, program="plot_signal.py")
    assert (done.stdout, done.stderr) == ("img/plot_signal/signal.png\n", "")
    figure = tmp_path / "img/plot_signal/signal.png"
    assert [figure] == list(figure.parent.iterdir())
    assert len(np.unique(imread(figure)[..., :3].reshape(-1, 3), axis=0)) > 50


@pytest.fixture
def drawn(monkeypatch):
    """The lines that plot_signal.py draws, in place of the figure's."""
    drawn = []

    def draw(lines):
        drawn.extend(lines)
        return signal_figure(lines)

    monkeypatch.setattr(plot_signal, "signal_figure", draw)
    return drawn


def test_which_lines_are_drawn(tmp_path, checkpoint, drawn):
    """Alike checkpoints are told apart by their files; a start is the first one's, of its seed."""
    again = tmp_path / "again.bin"
    again.write_bytes(checkpoint.read_bytes())
    args = [checkpoint, again, "--norm_type", "LN", "Rescale", "--out_dir", tmp_path]
    done = call(plot_signal.main, *args)
    assert (done.stdout, done.stderr) == (f"{tmp_path / 'signal.png'}\n", "")
    assert [line[:3] for line in drawn] == [
        ("ViT-Ti_16 LN, at the start", "LN", False),
        ("ViT-Ti_16 Rescale, at the start", "Rescale", False),
        ("run", "Rescale", True),
        ("again", "Rescale", True),
    ]
    assert drawn[2][3] == drawn[3][3] != drawn[1][3]

    digits = plot_signal.load_dataset("digits")
    images = plot_signal.resize(digits.test_images[:128], 16)
    torch.manual_seed(3)
    model = VisionTransformer(CONFIGS["ViT-Ti_16"], 16, "LN", num_classes=10)
    assert drawn[0][3] == signal_stats(model, images, digits.test_labels[:128])


def test_checkpoint_of_another_recipes_model(tmp_path, drawn):
    flags = "--name x --dataset digits --model_type ViT-Ti_16 --img_size 32 --qk_norm rms"
    flags = parse_args(f"{flags} --set pool=mean positions=sincos".split())
    model = build_model(flags, 10)
    save_checkpoint({"model": model.state_dict(), "flags": vars(flags)}, tmp_path / "run.bin")
    done = call(plot_signal.main, tmp_path / "run.bin", "--out_dir", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    digits = plot_signal.load_dataset("digits")
    images = plot_signal.resize(digits.test_images[:128], 32)
    assert drawn[0][3] == signal_stats(model, images, digits.test_labels[:128])


def test_all_norm_types_at_their_start(tmp_path, drawn, monkeypatch):
    monkeypatch.setattr(plot_signal, "NORM_TYPES", {name: NORM_TYPES[name] for name in NORMS})
    args = "--model_type ViT-Ti_16 --img_size 16 --dataset digits --out_dir".split()
    done = call(plot_signal.main, *args, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line[1] for line in drawn] == list(NORMS)
    assert all(np.isfinite(list(line[3].values())).all() for line in drawn)


def test_norm_layers_that_measure_have_measured():
    """Truth: the mean of the patches and the class token of the first 8 x 128 training images."""
    digits = plot_signal.load_dataset("digits")
    args = "--name x --model_type ViT-Ti_16 --norm_type Rescale --img_size 16 --dataset digits"
    model = plot_signal.model_at_start(parse_args(args.split()), digits)
    layer = model.transformer.encoder.layer[0].addbias
    assert layer.count == layer.calls == MEASURING_STEPS
    patches = model.transformer.embeddings.patch_embeddings
    with torch.no_grad():
        x = patches(plot_signal.resize(digits.train_images[:1024], 16)).flatten(2)  # (n, D, 1)
    mean = x.mean(dim=(0, 2)) / 2  # of that token and the class token, which is zero
    torch.testing.assert_close(layer.init_mean.flatten(), mean, atol=0.03, rtol=0)  # dropout
    assert mean.abs().max() > 0.3


def test_a_batch_norms_statistics_are_those_of_its_first_batches():
    """Truth: the mean of the patches of the first 8 x 128 training images, and their variance."""
    digits = plot_signal.load_dataset("digits")
    args = "--name x --norm_type BN --dataset digits --recipe small --set pool=mean"
    model = plot_signal.model_at_start(parse_args(args.split()), digits)
    embeddings = model.transformer.embeddings
    norm = model.transformer.encoder.layer[0].attention_norm.layer
    with torch.no_grad():
        x = embeddings.eval()(plot_signal.resize(digits.train_images[:1024], 32)).double()
    torch.testing.assert_close(norm.running_mean.double(), x.mean((0, 1)), atol=5e-4, rtol=0)
    variances = torch.stack([part.flatten(0, 1).var(0) for part in x.split(128)])
    torch.testing.assert_close(norm.running_var.double(), variances.mean(0), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["none.bin"], ["none.bin", "no such file"]),
        (["--norm_type", "LN", "XN"], ["--norm_type XN", "Rescale"]),
        (["--model_type", "ViT-X_1"], ["--model_type ViT-X_1"]),
        (["--dataset", "mnist"], ["--dataset mnist"]),
        (["--img_size", "30"], ["--img_size 30", "4 pixels"]),
        (["--img_size", "0"], ["--img_size 0"]),
    ],
)
def test_mistakes(tmp_path, args, words):
    done = call(plot_signal.main, *args, "--out_dir", tmp_path / "img")
    refused(done, *words, program="plot_signal.py")
    assert done.stderr.count("\n") == 1 and not (tmp_path / "img").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (None, ["flags"]),
        ({"norm_type": "XN"}, ["norm_type XN"]),
        ({"img_size": None}, ["img_size None"]),
        ({"model_type": "ViT-S_16"}, ["do not fit"]),
    ],
)
def test_mistakes_in_checkpoints(tmp_path, checkpoint, flags, words):
    content = torch.load(checkpoint)
    content = content["model"] if flags is None else content | {"flags": content["flags"] | flags}
    torch.save(content, tmp_path / "bad.bin")
    done = call(plot_signal.main, tmp_path / "bad.bin", "--out_dir", tmp_path / "img")
    refused(done, "bad.bin", *words, program="plot_signal.py")
    assert done.stderr.count("\n") == 1 and not (tmp_path / "img").exists()
