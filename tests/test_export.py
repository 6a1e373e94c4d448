"""Exported files against timm's own model and ONNX Runtime, predictions against evaluation's."""

import json
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image
from programs import DATA, ROOT, Bomb, call, needs_cifar10, refused, run
from safetensors import safe_open
from safetensors.torch import load_file
from small import random_state

import export
import predict
from models.configs import CONFIGS, vit_config
from models.modeling import build_model
from models.norms import NORM_TYPES
from models.pretrained import load_pretrained
from models.timm_layout import TIMM_NAMES
from recipes import reference
from utils.checkpoint import save_checkpoint
from utils.data_utils import CLASSES, SIDE, load_dataset, resize

FOLDING = {
    *("LN", "RMS", "BN", "RepBN", "LNS", "LayerScale"),
    *("ReZero", "SkipInit", "Rescale", "RescaleNet", "TFixup", "SigmaReparam"),
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(CONFIGS, "ViT-64x4_4", vit_config(4, 24, 2, 3, 40))
    monkeypatch.setitem(CONFIGS, "ViT-B_32", vit_config(32, 768, 2, 12, 3072))


def trained(folder, norm_type="LN", model_type="ViT-64x4_4", **entries):
    """A checkpoint in `folder` with weights unlike those of any start, and its model."""
    flags = {"model_type": model_type, "img_size": 16, "dataset": "digits"} | entries
    flags |= {"norm_type": norm_type}
    args = type("Flags", (), {"qk_norm": "none", **reference().to_dict(), **flags})
    torch.manual_seed(0)
    model = build_model(args, len(CLASSES[args.dataset]))
    model.load_state_dict(random_state(model))
    path = folder / "run.bin"
    save_checkpoint({"model": model.state_dict(), "flags": flags}, path)
    return path, model.eval()


def pictures(n, side=16):
    generator = torch.Generator().manual_seed(n)
    return torch.rand(n, 3, side, side, generator=generator) * 2 - 1


@torch.no_grad()
def assert_equal_logits(found, model, images):
    expected = model(images)[0]
    assert expected.std(0).mean() > 1e-4  # the logits depend on the images
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def timm_model(file):
    """timm's model as the file's metadata names it, with the file's weights."""
    timm = pytest.importorskip("timm")
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    model = eval(metadata["model"], {"timm": timm, "json": json, "torch": torch}, vars())
    model.load_state_dict(load_file(file))  # strictly: no array too many, none missing
    return model.eval()


# ---------------------------------------------------------------- safetensors


@pytest.mark.parametrize("entries", [{}, {"pool": "mean", "positions": "sincos"}], ids=["", "mean"])
@pytest.mark.parametrize("norm_type", sorted(FOLDING))
@torch.no_grad()
def test_timm(tmp_path, norm_type, entries):
    """Truth: timm's forward pass."""
    checkpoint, model = trained(tmp_path, norm_type, **entries)
    done = call(export.main, checkpoint)
    assert (done.returncode, done.stderr) == (0, "")
    file = tmp_path / "run.safetensors"
    assert done.stdout.splitlines()[0] == str(file)
    assert_equal_logits(timm_model(file)(pictures(5)), model, pictures(5))


@pytest.mark.parametrize(("norm_type", "qk_norm"), [("LN", "ln"), ("RMS", "rms")])
@torch.no_grad()
def test_timm_with_qk_norm(tmp_path, norm_type, qk_norm):
    checkpoint, model = trained(tmp_path, norm_type, qk_norm=qk_norm)
    assert call(export.main, checkpoint).returncode == 0
    assert_equal_logits(timm_model(tmp_path / "run.safetensors")(pictures(5)), model, pictures(5))


@pytest.mark.parametrize(
    ("exported", "target", "same"),
    [
        ("LN", "LN", True),
        ("LayerScale", "LN", True),
        ("LayerScale", "LayerScale", True),
        ("RMS", "RMS", True),
        ("RMS", "LN", False),
        ("BN", "LN", False),
    ],
)
@torch.no_grad()
def test_an_export_as_pretrained_weights(tmp_path, exported, target, same):
    """Truth: the same logits where the log has no line on another norm type; else other ones."""
    checkpoint, model = trained(tmp_path, exported)
    assert call(export.main, checkpoint).returncode == 0
    _, ours = trained(tmp_path, target)
    lines = load_pretrained(ours, tmp_path / "run.safetensors")
    assert any("computes something different" in line for line in lines) != same
    assert torch.allclose(ours(pictures(5))[0], model(pictures(5))[0], atol=1e-4) == same


@torch.no_grad()
def test_timm_by_its_model_name(tmp_path):
    """The command in docs/export.md, but for two blocks. Of 768 channels, as in ViT-B_32."""
    timm = pytest.importorskip("timm")
    checkpoint, model = trained(tmp_path, model_type="ViT-B_32", dataset="cifar10", img_size=224)
    file = tmp_path / "new.safetensors"
    assert call(export.main, checkpoint, "--output", file).returncode == 0
    theirs = timm.create_model(
        "vit_base_patch32_224", num_classes=10, depth=2, checkpoint_path=file
    )
    assert_equal_logits(theirs.eval()(pictures(2, 224)), model, pictures(2, 224))


def test_the_table_of_names(tmp_path):
    """Truth: both models' own names, each of which has its place."""
    timm = pytest.importorskip("timm")
    _, model = trained(tmp_path, qk_norm="ln")
    arguments = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "num_heads": 3}
    theirs = timm.models.VisionTransformer(**arguments, depth=2, qk_norm=True)

    def places(model, block):
        names = {name.removesuffix(".weight").removesuffix(".bias") for name in model.state_dict()}
        return {re.sub(rf"^{block}\.[01]\.", f"{block}.*.", name) for name in names}

    assert places(model, "transformer.encoder.layer") == set(TIMM_NAMES)
    assert places(theirs, "blocks") == set(TIMM_NAMES.values())


