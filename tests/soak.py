"""Kills a real CIFAR-10 run again and again, and compares its end with one that was left alone.

    python tests/soak.py --kills 100 --terms 20

Each life of the run is the same command with --resume. It ends at a random moment by kill -9 or
SIGTERM; when the run reaches its end before all of these are used up, a new run begins.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utils.run_logger import read_log  # noqa: E402

RUN = (
    "--name soak --dataset cifar10 --model_type ViT-Ti_16 --img_size 32 --norm_type Rescale --fp16"
    " --train_batch_size 64 --learning_rate 0.02 --warmup_steps 20 --num_steps 400 --eval_every 50"
    " --save_every 5 --log_every 5"
).split()


def start(folder, data_dir):
    command = [sys.executable, str(ROOT / "train.py"), *RUN, "--data_dir", data_dir, "--resume"]
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def outcome(folder):
    """What must not depend on interruptions: the final files' bytes and the log's numbers."""
    log = read_log(next(folder.glob("output/*.txt")))
    files = [next(folder.glob(f"output/*_{kind}.bin")) for kind in ("final", "checkpoint")]
    return [file.read_bytes() for file in files], log.steps, log.loss, log.accuracy, log.finished


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--terms", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data_dir", default=str(ROOT / "data"))
    args = parser.parse_args()
    data_dir = str(Path(args.data_dir).resolve())
    rng = random.Random(args.seed)
    ends = ["kill"] * args.kills + ["term"] * args.terms
    rng.shuffle(ends)
    counts = {"kill": 0, "term": 0, "in a save": 0, "before training": 0, "runs": 0, "lives": 0}
    began = time.monotonic()

    with tempfile.TemporaryDirectory() as top:
        whole = Path(top, "whole")
        whole.mkdir()
        process = start(whole, data_dir)
        errors = process.communicate()[1]
        assert process.returncode == 0, errors
        truth = outcome(whole)

        while ends:
            folder = Path(top, f"run{counts['runs']}")
            folder.mkdir()
            counts["runs"] += 1
            while True:
                process = start(folder, data_dir)
                counts["lives"] += 1
                limit = rng.uniform(1, 15) if ends else None
                try:
                    errors = process.communicate(timeout=limit)[1]
                except subprocess.TimeoutExpired:
                    kind = ends.pop()
                    process.terminate() if kind == "term" else process.kill()
                    errors = process.communicate()[1]
                    counts[kind] += 1
                    counts["in a save"] += any(folder.glob("output/*.part"))
                    counts["before training"] += "Resumed from" not in errors
                    allowed = {"kill": (-9,), "term": (143, -15)}[kind]  # -15: still importing
                    assert process.returncode in (0, *allowed), errors
                    continue
                assert process.returncode == 0, errors
                break
            assert outcome(folder) == truth, f"{folder} ended differently"
            print(f"{time.monotonic() - began:.0f} s: {counts}, all ends equal", flush=True)
    print(
        f"soak: {counts['kill']} kill -9 and {counts['term']} SIGTERM over {counts['runs']} runs"
        f" ({counts['lives']} lives), {counts['in a save']} in the middle of a save: nothing lost"
    )


if __name__ == "__main__":
    main()
