"""Runs the repository's programs as their user does."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# A whole run in seconds: 1,437 training images, two evaluations. A flag given again wins.
TINY = (
    "--name tiny --dataset digits --model_type ViT-Ti_16 --img_size 16 --train_batch_size 16"
    " --learning_rate 0.02 --warmup_steps 5 --num_steps 12 --eval_every 6"
).split()


def environment(env=None):
    """This process's environment with `env` on top; one thread unless it says otherwise."""
    return {"OMP_NUM_THREADS": "1", **os.environ, **(env or {})}


def run(args, cwd, check=True, env=None, timeout=300, program="train.py", **kwargs):
    """Runs a program of the repository in the folder `cwd`; `check`: it must exit with 0."""
    done = subprocess.run(
        [sys.executable, str(ROOT / program), *args],
        cwd=cwd,
        env=environment(env),
        timeout=timeout,
        capture_output=True,
        text=True,
        **kwargs,
    )
    assert not check or done.returncode == 0, f"exit status {done.returncode}\n{done.stderr}"
    return done
