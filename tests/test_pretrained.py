"""Foreign weights: values against NumPy on the file's own layout, every bad file, the download."""

import http.server
import threading

import numpy as np
import pytest
import torch
from formulas import variant
from programs import Bomb
from scipy import ndimage, special
from small import random_state, small_model
from torch.nn.utils.parametrize import is_parametrized

from models import download as downloads
from models.download import PUBLISHED, download
from models.google_layout import POSITIONS as OUR_POSITIONS
from models.norm_blocks import ALL, Block
from models.norm_layers import GroupNorm, LayerNorm
from models.norms import NORM_TYPES, NormType
from models.pretrained import load_pretrained
from utils.checkpoint import save_checkpoint
from utils.errors import UserError

D, H, MLP, PATCH, CLASSES = 24, 3, 40, 8, 10  # as `model` makes them
DEPTH, GRID = 3, 4  # of the .npz
ATTENTION = "MultiHeadDotProductAttention_1"
POSITIONS = "Transformer/posembed_input/pos_embedding"
KEPT = "Kept at their initial values, missing in the file: "
MEANINGLESS = "These are weights of {}: {} computes something different with them"
KEY_KERNEL = f"Transformer/encoderblock_2/{ATTENTION}/key/kernel"


def model_of(norm_type="LN", depth=DEPTH, grid=GRID, classes=CLASSES, **config):
    return small_model(norm_type, grid * PATCH, classes, depth=depth, **config).eval()


