"""Foreign weights: values against NumPy on the file's own layout, every bad file, the download."""

import copy
import http.server
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage, special

from models import pretrained
from models.modeling import CONFIGS, VisionTransformer
from models.norms import NORM_TYPES
from models.pretrained import PretrainedError, download, load_pretrained
from utils.checkpoint import save_checkpoint

ATTENTION = "MultiHeadDotProductAttention_1"
BLOCK_3_KEY = f"Transformer/encoderblock_3/{ATTENTION}/key/kernel"


def small_config(num_layers=2):
    config = copy.deepcopy(CONFIGS["ViT-Ti_16"])  # hidden 192, 3 heads, MLP 768
    config.transformer.num_layers = num_layers
    return config


def small_model(norm_type="LN", num_layers=2, **kwargs):
    kwargs = {"img_size": 64, "num_classes": 10} | kwargs
    return VisionTransformer(small_config(num_layers), norm_type=norm_type, **kwargs).eval()


def google_arrays(config, grid, classes, dtype=np.float32):
    """Random arrays under the names and in the layouts of Google's release."""
    D, (P, _) = config.hidden_size, config.patches.size
    t = config.transformer
    H, d = t.num_heads, D // t.num_heads
    shapes = {
        "embedding/kernel": (P, P, 3, D),
        "embedding/bias": (D,),
        "cls": (1, 1, D),
        "Transformer/posembed_input/pos_embedding": (1, 1 + grid**2, D),
        "Transformer/encoder_norm/scale": (D,),
        "Transformer/encoder_norm/bias": (D,),
        "pre_logits/kernel": (D, D),
        "pre_logits/bias": (D,),
        "head/kernel": (D, classes),
        "head/bias": (classes,),
    }
    for i in range(t.num_layers):
        block = {f"LayerNorm_{n}/{kind}": (D,) for n in (0, 2) for kind in ("scale", "bias")}
        for name in ("query", "key", "value"):
            block |= {f"{ATTENTION}/{name}/kernel": (D, H, d), f"{ATTENTION}/{name}/bias": (H, d)}
        block |= {f"{ATTENTION}/out/kernel": (H, d, D), f"{ATTENTION}/out/bias": (D,)}
        block |= {
            "MlpBlock_3/Dense_0/kernel": (D, t.mlp_dim),
            "MlpBlock_3/Dense_0/bias": (t.mlp_dim,),
        }
        block |= {"MlpBlock_3/Dense_1/kernel": (t.mlp_dim, D), "MlpBlock_3/Dense_1/bias": (D,)}
        shapes |= {f"Transformer/encoderblock_{i}/{name}": shape for name, shape in block.items()}
    rng = np.random.default_rng(0)
    arrays = {k: 0.1 * rng.standard_normal(s, dtype=np.float32) for k, s in shapes.items()}
    return {k: (a + k.endswith("scale")).astype(dtype) for k, a in arrays.items()}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Arrays of a 4-block model (grid 4x4, 10 classes) and the .npz that holds them."""
    arrays = google_arrays(small_config(4), grid=4, classes=10)
    file = tmp_path_factory.mktemp("npz") / "small.npz"
    np.savez(file, **arrays)
    return arrays, file


def numpy_logits(a, images, num_layers, norm_type):
    """A ViT's logits in NumPy, float64, on Google's arrays in Google's layouts."""
    a = {k: v.astype(np.float64) for k, v in a.items()}

    def norm(x, where):
        if norm_type == "Rescale":
            return x
        if norm_type == "LN":
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        elif norm_type == "GN":
            g = x.reshape(*x.shape[:2], 4, -1)
            mean, var = g.mean((1, 3), keepdims=True), g.var((1, 3), keepdims=True)
            x = ((g - mean) / np.sqrt(var + 1e-6)).reshape(x.shape)
        else:  # BN, with the running statistics at their initial 0 and 1
            x = x / np.sqrt(1 + 1e-6)
        return x * a[f"{where}/scale"] + a[f"{where}/bias"]

    def attention(x, where):
        q, k, v = (
            np.einsum("bnd,dhe->bnhe", x, a[f"{where}/{n}/kernel"]) + a[f"{where}/{n}/bias"]
            for n in ("query", "key", "value")
        )
        weights = special.softmax(np.einsum("bnhe,bmhe->bhnm", q, k) / q.shape[-1] ** 0.5, -1)
        y = np.einsum("bhnm,bmhe->bnhe", weights, v)
        return np.einsum("bnhe,hed->bnd", y, a[f"{where}/out/kernel"]) + a[f"{where}/out/bias"]

    def mlp(x, where):
        x = x @ a[f"{where}/Dense_0/kernel"] + a[f"{where}/Dense_0/bias"]
        x = x * 0.5 * (1 + special.erf(x / 2**0.5))
        return x @ a[f"{where}/Dense_1/kernel"] + a[f"{where}/Dense_1/bias"]

    B, S, P = len(images), images.shape[1], a["embedding/kernel"].shape[0]
    x = images.reshape(B, S // P, P, S // P, P, 3)  # NHWC, as Google's kernels want it
    x = np.einsum("bipjqc,pqcd->bijd", x, a["embedding/kernel"]) + a["embedding/bias"]
    x = x.reshape(B, -1, x.shape[-1])
    x = np.concatenate([np.broadcast_to(a["cls"], (B, 1, x.shape[-1])), x], 1)
    x = x + a["Transformer/posembed_input/pos_embedding"]
    for i in range(num_layers):
        block, k = f"Transformer/encoderblock_{i}", i + 1
        x = x + attention(norm(x, f"{block}/LayerNorm_0"), f"{block}/{ATTENTION}")
        y = mlp(norm(x, f"{block}/LayerNorm_2"), f"{block}/MlpBlock_3")
        if norm_type == "Rescale":
            x = (k / (k + 1)) ** 0.5 * x + num_layers**-0.5 * y
        else:
            x = x + y
    return norm(x, "Transformer/encoder_norm")[:, 0] @ a["head/kernel"] + a["head/bias"]


@pytest.mark.parametrize("norm_type", ["LN", "BN", "GN", "Rescale"])
def test_npz_gives_the_logits_of_numpy(small, norm_type):
    arrays, file = small
    model = small_model(norm_type, num_layers=4)
    load_pretrained(model, file)
    model.double()
    images = np.random.default_rng(1).standard_normal((2, 64, 64, 3))
    with torch.no_grad():
        logits, _ = model(torch.from_numpy(images).permute(0, 3, 1, 2))
    expected = numpy_logits(arrays, images, 4, norm_type)
    np.testing.assert_allclose(logits.numpy(), expected, rtol=1e-5, atol=1e-5)
    assert np.abs(expected).max() > 0.3  # not a comparison of zeros


@pytest.fixture(scope="module")
def vit_b_16(tmp_path_factory):
    """ViT-B_16 at 224, 7 classes, in float16: 172 MB, removed at the end."""
    arrays = google_arrays(CONFIGS["ViT-B_16"], grid=14, classes=7, dtype=np.float16)
    file = tmp_path_factory.mktemp("npz") / "ViT-B_16.npz"
    np.savez(file, **arrays)
    yield arrays, file
    file.unlink()


@pytest.mark.parametrize("norm_type", ["LN", "BN", "GN", "Rescale"])
def test_vit_b_16_at_another_size(vit_b_16, norm_type):
    arrays, file = vit_b_16
    model = VisionTransformer(CONFIGS["ViT-B_16"], 112, norm_type, num_classes=10)
    lines = load_pretrained(model, file)
    state = model.state_dict()
    loaded = 198 if norm_type != "Rescale" else 148
    assert lines[0] == f"Loaded {loaded} arrays from {file}"
    assert "Left out: head of 7 classes; ours, of 10, starts at zero" in lines
    assert "Resized position embeddings 14x14 -> 7x7" in lines
    left_out = next(line for line in lines if line.startswith("Left out, as"))
    assert "pre_logits/kernel" in left_out
    assert ("encoderblock_*/LayerNorm_0/scale" in left_out) == (norm_type == "Rescale")
    kept = [line for line in lines if line.startswith("Kept")]
    assert bool(kept) == (norm_type in ("BN", "Rescale"))
    assert all("head" not in line and "attn" not in line for line in kept)

    assert not state["head.weight"].any() and not state["head.bias"].any()
    positions = arrays["Transformer/posembed_input/pos_embedding"][0].astype(np.float64)
    grid = ndimage.zoom(positions[1:].reshape(14, 14, 768), (0.5, 0.5, 1), order=1)
    found = state["transformer.embeddings.position_embeddings"][0].numpy()
    np.testing.assert_allclose(found[1:], grid.reshape(49, 768), atol=1e-5)
    np.testing.assert_array_equal(found[0], positions[0])
    block, ours = "Transformer/encoderblock_11", "transformer.encoder.layer.11"
    for name, key in (("Dense_0", "fc1"), ("Dense_1", "fc2")):
        kernel = arrays[f"{block}/MlpBlock_3/{name}/kernel"]
        np.testing.assert_array_equal(state[f"{ours}.ffn.{key}.weight"].numpy(), kernel.T)
    for name in ("query", "key", "value"):
        kernel, weight = (
            arrays[f"{block}/{ATTENTION}/{name}/kernel"],
            state[f"{ours}.attn.{name}.weight"],
        )
        for head in (0, 5, 11):
            np.testing.assert_array_equal(
                weight[64 * head : 64 * head + 64].numpy().T, kernel[:, head]
            )
    if norm_type != "Rescale":
        level = ".layer" if norm_type in ("BN", "GN") else ""
        for name, key in (("LayerNorm_0", "attention_norm"), ("LayerNorm_2", "ffn_norm")):
            scale = state[f"{ours}.{key}{level}.weight"].numpy()
            np.testing.assert_array_equal(scale, arrays[f"{block}/{name}/scale"])
        bias = state[f"transformer.encoder.encoder_norm{level}.bias"].numpy()
        np.testing.assert_array_equal(bias, arrays["Transformer/encoder_norm/bias"])


@pytest.mark.parametrize("img_size", [16, 48, 112, 224])
def test_position_embeddings_are_scipys(small, img_size):
    arrays, file = small
    model, grid = small_model("LN", 4, img_size=img_size), img_size // 16
    load_pretrained(model, file)
    positions = arrays["Transformer/posembed_input/pos_embedding"][0].astype(np.float64)
    expected = ndimage.zoom(positions[1:].reshape(4, 4, -1), (grid / 4, grid / 4, 1), order=1)
    found = model.state_dict()["transformer.embeddings.position_embeddings"][0].numpy()
    np.testing.assert_allclose(found[1:], expected.reshape(grid**2, -1), atol=1e-5)
    np.testing.assert_array_equal(found[0], positions[0])


def test_head(small):
    """Of the file's size it loads; `zero_head` and another size start at zero."""
    arrays, file = small
    for kwargs, loads in (({}, True), ({"zero_head": True}, False), ({"num_classes": 100}, False)):
        model = small_model("LN", 4, **kwargs)
        load_pretrained(model, file)
        if loads:
            np.testing.assert_array_equal(
                model.head.weight.detach().numpy().T, arrays["head/kernel"]
            )
        else:
            assert not model.head.weight.any() and not model.head.bias.any()


def randomized(norm_type, **kwargs):
    """A state dict of random floats, every count 9."""
    return {
        key: torch.randn_like(value) if value.is_floating_point() else torch.full_like(value, 9)
        for key, value in small_model(norm_type, **kwargs).state_dict().items()
    }


@pytest.mark.parametrize("norm_type", NORM_TYPES)
@pytest.mark.parametrize("ours", [False, True])
def test_checkpoint_of_the_same_type_loads_whole(tmp_path, norm_type, ours):
    """A plain state dict, as the reference writes it, and our own file, buffers included."""
    state, file = randomized(norm_type), tmp_path / "checkpoint.bin"
    save_checkpoint({"model": state, "step": 3}, file) if ours else torch.save(state, file)
    model = small_model(norm_type)
    lines = load_pretrained(model, file)
    assert lines == [f"Loaded {len(state)} arrays from {file}"]
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key


@pytest.mark.parametrize("target", NORM_TYPES)
@pytest.mark.parametrize("source", NORM_TYPES)
def test_checkpoint_into_every_type(tmp_path, source, target):
    """What both have loads; what only the model has stays; positions are resized."""
    state, file = randomized(source), tmp_path / "checkpoint.bin"
    torch.save(state, file)
    model = small_model(target, img_size=112)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    load_pretrained(model, file)

    def plain(key):
        return key.replace("_norm.layer.", "_norm.")

    state = {plain(key): value for key, value in state.items()}
    for key, value in model.state_dict().items():
        if "position" not in key:
            assert torch.equal(value, state.get(plain(key), before[key])), key


def refused(model, file, *parts):
    """The error's line; checks that it is one line with `parts`, and the model is untouched."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(PretrainedError) as error:
        load_pretrained(model, file)
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message, message
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("norm_type", ["LN", "Rescale"])
def test_npz_that_lacks_an_array(small, tmp_path, norm_type):
    arrays, model = small[0], small_model(norm_type, 4)
    lacking = [BLOCK_3_KEY, "cls", "head/bias", "embedding/kernel"]
    if norm_type == "LN":
        lacking += ["Transformer/encoderblock_1/LayerNorm_2/bias", "Transformer/encoder_norm/scale"]
    for name in lacking:
        np.savez(tmp_path / "x.npz", **{k: v for k, v in arrays.items() if k != name})
        refused(model, tmp_path / "x.npz", f"lacks {name}", "another model")


def test_checkpoint_that_lacks_an_array(tmp_path):
    for norm_type, name in (
        ("LN", "transformer.encoder.encoder_norm.weight"),
        ("BN", "transformer.encoder.layer.1.ffn_norm.layer.running_var"),
        ("Rescale", "transformer.encoder.layer.1.addbias._bias"),
    ):
        state = randomized(norm_type)
        del state[name]
        torch.save(state, tmp_path / "x.bin")
        refused(small_model(norm_type), tmp_path / "x.bin", f"lacks {name}", "another model")


@pytest.mark.parametrize(
    "name, value, parts",
    [
        ("cls", np.zeros((1, 1, 191), "f4"), ["(1, 1, 191)", "(1, 1, 192)"]),
        (BLOCK_3_KEY, np.zeros((192, 6, 32), "f4"), ["(192, 6, 32)", "(192, 3, 64)"]),
        (
            "embedding/kernel",
            np.zeros((32, 32, 3, 192), "f4"),
            ["(32, 32, 3, 192)", "(16, 16, 3, 192)"],
        ),
        (
            "Transformer/posembed_input/pos_embedding",
            np.zeros((1, 16, 192), "f4"),
            ["(1, 17, 192)"],
        ),
        ("Transformer/posembed_input/pos_embedding", np.zeros((0,), "f4"), ["(0,)"]),
        ("head/bias", np.zeros((1, 10), "f4"), ["(1, 10)", "(10,)"]),
        ("cls", np.zeros((1, 1, 192), "i4"), ["int32", "float32"]),
        ("cls", np.zeros((1, 1, 192), "V2"), ["|V2"]),
        ("cls", np.array("a"), ["()"]),
    ],
)
def test_npz_with_an_unfit_array(small, tmp_path, name, value, parts):
    np.savez(tmp_path / "x.npz", **(small[0] | {name: value}))
    refused(small_model("LN", 4), tmp_path / "x.npz", name, *parts)


def test_file_of_another_model(small, tmp_path):
    file = small[1]
    refused(small_model("LN", 2), file, "Transformer/encoderblock_2/", "2 blocks", "another model")
    refused(small_model("LN", 5), file, "lacks Transformer/encoderblock_4/", "another model")
    other = VisionTransformer(CONFIGS["ViT-Ti_4"], 32, num_classes=10)
    refused(other, file, "another model")
    torch.save(randomized("LN", num_layers=3), tmp_path / "x.bin")
    refused(small_model("LN", 2), tmp_path / "x.bin", "encoder.layer.2.", "another model")


def test_damaged_files(small, tmp_path):
    """Cut short at several places; a changed byte in the middle."""
    model, data = small_model("LN", 4), small[1].read_bytes()
    file, size = tmp_path / "x.npz", len(data)
    for end in (0, 1, 10, 40, 1000, size // 2, size - 5000, size - 22, size - 1):
        file.write_bytes(data[:end])
        refused(model, file, file)
    file.write_bytes(data[: size // 2] + bytes([data[size // 2] ^ 255]) + data[size // 2 + 1 :])
    refused(model, file, file, "cannot read", "damaged")

    save_checkpoint({"model": randomized("LN")}, tmp_path / "whole.bin")
    torch.save(randomized("LN"), tmp_path / "plain.bin")
    for whole in ("whole.bin", "plain.bin"):
        data, file = (tmp_path / whole).read_bytes(), tmp_path / "x.bin"
        for end in (0, 10, len(data) // 2, len(data) - 200):
            file.write_bytes(data[:end])
            refused(small_model("LN"), file, file)


def test_files_of_other_kinds(tmp_path):
    model = small_model()
    for name, content in (
        ("x.npz", b"hello\n" * 99),
        ("x.bin", b"hello"),
        ("x.npz", b"PK\3\4" * 99),
    ):
        (tmp_path / name).write_bytes(content)
        refused(model, tmp_path / name, tmp_path / name)
    np.save(tmp_path / "x.npy", np.zeros(3))
    refused(model, tmp_path / "x.npy", tmp_path / "x.npy")
    torch.save({"step": 3}, tmp_path / "x.bin")
    refused(model, tmp_path / "x.bin", "'step'")
    torch.save([torch.zeros(2)], tmp_path / "x.bin")
    refused(model, tmp_path / "x.bin", tmp_path / "x.bin")
    missing = tmp_path / "no.npz"
    refused(model, missing, "--pretrained_dir", missing, "auto", pretrained.BASE_URL, "ViT-H_14")
    refused(model, tmp_path, tmp_path)


class Bomb:
    """Unpickling it creates `marker`."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("name", ["cls", "unused"])
def test_pickles_are_not_executed(small, tmp_path, name):
    marker, file = tmp_path / "executed", tmp_path / "x.npz"
    np.savez(file, **(small[0] | {name: np.array([Bomb(marker)], dtype=object)}))
    refused(small_model("LN", 4), file, name, "allow_pickle=False")
    torch.save(randomized("LN") | {name: Bomb(marker)}, tmp_path / "x.bin")
    refused(small_model("LN"), tmp_path / "x.bin", tmp_path / "x.bin")
    assert not marker.exists()


@pytest.fixture
def server(monkeypatch, small):
    """A server on 127.0.0.1 in place of Google's; `server.sends` is how many bytes it sends."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path != "/release/ViT-B_16.npz":
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", len(self.server.body))
            self.end_headers()
            self.wfile.write(self.server.body[: self.server.sends])

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    server.body, server.sends = small[1].read_bytes(), None
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(pretrained, "BASE_URL", f"http://127.0.0.1:{server.server_port}/release")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def download_refused(folder, *parts, model_type="ViT-B_16"):
    with pytest.raises(PretrainedError) as error:
        download(model_type, folder)
    message = str(error.value)
    assert "\n" not in message
    for part in ("--pretrained_dir auto", *parts):
        assert str(part) in message, message
    assert not list(folder.glob("*"))


def test_download(server, tmp_path):
    folder = tmp_path / "pretrain"
    file = download("ViT-B_16", folder)
    assert file == folder / "ViT-B_16.npz" and file.read_bytes() == server.body
    assert list(folder.iterdir()) == [file]
    server.body = b""  # what is there is not fetched again
    assert download("ViT-B_16", folder).stat().st_size > 0


def test_download_that_fails(server, tmp_path, monkeypatch):
    server.sends = len(server.body) // 2
    download_refused(tmp_path, f"{server.sends} of {len(server.body)} bytes")
    server.sends, server.body = None, b"<html>please log in</html>"
    download_refused(tmp_path, "not a .npz")
    download_refused(tmp_path, "404", f"{pretrained.BASE_URL}/ViT-L_16.npz", model_type="ViT-L_16")
    download_refused(tmp_path, *pretrained.PUBLISHED, "ViT-Ti_4", model_type="ViT-Ti_4")

    def interrupted(source, target, length):
        target.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pretrained.shutil, "copyfileobj", interrupted)
        download("ViT-B_16", tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(pretrained, "BASE_URL", "http://127.0.0.1:9/release")  # no server there
    download_refused(tmp_path, "refused")