def test_metadata(tmp_path):
    """Truth: the flags, and the values of `resize`: (pixel - 0.5) / 0.5 of pixels from 0 to 1."""
    checkpoint, _ = trained(tmp_path, "BN", dataset="cifar100")
    done = call(export.main, checkpoint)
    assert done.stdout.endswith(", norm_layer=torch.nn.Identity)\n")
    with safe_open(tmp_path / "run.safetensors", "pt") as opened:
        metadata = opened.metadata()
    assert (metadata["model_type"], metadata["norm_type"]) == ("ViT-64x4_4", "BN")
    values = {key: json.loads(metadata[key]) for key in ("classes", "img_size", "mean", "std")}
    assert values["classes"] == CLASSES["cifar100"] and values["img_size"] == 16
    pixels = torch.randint(256, (1, 3, SIDE, SIDE), dtype=torch.uint8)
    mean, std = (torch.tensor(values[key]).view(3, 1, 1) for key in ("mean", "std"))
    torch.testing.assert_close(resize(pixels, SIDE), (pixels / 255 - mean) / std)


@pytest.mark.parametrize("norm_type", sorted(set(NORM_TYPES) - FOLDING))
def test_norm_types_that_do_not_fold(tmp_path, norm_type):
    checkpoint, _ = trained(tmp_path, norm_type)
    done = call(export.main, checkpoint)
    refused(done, f"norm_type {norm_type}", ".onnx", program="export.py")
    assert os.listdir(tmp_path) == ["run.bin"]


@pytest.mark.parametrize(
    ("norm_type", "entries", "words"),
    [("BN", {"qk_norm": "ln"}, "qk_norm ln"), ("LN", {"stem": "conv_bn"}, "stem conv_bn")],
)
def test_models_that_timm_lacks(tmp_path, norm_type, entries, words):
    checkpoint, _ = trained(tmp_path, norm_type, **entries)
    refused(call(export.main, checkpoint), words, ".onnx", program="export.py")


# ---------------------------------------------------------------- ONNX


MODELS = [(norm_type, {}) for norm_type in NORM_TYPES]
MODELS += [("LN", {"qk_norm": "rms", "pool": "mean", "stem": "conv_bn"})]


