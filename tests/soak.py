"""Kills a real CIFAR-10 run again and again, and compares its end with one that was left alone.

    python tests/soak.py --kills 100 --terms 20

Each life of the run is the same command with --resume. It ends at a random moment by kill -9 or
SIGTERM; when the run reaches its end before all of these are used up, a new run begins.
"""

import argparse
import random
import subprocess
import tempfile
import time
from pathlib import Path

from programs import DATA
from runs import left, start

RUN = (
    "--name soak --dataset cifar10 --model_type ViT-Ti_16 --img_size 32 --norm_type Rescale --fp16"
    " --train_batch_size 64 --learning_rate 0.02 --warmup_steps 20 --num_steps 400 --eval_every 50"
    " --save_every 5 --log_every 5 --resume --data_dir"
).split()


def outcome(folder):
    """What must not depend on interruptions: the final weights' bytes and the log."""
    found = left(folder)
    return found["weights"], found["log"]


def live(command, folder, limit, kind):
    """One life of the run, ended after `limit` seconds; returns whether it ended by itself before.

    Also returns what it printed on stderr.
    """
    process = start(command, folder)
    try:
        errors = process.communicate(timeout=limit)[1]
        by_itself = True
    except subprocess.TimeoutExpired:
        process.terminate() if kind == "term" else process.kill()
        errors = process.communicate()[1]
        by_itself = False
    allowed = {"kill": (-9,), "term": (143, -15)}.get(kind, ())  # -15: it was still importing
    assert process.returncode == 0 or not by_itself and process.returncode in allowed, errors
    return by_itself, errors


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--terms", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data_dir", type=Path, default=DATA)
    args = parser.parse_args()
    command = [*RUN, str(args.data_dir.resolve())]
    rng = random.Random(args.seed)
    ends = ["kill"] * args.kills + ["term"] * args.terms
    rng.shuffle(ends)
    counts = {"kill": 0, "term": 0, "in a save": 0, "before training": 0, "runs": 0, "lives": 0}
    began = time.monotonic()

    with tempfile.TemporaryDirectory() as top:
        whole = Path(top, "whole")
        whole.mkdir()
        live(command, whole, None, None)
        truth = outcome(whole)

        while ends:
            folder = Path(top, f"run{counts['runs']}")
            folder.mkdir()
            counts["runs"] += 1
            by_itself = False
            while not by_itself:
                kind, limit = (ends[-1], rng.uniform(1, 15)) if ends else (None, None)
                by_itself, errors = live(command, folder, limit, kind)
                counts["lives"] += 1
                if not by_itself:
                    counts[ends.pop()] += 1
                    counts["in a save"] += any(folder.glob("output/*.part"))
                    counts["before training"] += "Resumed from" not in errors
            assert outcome(folder) == truth, f"{folder} ended differently"
            print(f"{time.monotonic() - began:.0f} s: {counts}, all ends equal", flush=True)
    print(
        f"soak: {counts['kill']} kill -9 and {counts['term']} SIGTERM over {counts['runs']} runs"
        f" ({counts['lives']} lives), {counts['in a save']} in the middle of a save: nothing lost"
    )


if __name__ == "__main__":
    main()
