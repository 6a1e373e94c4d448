"""Recipes: what --recipe chooses. Each is a page: what it is for, what it costs, what it reached.

A recipe sets flags of train.py (which override it on the command line) and entries that have no
flag (which `--set name=value` overrides). `reference` has all entries; others say what differs.
"""

from ml_collections import ConfigDict


def reference():
    """The training of the 2021 course project: ViT-B_16 from scratch at 224 px.

        python3 train.py --name cifar10-100_500 --norm_type LN --fp16

    251 PFLOP for 20,000 steps. The reference's best run from scratch reached 69.7 % on CIFAR-10, in
    171 minutes on an RTX 3090.
    """
    return ConfigDict(
        {
            # Flags
            "model_type": "ViT-B_16",
            "img_size": 224,
            "train_batch_size": 128,
            "num_steps": 20000,
            "learning_rate": 0.05,
            "weight_decay": 0.0,
            "warmup_steps": 500,
            "decay_type": "cosine",
            "max_grad_norm": 1.0,
            "eval_every": 100,
            # Optimizer: sgd, adamw, or muon for the blocks' matrices with AdamW for the rest
            "optimizer": "sgd",
            "decay_all": True,  # weight decay of gains, biases and positions too
            "head_factor": 1.0,  # the head's learning rate over that of the rest
            "ema": 0.0,  # decay of the averaged weights that are evaluated; 0: none
            # Data: crop is resized (a random part, at least smallest_crop of the area) or shift
            "crop": "resized",
            "smallest_crop": 0.05,
            "shift": 4,  # pixels, with reflected borders
            "flip": False,
            "randaugment_ops": 0,
            "randaugment_magnitude": 9,  # of 30
            "mixup": 0.0,  # alpha; 0: none
            "cutmix": 0.0,
            "mix_share": 1.0,  # share of the images that are mixed at all
            "label_smoothing": 0.0,
            # Model
            "dropout": 0.1,
            "drop_path": 0.0,  # of the last block; from 0 linearly over the depth
            "patch_dropout": 0.0,  # share of the patches left out of each training image
            "patch_dropout_until": 1.0,  # share of the steps, from the first, that leave any out
            "pool": "token",  # or mean, without a class token
            "positions": "learned",  # or sincos
            "stem": "patch",  # or conv, conv_bn: two convolutions, no plain ViT
            "position_resize": "auto",  # or bilinear, bicubic; of pretrained ones
            "zero_head": False,
            "zero_branches": False,  # ignored by norm types with their own initialization
        }
    )


def small():
    """Small models at 32 px from scratch, in minutes on a CPU.

        python3 train.py --name small --recipe small --norm_type LN --fp16

    0.026 PFLOP: 76.5 % on CIFAR-10, in eight minutes on one core of an AMD EPYC (Zen 4, busy).
    One run each, on one core of an AMD EPYC (Zen 5 or Zen 4, with bf16 units):
    0.015 PFLOP, --num_steps 1800 --warmup_steps 90: LN 70.4 % in 4.5 minutes, RescaleNet 71.6 %;
    0.040 PFLOP, --num_steps 4880 --warmup_steps 244: LN 78.8 % in 6.3 minutes, BN 80.7 %.
    BN with --set patch_dropout=0.5 --learning_rate 0.01 and 10,600 steps: 82.3 % in 0.040 PFLOP.
    ViT-96x4_4 with 26,900 steps of 64 images: 86.1 % in 0.12 PFLOP (docs/results.md).
    """
    recipe = reference()
    recipe.update(
        model_type="ViT-64x4_4",
        img_size=32,
        num_steps=3128,  # 8 epochs
        learning_rate=0.02,
        weight_decay=0.02,
        warmup_steps=156,  # 5 %
        decay_type="linear",
        eval_every=391,
        optimizer="muon",
        decay_all=False,
        crop="shift",
        flip=True,
        label_smoothing=0.1,
        dropout=0.0,
        pool="mean",
        positions="sincos",
        zero_head=True,
        zero_branches=True,
    )
    return recipe