@pytest.mark.parametrize(("norm_type", "entries"), MODELS)
def test_onnx(tmp_path, norm_type, entries):
    """Truth: ONNX Runtime against the model, with batches of other sizes than the exported one."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    checkpoint, model = trained(tmp_path, norm_type, **entries)
    file = tmp_path / "run.onnx"
    done = call(export.main, checkpoint, "--output", file)
    assert (done.returncode, done.stdout) == (0, f"{file}\n"), done.stderr
    assert sorted(os.listdir(tmp_path)) == ["run.bin", "run.onnx"]  # the weights are in it
    session = onnxruntime.InferenceSession(file)
    for n in (1, 5):
        images = pictures(n)
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        np.testing.assert_allclose(logits, model(images)[0].detach(), rtol=1e-5, atol=1e-5)
    metadata = session.get_modelmeta().custom_metadata_map
    assert metadata["norm_type"] == norm_type
    assert json.loads(metadata["classes"]) == CLASSES["digits"]
    assert str(ROOT).encode() not in file.read_bytes()


def test_onnx_without_its_packages(tmp_path, monkeypatch):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    checkpoint, _ = trained(tmp_path)
    done = call(export.main, checkpoint, "--output", tmp_path / "run.onnx")
    refused(done, "pip install onnx onnxscript", program="export.py")


# ---------------------------------------------------------------- predict


def percentages(done):
    """Of each picture, its lines: {class: percent}."""
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    found = {}
    for start in range(0, len(lines), 6):
        path, *best = lines[start : start + 6]
        words = [line.split() for line in best]
        found[path] = {name: float(share) for share, _, name in words}
    return found


@torch.no_grad()
def test_predictions_are_evaluations(tmp_path):
    """Truth: the logits of the test images as evaluation makes them, for more than one batch."""
    checkpoint, model = trained(tmp_path)
    images = load_dataset("digits").test_images[: predict.BATCH + 3]
    paths = [tmp_path / f"{i}.png" for i in range(len(images))]
    for path, image in zip(paths, images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
        torch.testing.assert_close(predict.read_picture(path), image, rtol=0, atol=0)
    found = percentages(call(predict.main, checkpoint, *paths))
    expected = model(resize(images, 16))[0].softmax(1) * 100
    for path, shares in zip(paths, expected):
        values, labels = shares.sort(descending=True)
        best = found[str(path)]
        assert list(best) == [CLASSES["digits"][label] for label in labels[:5]]
        np.testing.assert_allclose(list(best.values()), values[:5], atol=0.051)


def colours():
    """A picture of 4 areas, 40x40: red, green, blue, white."""
    pixels = np.full((40, 40, 3), 255, np.uint8)
    pixels[:20, :20], pixels[:20, 20:], pixels[20:, :20] = np.diag([255, 255, 255])
    return Image.fromarray(pixels)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK", "L", "LA", "I;16", "I"])
def test_modes_of_pictures(tmp_path, mode):
    """Truth: the areas' colours, or the greys that PIL makes of them."""
    expected = picture = colours()
    if mode in ("L", "LA", "I;16", "I"):
        expected = picture.convert("L").convert("RGB")
    if mode in ("I;16", "I"):
        picture = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    path = tmp_path / ("a.tif" if mode in ("CMYK", "I") else "a.png")
    picture.convert(mode).save(path)
    with Image.open(path) as image:
        assert image.mode == mode
    found = predict.read_picture(path)
    assert found.shape == (3, SIDE, SIDE) and found.dtype == torch.uint8
    for x, y in ((10, 10), (30, 10), (10, 30), (30, 30)):
        assert tuple(found[:, y * 32 // 40, x * 32 // 40]) == expected.getpixel((x, y))


def test_transparency_rotation_and_shape(tmp_path):
    clear = colours().convert("RGBA")
    clear.putalpha(0)
    clear.save(tmp_path / "clear.png")
    assert (predict.read_picture(tmp_path / "clear.png") == 255).all()

    exif = Image.Exif()
    exif[0x112] = 6  # to be turned by 90 degrees, clockwise
    colours().save(tmp_path / "turned.png", exif=exif)
    corners = predict.read_picture(tmp_path / "turned.png")[:, ::31, ::31]
    blue, red, white, green = corners.flatten(1).T.tolist()
    assert (blue, red) == ([0, 0, 255], [255, 0, 0])
    assert (white, green) == ([255, 255, 255], [0, 255, 0])

    wide = Image.new("RGB", (300, 100), "red")  # the middle square is green
    wide.paste("green", (100, 0, 200, 100))
    wide.save(tmp_path / "wide.jpg", quality=100)
    found = predict.read_picture(tmp_path / "wide.jpg")[:, :, 1:-1].float().mean((1, 2))
    np.testing.assert_allclose(found, [0, 128, 0], atol=3)


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_the_names_of_classes(dataset):
    """Truth: the data sets' own files."""
    from torchvision import datasets

    cifar = getattr(datasets, dataset.upper())
    needs_cifar10(cifar.base_folder)
    assert CLASSES[dataset] == cifar(DATA).classes


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("program", [export, predict], ids=["export", "predict"])
def test_bad_checkpoints(tmp_path, program):
    """One line, nothing written, nothing executed."""
    good, _ = trained(tmp_path)
    colours().save(tmp_path / "a.png")
    arguments = [tmp_path / "a.png"] if program is predict else []
    bad = tmp_path / "bad.bin"

    def fails(path, *words):
        before = set(os.listdir(tmp_path))
        done = call(program.main, path, *arguments)
        refused(done, path, *words, program=f"{program.__name__}.py")
        assert set(os.listdir(tmp_path)) == before

    fails(tmp_path / "none.bin", "no such file")
    fails(tmp_path, "no readable checkpoint")
    fails("/", "no readable checkpoint")
    fails(tmp_path / "a.png", "refused")
    bad.write_bytes(good.read_bytes()[:-1000])
    fails(bad, "no readable checkpoint")
    torch.save({"model": {}, "flags": {}, "x": Bomb(tmp_path / "exploded")}, bad)
    fails(bad, "refused")
    content = torch.load(good, weights_only=True)
    save_checkpoint(content["model"], bad)
    fails(bad, "only weights")
    save_checkpoint(content | {"flags": content["flags"] | {"dataset": "cifar100"}}, bad)
    fails(bad, "(10, 24)", "(100, 24)")


def test_bad_outputs(tmp_path):
    checkpoint, _ = trained(tmp_path)
    (tmp_path / "folder.safetensors").mkdir()
    for name, words in (
        ("run.pt", ".safetensors, .onnx"),
        ("no/run.safetensors", "No such file"),
        ("folder.safetensors", "Is a directory"),
    ):
        done = call(export.main, checkpoint, "--output", tmp_path / name)
        refused(done, name, words, program="export.py")
    assert sorted(os.listdir(tmp_path)) == ["folder.safetensors", "run.bin"]


def test_bad_pictures(tmp_path):
    checkpoint, _ = trained(tmp_path)
    colours().save(tmp_path / "good.png")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").touch()
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:-40])
    (tmp_path / "drawing.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    Image.new("F", (9, 9)).save(tmp_path / "floats.tif")
    for name, words in (
        ("none.png", "No such file"),
        (".", "Is a directory"),
        ("text.png", "PNG, JPEG"),
        ("empty.png", "PNG, JPEG"),
        ("drawing.eps", "PNG, JPEG"),
        ("cut.png", "no readable picture"),
        ("floats.tif", "no readable picture"),
    ):
        done = call(predict.main, checkpoint, tmp_path / "good.png", tmp_path / name)
        refused(done, tmp_path / name, words, program="predict.py")
        assert done.stdout == ""


def test_programs_run_as_a_user_runs_them(tmp_path):
    """In a folder of their own, without the data sets; with the real sizes."""
    flags = {"model_type": "ViT-Ti_16", "img_size": 32, "dataset": "cifar100", "norm_type": "BN"}
    args = type("Flags", (), {"qk_norm": "none", **reference().to_dict(), **flags})
    model = build_model(args, 100)
    save_checkpoint({"model": model.state_dict(), "flags": flags}, tmp_path / "run.bin")
    colours().save(tmp_path / "a.png")
    assert run(["run.bin"], tmp_path, program="export.py").stdout.startswith("run.safetensors\n")
    lines = run(["run.bin", "a.png"], tmp_path, program="predict.py").stdout.splitlines()
    assert lines[0] == "a.png" and len(lines) == 6