@pytest.fixture(scope="module")
def google(tmp_path_factory):
    """Random arrays under the names and in the layouts of Google's release, and their .npz."""
    shapes = {
        "embedding/kernel": (PATCH, PATCH, 3, D),
        "embedding/bias": (D,),
        "cls": (1, 1, D),
        POSITIONS: (1, 1 + GRID**2, D),
        "Transformer/encoder_norm/scale": (D,),
        "Transformer/encoder_norm/bias": (D,),
        "pre_logits/kernel": (D, D),
        "pre_logits/bias": (D,),
        "head/kernel": (D, CLASSES),
        "head/bias": (CLASSES,),
    }
    block = {f"LayerNorm_{n}/{kind}": (D,) for n in (0, 2) for kind in ("scale", "bias")}
    for name in ("query", "key", "value"):
        block |= {f"{ATTENTION}/{name}/kernel": (D, H, D // H)}
        block |= {f"{ATTENTION}/{name}/bias": (H, D // H)}
    block |= {f"{ATTENTION}/out/kernel": (H, D // H, D), f"{ATTENTION}/out/bias": (D,)}
    block |= {"MlpBlock_3/Dense_0/kernel": (D, MLP), "MlpBlock_3/Dense_0/bias": (MLP,)}
    block |= {"MlpBlock_3/Dense_1/kernel": (MLP, D), "MlpBlock_3/Dense_1/bias": (D,)}
    for i in range(DEPTH):
        shapes |= {f"Transformer/encoderblock_{i}/{name}": shape for name, shape in block.items()}
    rng = np.random.default_rng(0)
    arrays = {k: 0.2 * rng.standard_normal(s, dtype=np.float32) for k, s in shapes.items()}
    arrays = {k: a + k.endswith("scale") for k, a in arrays.items()}
    file = tmp_path_factory.mktemp("npz") / "small.npz"
    np.savez(file, **arrays)
    return arrays, file


# ---------------------------------------------------------------- Google's files


def numpy_logits(a, images, norm_type):
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

    B = len(images)
    x = images.reshape(B, GRID, PATCH, GRID, PATCH, 3)  # NHWC, as Google's kernels want it
    x = np.einsum("bipjqc,pqcd->bijd", x, a["embedding/kernel"]) + a["embedding/bias"]
    x = np.concatenate([np.broadcast_to(a["cls"], (B, 1, D)), x.reshape(B, -1, D)], 1)
    x = x + a[POSITIONS]
    for i in range(DEPTH):
        block, k = f"Transformer/encoderblock_{i}", i + 1
        x = x + attention(norm(x, f"{block}/LayerNorm_0"), f"{block}/{ATTENTION}")
        y = mlp(norm(x, f"{block}/LayerNorm_2"), f"{block}/MlpBlock_3")
        if norm_type == "Rescale":
            x = (k / (k + 1)) ** 0.5 * x + DEPTH**-0.5 * y
        else:
            x = x + y
    return norm(x, "Transformer/encoder_norm")[:, 0] @ a["head/kernel"] + a["head/bias"]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("norm_type", ["LN", "BN", "GN", "Rescale"])
def test_npz_gives_the_logits_of_numpy(google, tmp_path, norm_type, dtype):
    arrays = {name: array.astype(dtype) for name, array in google[0].items()}
    np.savez(tmp_path / "x.npz", **arrays)
    model = model_of(norm_type)
    load_pretrained(model, tmp_path / "x.npz")
    images = np.random.default_rng(1).standard_normal((2, GRID * PATCH, GRID * PATCH, 3))
    with torch.no_grad():
        logits, _ = model.double()(torch.from_numpy(images).permute(0, 3, 1, 2))
    expected = numpy_logits(arrays, images, norm_type)
    np.testing.assert_allclose(logits.numpy(), expected, rtol=1e-5, atol=1e-5)
    assert np.abs(expected).max() > 0.3  # not a comparison of zeros


@pytest.mark.parametrize(
    ("norm_type", "loaded", "left_out", "kept"),
    [
        ("LN", 6 + 16 * DEPTH, 2, []),
        ("GN", 6 + 16 * DEPTH, 2, []),
        ("BN", 6 + 16 * DEPTH, 2, ["encoder_norm.layer.running_var", "ffn_norm.layer.running_var"]),
        ("Rescale", 4 + 12 * DEPTH, 2 + 6, ["layer.*._scale", "layer.*.ffn_addbias.init_mean"]),
    ],
)
def test_every_array_is_accounted_for(google, norm_type, loaded, left_out, kept):
    """Truth: counted by hand. The lines say what was loaded, left out, resized and kept."""
    file = google[1]
    lines = load_pretrained(model_of(norm_type, grid=2, classes=7), file)
    assert lines[:3] == [
        f"Loaded {loaded} arrays from {file}",
        "Left out: head of 10 classes; ours, of 7, starts at zero",
        "Resized position embeddings 4x4 -> 2x2",
    ]
    assert lines[3].startswith("Left out, missing in the model: ")
    assert "pre_logits/kernel, pre_logits/bias" in lines[3]
    assert ("encoderblock_*/LayerNorm_0/scale" in lines[3]) == (norm_type == "Rescale")
    assert lines[3].count(",") == left_out  # one of them in the sentence
    assert len(lines) == 4 + bool(kept) + (norm_type != "LN")
    if norm_type != "LN":
        assert lines[-1] == MEANINGLESS.format("LN", norm_type)
    for name in kept:
        assert lines[4].startswith(KEPT) and name in lines[4]
        assert "head" not in lines[4] and "attn" not in lines[4]


class Sandwich(Block):
    """A norm before and after each branch; Google's files have none after."""

    def add_norms(self, norm, dim):
        self.attention_norm, self.attention_norm_after = norm(dim), norm(dim)
        self.ffn_norm, self.ffn_norm_after = norm(dim), norm(dim)

    def forward(self, x, tokens=ALL):
        x = x[:, tokens] + self.attention_norm_after(self.attn(self.attention_norm(x), tokens))
        return x + self.ffn_norm_after(self.ffn(self.ffn_norm(x)))


def test_norms_that_google_does_not_name_stay(google, monkeypatch):
    """A new norm type needs nothing in models/pretrained.py: what it shares with a ViT loads."""
    monkeypatch.setitem(NORM_TYPES, "Sandwich", NormType(Sandwich, LayerNorm))
    model, plain = model_of("Sandwich"), model_of("LN")
    added = {key: value.clone() for key, value in model.state_dict().items() if "_after." in key}
    assert len(added) == 4 * DEPTH
    lines = load_pretrained(model, google[1])
    load_pretrained(plain, google[1])
    names = ("attention_norm_after.weight", "attention_norm_after.bias")
    names += ("ffn_norm_after.weight", "ffn_norm_after.bias")
    assert lines[-2] == KEPT + ", ".join(f"transformer.encoder.layer.*.{name}" for name in names)
    expected = plain.state_dict() | added
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key]), key


def test_checkpoint_of_a_new_type_with_another_norm(tmp_path, monkeypatch):
    """GroupNorm holds its arrays one level down; they load into LayerNorms all the same."""
    for name, norm in (("Sandwich", LayerNorm), ("Sandwich_GN", GroupNorm)):
        monkeypatch.setitem(NORM_TYPES, name, NormType(Sandwich, norm))
    state, model = random_state(model_of("Sandwich_GN")), model_of("Sandwich")
    torch.save(state, tmp_path / "x.bin")
    lines = load_pretrained(model, tmp_path / "x.bin")
    assert lines == [f"Loaded {len(state)} arrays from {tmp_path / 'x.bin'}"]
    for ours, theirs in zip(model.state_dict().values(), state.values(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("grid", [1, 3, 4, 7, 14])
def test_position_embeddings_are_scipys(google, grid):
    arrays, file = google
    model = model_of(grid=grid)
    load_pretrained(model, file)
    positions = arrays[POSITIONS][0].astype(np.float64)
    expected = ndimage.zoom(positions[1:].reshape(4, 4, -1), (grid / 4, grid / 4, 1), order=1)
    found = model.state_dict()[OUR_POSITIONS][0].numpy()
    np.testing.assert_allclose(found[1:], expected.reshape(grid**2, -1), atol=1e-5)
    np.testing.assert_array_equal(found[0], positions[0])


@pytest.mark.parametrize("grid", [4, 3])
def test_without_a_class_token(google, grid):
    """Truth: the file's positions but for the class token's, resized by SciPy."""
    arrays, file = google
    model = variant(side=grid * PATCH, entries={"classifier": "gap"}, depth=DEPTH)
    lines = load_pretrained(model, file)
    assert any(line.startswith("Left out, missing") and "cls" in line for line in lines)
    positions = arrays[POSITIONS][0, 1:].astype(np.float64).reshape(4, 4, -1)
    expected = ndimage.zoom(positions, (grid / 4, grid / 4, 1), order=1).reshape(grid**2, -1)
    found = model.state_dict()[OUR_POSITIONS][0].numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_fixed_positions_stay(google):
    """Truth: those of the model at its start, though the file has others."""
    model = variant(side=GRID * PATCH, entries={"positions": "sincos"}, depth=DEPTH)
    before = model.state_dict()[OUR_POSITIONS].clone()
    lines = load_pretrained(model, google[1])
    assert "Left out: position embeddings; ours are fixed" in lines
    assert torch.equal(model.state_dict()[OUR_POSITIONS], before)
    assert not any("Kept" in line for line in lines)


@pytest.mark.parametrize("norm_type", ["LN", "SigmaReparam"])
@pytest.mark.parametrize(
    ("zero_head", "classes", "loads"), [(False, 10, True), (True, 10, False), (False, 100, False)]
)
def test_head(google, zero_head, classes, loads, norm_type):
    """Of the file's size it loads; `zero_head` and another size start at zero, and learn."""
    arrays, file = google
    model = model_of(norm_type, classes=classes)
    model.zero_head = zero_head
    load_pretrained(model, file)
    kernel, bias = arrays["head/kernel"], arrays["head/bias"]
    if not loads:
        kernel, bias = np.zeros((D, classes)), np.zeros(classes)
    np.testing.assert_allclose(model.head.weight.detach().numpy().T, kernel, rtol=1e-5)
    np.testing.assert_array_equal(model.head.bias.detach().numpy(), bias)
    model(torch.randn(2, 3, GRID * PATCH, GRID * PATCH), torch.arange(2)).backward()
    assert any(p.grad.abs().max() > 0 for p in model.head.parameters() if p.numel() != classes)


def test_weights_of_zeros_into_reparametrized_ones(tmp_path):
    """Such as `zero_branches` leaves at the start: they stay zeros, and can be learned."""
    source, model = model_of("LN"), model_of("SigmaReparam")
    state = {k: 0 * v if "attn.out" in k else v for k, v in random_state(source).items()}
    torch.save(state, tmp_path / "x.bin")
    load_pretrained(model, tmp_path / "x.bin")
    out = model.transformer.encoder.layer[0].attn.out
    assert out.weight.abs().max() == 0
    out(torch.ones(1, out.in_features)).sum().backward()
    gamma = out.parametrizations.weight[0].gamma
    assert gamma.grad.isfinite() and gamma.grad != 0


def test_a_reparametrized_head_of_another_size(tmp_path):
    torch.save(random_state(model_of("SigmaReparam", classes=7)), tmp_path / "x.bin")
    model = model_of("SigmaReparam")
    load_pretrained(model, tmp_path / "x.bin")
    assert model.head.weight.abs().max() == 0 and model.head.parametrizations.weight.original.any()


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("norm_type", NORM_TYPES)
@pytest.mark.parametrize("ours", [False, True])
def test_checkpoint_of_the_same_type_loads_whole(tmp_path, norm_type, ours):
    """A plain state dict, as the reference writes it, and our own file, buffers included."""
    model, file = model_of(norm_type), tmp_path / "checkpoint.bin"
    state = random_state(model)
    save_checkpoint({"model": state, "step": 3}, file) if ours else torch.save(state, file)
    assert load_pretrained(model, file) == [f"Loaded {len(state)} arrays from {file}"]
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key


@pytest.mark.parametrize("target", NORM_TYPES)
@pytest.mark.parametrize("source", ("LN", "BN", "GN", "Rescale"))
def test_checkpoint_into_every_type(tmp_path, source, target):
    """What both have loads; what only the model has stays; positions are resized.

    A reparametrized weight is the loaded one, and gains of branches are 1.
    """
    state, file = random_state(model_of(source)), tmp_path / "checkpoint.bin"
    torch.save(state, file)
    model = model_of(target, grid=5)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    load_pretrained(model, file)

    def plain(key):
        return key.replace("_norm.layer.", "_norm.")

    state = {plain(key): value for key, value in state.items()}
    for name, module in model.named_modules():
        if is_parametrized(module):
            torch.testing.assert_close(module.weight, state[f"{name}.weight"])
    for key, value in model.state_dict().items():
        if key != OUR_POSITIONS and ".parametrizations." not in key:
            start = torch.ones_like(value) if key.endswith("_gain") else before[key]
            assert torch.equal(value, state.get(plain(key), start)), key


@pytest.mark.parametrize("target", NORM_TYPES)
@pytest.mark.parametrize("source", ["LN", "LayerScale", "ResPost", "google"])
def test_weights_without_a_meaning(google, tmp_path, source, target):
    """The log says so just where the loaded model is another function. Truth: its outputs."""
    file = google[1] if source == "google" else tmp_path / "checkpoint.bin"
    original, model = model_of("LN" if source == "google" else source), model_of(target)
    if source != "google":
        flags = {"norm_type": source}
        save_checkpoint({"model": random_state(original), "flags": flags}, file)
    load_pretrained(original, file)
    lines = load_pretrained(model, file)
    images = torch.randn(4, 3, GRID * PATCH, GRID * PATCH)
    with torch.no_grad():
        for _ in range(8):  # those that measure their inputs
            model.train()(images)
        same = torch.allclose(model.eval()(images)[0], original(images)[0], atol=1e-4)
    line = MEANINGLESS.format(original.norm_type, target)
    assert (line in lines) == (not same), (source, target)


# ---------------------------------------------------------------- what is refused


def refused(model, file, *parts):
    """Checks that the error is one line with `parts`, and the model untouched."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UserError) as error:
        load_pretrained(model, file)
    message = str(error.value)
    assert "\n" not in message
    for part in ("--pretrained_dir", file, *parts):
        assert str(part) in message, message
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize(
    ("norm_type", "name"),
    [
        ("LN", "cls"),
        ("LN", KEY_KERNEL),
        ("Rescale", KEY_KERNEL),
        ("Rescale", "head/bias"),
        ("LN", "Transformer/encoderblock_1/LayerNorm_2/bias"),
        ("GN", "Transformer/encoder_norm/scale"),
        ("LN", "transformer.encoder.encoder_norm.weight"),
        ("BN", "transformer.encoder.layer.1.ffn_norm.layer.running_var"),
        ("Rescale", "transformer.encoder.layer.1.addbias._bias"),
    ],
)
def test_file_that_lacks_an_array(google, tmp_path, norm_type, name):
    model, file = model_of(norm_type), tmp_path / "x.npz"
    if name in google[0]:
        np.savez(file, **{k: v for k, v in google[0].items() if k != name})
    else:
        file = tmp_path / "x.bin"
        torch.save({k: v for k, v in random_state(model).items() if k != name}, file)
    refused(model, file, f"lacks {name}:", "another model")


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "parts"),
    [
        ("cls", (1, 1, 23), "f4", ["(1, 1, 23)", "(1, 1, 24)"]),
        (KEY_KERNEL, (24, 6, 4), "f4", ["(24, 6, 4)", "(24, 3, 8)"]),
        ("embedding/kernel", (4, 4, 3, 24), "f4", ["(4, 4, 3, 24)", "(8, 8, 3, 24)"]),
        (POSITIONS, (1, 16, 24), "f4", ["(1, 17, 24)"]),
        (POSITIONS, (0,), "f4", ["(0,)"]),
        ("head/bias", (1, 10), "f4", ["(1, 10)", "(10,)"]),
        ("cls", (1, 1, 24), "i4", ["int32", "float32"]),
        ("cls", (1, 1, 24), "V2", ["|V2"]),
        ("cls", (), "U1", ["()"]),
    ],
)
def test_npz_with_an_unfit_array(google, tmp_path, name, shape, dtype, parts):
    np.savez(tmp_path / "x.npz", **(google[0] | {name: np.zeros(shape, dtype)}))
    refused(model_of(), tmp_path / "x.npz", name, *parts)


def test_file_of_another_model(google, tmp_path):
    file = google[1]
    refused(model_of(depth=2), file, "Transformer/encoderblock_2/", "2 blocks", "another model")
    refused(model_of(depth=5), file, "lacks Transformer/encoderblock_3/", "another model")
    refused(model_of(dim=48), file, "another model")
    torch.save(random_state(model_of()), tmp_path / "x.bin")
    refused(model_of(depth=2), tmp_path / "x.bin", "encoder.layer.2.", "another model")


def test_damaged_files(google, tmp_path):
    """Cut short at several places; a changed byte in the middle."""
    state = random_state(model_of())
    save_checkpoint({"model": state}, tmp_path / "ours.bin")
    torch.save(state, tmp_path / "plain.bin")
    for whole in (google[1], tmp_path / "ours.bin", tmp_path / "plain.bin"):
        data, file = whole.read_bytes(), tmp_path / f"x{whole.suffix}"
        for end in (0, 1, 10, 40, 1000, len(data) // 2, -5000, -200, -22, -1):
            file.write_bytes(data[:end])
            refused(model_of(), file)
    data = bytearray(google[1].read_bytes())
    data[len(data) // 2] ^= 255
    file = tmp_path / "x.npz"
    file.write_bytes(data)
    refused(model_of(), file, "cannot be read", "damaged")


def test_files_of_other_kinds(tmp_path):
    model, npz, other = model_of(depth=1), tmp_path / "x.npz", tmp_path / "x.bin"
    for file, content in ((npz, b"hello\n" * 99), (other, b"hello"), (npz, b"PK\3\4" * 99)):
        file.write_bytes(content)
        refused(model, file)
    np.save(tmp_path / "x.npy", np.zeros(3))
    refused(model, tmp_path / "x.npy")
    torch.save({"step": 3}, other)
    refused(model, other, "'step'")
    torch.save([torch.zeros(2)], other)
    refused(model, other)
    (tmp_path / "x.onnx").write_bytes(b"\x08\x08\x12\x07pytorch")  # the start of an .onnx file
    refused(model, tmp_path / "x.onnx")
    refused(model, tmp_path / "no.npz", "auto", "ViT-S_14", "ViT-H_14")
    refused(model, tmp_path)


def test_pickles_are_not_executed(google, tmp_path):
    marker, npz, checkpoint = (tmp_path / name for name in ("executed", "x.npz", "x.bin"))
    np.savez(npz, **google[0], unused=np.array([Bomb(marker)], dtype=object))
    refused(model_of(), npz, "allow_pickle=False")
    torch.save(random_state(model_of()) | {"unused": Bomb(marker)}, checkpoint)
    refused(model_of(), checkpoint)
    assert not marker.exists()


# ---------------------------------------------------------------- the download


@pytest.fixture
def server(monkeypatch, google):
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
    server.body, server.sends = google[1].read_bytes(), None
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(downloads, "BASE_URL", f"http://127.0.0.1:{server.server_port}/release")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_download(server, tmp_path):
    folder = tmp_path / "pretrain"
    file = download("ViT-B_16", folder)
    assert file == folder / "ViT-B_16.npz" and file.read_bytes() == server.body
    assert list(folder.iterdir()) == [file]
    server.body = b""  # what is there is not fetched again
    assert download("ViT-B_16", folder).stat().st_size > 0


def test_download_that_fails(server, tmp_path, monkeypatch):
    def fails(*parts, model_type="ViT-B_16"):
        with pytest.raises(UserError) as error:
            download(model_type, tmp_path)
        message = str(error.value)
        assert "\n" not in message
        for part in ("--pretrained_dir auto", *parts):
            assert part in message, message
        assert not list(tmp_path.iterdir())

    server.sends = len(server.body) // 2
    fails("not a whole .npz")
    server.sends, server.body = None, b"<html>please log in</html>"
    fails("not a whole .npz")
    fails("404", f"{downloads.BASE_URL}/ViT-L_16.npz", model_type="ViT-L_16")
    fails(*PUBLISHED, "ViT-Ti_4", model_type="ViT-Ti_4")

    def interrupted(url, file):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.hub, "download_url_to_file", interrupted)
        download("ViT-B_16", tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(downloads, "BASE_URL", "http://127.0.0.1:9/release")  # no server there
    fails("refused")
