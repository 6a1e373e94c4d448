"""Classifies pictures with a trained model, from its checkpoint.

    python3 predict.py output/NAME_checkpoint.bin cat.jpg ship.png

Prints the five best classes of each picture. Of a picture the middle square counts, made 32x32 as
the images of the data sets are, and from there on treated as a test image.
"""

import argparse
import sys
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from utils.checkpoint import load_model
from utils.data_utils import CLASSES, SIDE, resize
from utils.errors import UserError, reported

FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")  # EPS would run Ghostscript
BEST, BATCH = 5, 100


def read_picture(path):
    """The picture in the file `path`, upright and over white, as (3, 32, 32) uint8.

    Raises UserError, or OSError where the file cannot be opened.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits
                grey = np.asarray(image).astype(np.float32) / 257
                image = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
            elif image.mode == "F":
                raise ValueError("floating-point pixels, which have no certain white")
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = ImageOps.fit(image.convert("RGB"), (SIDE, SIDE), Image.Resampling.BILINEAR)
    except UnidentifiedImageError:
        raise UserError(f"{path}: no picture in one of the formats {', '.join(FORMATS)}") from None
    except Exception as error:  # a damaged picture fails in a dozen ways
        if getattr(error, "filename", None):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: no readable picture ({reason})") from None
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@torch.no_grad()
def probabilities(model, pictures, img_size):
    """Pictures (n, 3, 32, 32) uint8 to probabilities (n, classes), as in evaluation."""
    parts = [model.eval()(resize(part, img_size))[0] for part in pictures.split(BATCH)]
    return torch.cat(parts).softmax(dim=1)


@reported
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    text = f"files, of any size, of: {', '.join(FORMATS)}"
    parser.add_argument("pictures", nargs="+", metavar="IMAGE", help=text)
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # PIL's, of large pictures and odd metadata
    model, flags = load_model(args.checkpoint)
    pictures = torch.stack([read_picture(path) for path in args.pictures])
    classes = CLASSES[flags.dataset]
    for path, row in zip(args.pictures, probabilities(model, pictures, flags.img_size)):
        print(path)
        for share, label in zip(*(values.tolist() for values in row.topk(BEST))):
            print(f"  {100 * share:5.1f} %  {classes[label]}")


if __name__ == "__main__":
    sys.exit(main())