def bench():
    """The comparison of all norm types, `sh train_small.sh`: `small`, cut to 0.0053 PFLOP a run.

        python3 train.py --name rates --recipe bench --norm_type LN --val_split 5000

    On one core of an AMD EPYC (Zen 5), about 1.4 minutes, without its evaluation. Test accuracy:
    LN 61.0 %, BN 67.1 %; the other types are in README.md.
    """
    recipe = small()
    recipe.update(num_steps=650, warmup_steps=65, eval_every=650)
    return recipe


def bench_adamw():
    """`bench` with AdamW: which findings hold with another optimizer?

        RECIPE=bench_adamw NORMS="LN BN DyT Derf ResPost SkipInit Post TFixup" sh train_small.sh

    0.0053 PFLOP a run, two minutes on one core of an AMD EPYC (Zen 4). Test accuracy: Post 55 %,
    TFixup 53 %, ResPost, BN and LN 52 %, SkipInit 51 %, DyT and Derf 49 %. Learning rate x weight
    decay is the same as in `bench`.
    """
    recipe = bench()
    recipe.update(optimizer="adamw", learning_rate=0.004, weight_decay=0.1)
    return recipe


def bench_no_warmup():
    """`bench` without a warmup: which norm types need one?

        python3 train.py --name rates_bench_no_warmup --recipe bench_no_warmup --norm_type Post \
          --learning_rate 0.02 --val_split 5000

    0.0053 PFLOP a run, two minutes on one core of an AMD EPYC (Zen 4). All five train as
    well as with one. On held-out images LN reached 62.7 % (with a warmup 62.1), Post 63.8 (62.6).
    """
    recipe = bench()
    recipe.update(warmup_steps=0)
    return recipe


def bench_12_blocks():
    """`bench` with 12 blocks instead of 4: 0.016 PFLOP a run.

        RECIPE=bench_12_blocks NORMS="LN DeepNorm LNS RescaleNet" sh train_small.sh

    Half a minute a run on an NVIDIA H100. Test accuracy: DeepNorm 63.6 %, LN and RescaleNet 62.9 %,
    LNS 60.3 %.
    """
    recipe = bench()
    recipe.update(model_type="ViT-64x12_4")
    return recipe


def bench_24_blocks():
    """`bench` with 24 blocks instead of 4: 0.03 PFLOP a run.

        RECIPE=bench_24_blocks NORMS="LN DeepNorm LNS RescaleNet" sh train_small.sh

    A minute a run on an NVIDIA H100. Test accuracy: DeepNorm 65.2 %, RescaleNet 64.0 %, LN 62.0 %,
    LNS 59.4 %.
    """
    recipe = bench()
    recipe.update(model_type="ViT-64x24_4")
    return recipe


def finetune():
    """Pretrained weights, at 112 px.

        python3 train.py --name tuned --recipe finetune --norm_type LN --pretrained_dir auto --fp16

    0.5 PFLOP, 25 minutes on one core of an AMD EPYC (Zen 5, with bf16 units). From pretrained
    weights LN reached 95.5 % on CIFAR-10 and 83.9 % on CIFAR-100; from scratch 47.3 % and 19.2 %.
    """
    recipe = reference()
    recipe.update(
        model_type="ViT-S_14",
        img_size=112,
        train_batch_size=64,
        num_steps=975,
        learning_rate=5e-5,
        weight_decay=0.01,
        warmup_steps=49,  # 5 %
        decay_type="linear",
        eval_every=195,
        optimizer="adamw",
        decay_all=False,
        head_factor=20.0,
        smallest_crop=0.5,
        flip=True,
        dropout=0.0,
        zero_head=True,
    )
    return recipe


PAGES = (reference, small, bench, bench_adamw, bench_no_warmup, bench_12_blocks, bench_24_blocks)
RECIPES = {page.__name__: page for page in (*PAGES, finetune)}

# Each optimizer's entries, with their values unless the recipe sets others. Muon trains the blocks'
# matrices; AdamW trains the rest, at adamw_factor times their learning rate.
OPTIMIZERS = {
    "sgd": {"momentum": 0.9},
    "adamw": {"betas": (0.9, 0.95)},
    "muon": {"momentum": 0.95, "betas": (0.9, 0.95), "adamw_factor": 0.15},
}
