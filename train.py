"""Train a Vision Transformer on CIFAR with the normalization of your choice.

python3 train.py --name demo --norm_type Rescale --model_type ViT-B_16 --fp16
torchrun --nproc_per_node 4 train.py --name demo --norm_type LN
"""

import os
import platform
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from models.modeling import CONFIGS, VisionTransformer
from models.norms import calibrating
from models.pretrained import PretrainedError, download, load_pretrained
from utils import dist_util
from utils.args import RunFiles, UsageError, parse_args, result_flags
from utils.checkpoint import CheckpointError, load_checkpoint, lock, save_checkpoint
from utils.data_utils import (
    DataError,
    Resizer,
    TestBatches,
    TrainBatches,
    load_dataset,
    to_rows,
)
from utils.precision import HALF_DTYPES, ApexPrecision, Precision
from utils.run_logger import RunLogger, read_log
from utils.scheduler import lr_table

MAX_SKIPPED = 50  # skipped steps in a row that end a run
EXIT_STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 0}


def main():
    args = parse_args()
    try:
        files = RunFiles(args)
        files.check_writable()
        device = dist_util.init(args)
        torch.use_deterministic_algorithms(args.deterministic)
        if args.eval:
            evaluate_checkpoint(args, files, device)
            return 0
        with lock(files.lock, active=dist_util.rank() == 0):
            return train(args, files, device)
    except (UsageError, DataError, PretrainedError, CheckpointError) as error:
        sys.stderr.write(f"train.py: error: {error}\n")
        return 2
    finally:
        dist_util.shutdown()


def train(args, files, device):
    """One run, from its start or its newest checkpoint to its end; returns the exit status."""
    saved = find_checkpoint(args, files)
    if saved == "finished":
        print(f"{files.log} is finished: nothing to do")
        return 0
    is_main = dist_util.rank() == 0
    stop = StopSignal()

    # The experiment: data, model, optimizer, schedule
    dataset = load_dataset(args.dataset, args.data_dir)
    model, loaded = make_model(args, len(dataset.classes), fresh=saved is None)
    model.to(device)
    precision = make_precision(args, model, device)
    optimizer = make_optimizer(args, precision)
    learning_rates = lr_table(
        args.decay_type, args.learning_rate, args.warmup_steps, args.num_steps
    ).to(device)
    resizer = Resizer(args.img_size, device, precision.input_dtype)
    share = (dist_util.rank(), dist_util.world_size())
    batch_size = args.train_batch_size // args.gradient_accumulation_steps
    batches = TrainBatches(dataset, batch_size, resizer, args.seed, device, *share)
    test_batches = TestBatches(dataset, args.eval_batch_size, resizer, device, *share)

    # Where it stands: `step` counts updates, `window` also those that were skipped
    run = {"step": 0, "window": 0, "evaluated": 0, "skipped_in_a_row": 0}
    run |= {"accuracy": 0.0, "best_accuracy": 0.0, "seconds": 0.0}
    if saved:
        precision.load_model_state_dict(saved["model"])
        precision.load_state_dict(saved["precision"])
        optimizer.load_state_dict(saved["optimizer"])
        run = saved["run"]
        optimizer.param_groups[0]["lr"] = torch.zeros((), device=device)
    log = RunLogger(files.log, files.tensorboard, is_main, run["step"] if saved else None)
    log_head(log, args, model, device, run["step"] if saved else None)
    for line in loaded:
        log.info(line)

    started = time.monotonic() - run["seconds"]
    parallel = dist_util.wrap(model)
    compiled = torch.compile(parallel) if args.compile else parallel
    eval_model = torch.compile(model) if args.compile else model
    last_step = min(args.num_steps, args.stop_after or args.num_steps)
    bar = tqdm(
        total=args.num_steps,
        initial=run["step"],
        unit="step",
        disable=not is_main or not sys.stderr.isatty(),
    )

    while True:  # do what is due at this step, then train up to the next step with something due
        step = run["step"]
        if run["evaluated"] < step and (step % args.eval_every == 0 or step == args.num_steps):
            log.info("***** Running Validation *****")
            log.info(f"  Num steps = {len(test_batches)}")
            log.info(f"  Batch size = {args.eval_batch_size}")
            result = evaluate(eval_model, test_batches, precision, stop)
            if result:
                loss, run["accuracy"] = result
                run["evaluated"] = step
                log.log_evaluation(step, loss, run["accuracy"])
                log.scalars(step, {"test/loss": loss, "test/accuracy": run["accuracy"]})
                if run["accuracy"] > run["best_accuracy"]:
                    run["best_accuracy"] = run["accuracy"]
                    save_weights(files.best, precision, run, args)
                    log.info(f"Saved model checkpoint to [DIR: {args.output_dir}]")
        if stop.agreed() or step == last_step or (step and step % args.save_every == 0):
            run["seconds"] = time.monotonic() - started
            save_run(files, precision, optimizer, run, args)
        if stop.agreed() or step == last_step:
            break

        due = min(
            last_step,
            *(step - step % n + n for n in (args.eval_every, args.save_every, args.log_every)),
        )
        began = time.monotonic()
        model.train()
        for _ in range(due - step):
            # All randomness of a step comes from the seed and the step's place in the data.
            seed_step(args.seed, run["window"])
            precision.start_step()
            for part in range(args.gradient_accumulation_steps):
                images, labels = batches(run["window"] * args.gradient_accumulation_steps + part)
                with precision.autocast():
                    loss = (parallel if calibrating(model) else compiled)(images, labels)
                precision.backward(loss, args.gradient_accumulation_steps)
            precision.step(optimizer, learning_rates, args.max_grad_norm)
            run["window"] += 1
            if stop.received and dist_util.world_size() == 1:
                break

        records = precision.read()
        images_per_s = len(records) * args.train_batch_size * dist_util.world_size()
        images_per_s /= time.monotonic() - began
        check_finite(records, precision, run, batches, args, files, log)
        log_steps(log, records, images_per_s)
        run["step"] = records[-1].updates
        bar.update(run["step"] - step)
        bar.set_postfix_str(f"loss {records[-1].loss:.4f}, {images_per_s:.0f} images/s")

    bar.close()
    if stop.agreed():
        log.info(f"Stopped at step {step} by {stop.name}; --resume continues")
    elif step < args.num_steps:
        log.info(f"Stopped after step {step} of {args.num_steps}; --resume continues")
    else:
        save_weights(files.final, precision, run, args)
        log.hparams(result_flags(args), {"best_accuracy": run["best_accuracy"]})
        log.log_end(run["best_accuracy"], run["seconds"] / 60)
    log.close()
    return stop.exit_status


@torch.inference_mode()
def evaluate(model, test_batches, precision, stop=None):
    """Mean cross entropy and accuracy in [0, 1] over all test images; None if a signal stopped it."""
    model.eval()
    sums = []
    for images, labels in test_batches:
        with precision.autocast():
            logits, _ = model(images)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        correct = (logits.argmax(dim=1) == labels).sum()
        sums.append(torch.stack([loss, correct.float(), loss.new_tensor(len(labels))]))
        if stop and stop.received and dist_util.world_size() == 1:
            return None
    loss, correct, count = dist_util.sum_over_processes(torch.stack(sums).cpu().double().sum(0))
    return (loss / count).item(), (correct / count).item()


def evaluate_checkpoint(args, files, device):
    """Evaluate the run's best weights and draw its figures."""
    from plot_acc_loss import plot_log
    from plot_attn import plot_attention

    saved = load_checkpoint(files.best)
    dataset = load_dataset(args.dataset, args.data_dir)
    model, _ = make_model(args, len(dataset.classes), fresh=False)
    try:
        model.load_state_dict(saved["model"])
    except RuntimeError:
        raise CheckpointError(f"{files.best} holds another model than the flags name") from None
    model.to(device)
    precision = make_precision(args, model, device)
    resizer = Resizer(args.img_size, device, precision.input_dtype)
    loss, accuracy = evaluate(
        model, TestBatches(dataset, args.eval_batch_size, resizer, device), precision
    )
    print(f"Valid Loss: {loss:.5f}\nValid Accuracy: {accuracy:.5f}")
    plot_log(files.log, Path("img/plot_acc_loss"))
    attending, _ = make_model(args, len(dataset.classes), fresh=False, vis=True)
    attending.load_state_dict(saved["model"])
    image = Resizer(args.img_size)(to_rows(dataset.test_images[:1]))
    plot_attention(attending, image, args.norm_type, (0, 3, 6, 9), Path("img/plot_attn"))


def make_model(args, num_classes, fresh, vis=False):
    """The model as the flags want it, and the log lines of what was loaded into a fresh one."""
    torch.manual_seed(args.seed)
    model = VisionTransformer(
        CONFIGS[args.model_type],
        args.img_size,
        args.norm_type,
        num_classes=num_classes,
        zero_head=bool(args.pretrained_dir),
        vis=vis,
    )
    if not (fresh and args.pretrained_dir):
        return model, []
    source = args.pretrained_dir
    if source == "auto":
        source = download(args.model_type)
    return model, load_pretrained(model, source)


def make_precision(args, model, device):
    half_dtype = args.half_dtype
    if half_dtype == "auto":
        half_dtype = "fp16" if device.type == "cuda" else "bf16"
    level = args.fp16_opt_level if args.fp16 else "O0"
    backend = ApexPrecision if args.fp16 and args.amp_backend == "apex" else Precision
    return backend(model, level, HALF_DTYPES[half_dtype], args.loss_scale)


def make_optimizer(args, precision):
    device = precision.device
    optimizer = torch.optim.SGD(
        precision.masters,
        lr=torch.zeros((), device=device),  # on the device: the schedule is looked up there
        momentum=0.9,
        weight_decay=args.weight_decay,
        fused=True,
    )
    for p in precision.masters:  # else a skipped first step would leave them uninitialized
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def seed_step(seed, window):
    """Seed dropout's generator for one step of this process."""
    entropy = np.random.SeedSequence([seed, window, dist_util.rank()])
    torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0]))


def find_checkpoint(args, files):
    """What to go on from: a checkpoint's content, None for the start, or "finished"."""
    if not args.resume:
        existing = [path for path in (*files.steps(), files.best, files.final) if path.exists()]
        if existing and not args.overwrite:
            raise UsageError(
                f"this run exists ({existing[0]}): --resume continues it, --overwrite starts anew"
            )
        for path in existing:
            path.unlink()
        return None
    if args.resume == "auto" and files.log.exists() and read_log(files.log).finished:
        return "finished"
    for path in files.steps() if args.resume == "auto" else [Path(args.resume)]:
        try:
            saved = load_checkpoint(path, digest_required=True)
        except CheckpointError as error:
            if args.resume != "auto":
                raise
            sys.stderr.write(f"train.py: warning: {error}; trying the one before\n")
            continue
        check_flags(args, saved, path)
        return saved
    return None


def check_flags(args, saved, path):
    """Raise UsageError if `path` does not continue a run of these flags."""
    if "run" not in saved:
        raise UsageError(f"--resume {path}: holds weights only, a run cannot continue from it")
    ours, theirs = result_flags(args), saved["flags"]
    differing = {k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k)}
    if "num_steps" in differing and ours["num_steps"] > theirs["num_steps"]:
        # The schedule depends on num_steps after the warmup only.
        if saved["run"]["step"] <= args.warmup_steps:
            differing.remove("num_steps")
    if differing:
        texts = (f"--{k} {ours.get(k)} (there {theirs.get(k)})" for k in sorted(differing))
        raise UsageError(f"--resume {path}: the run was made with other flags: {', '.join(texts)}")


def save_run(files, precision, optimizer, run, args):
    """Save all that the run needs to continue; keep the newest two such checkpoints."""
    if dist_util.rank() == 0:
        content = {
            "model": precision.model_state_dict(),
            "precision": precision.state_dict(),
            "optimizer": optimizer.state_dict(),
            "run": run,
            "flags": result_flags(args),
        }
        save_checkpoint(content, files.step(run["step"]))
        for old in files.steps()[2:]:
            old.unlink(missing_ok=True)
    dist_util.barrier()


def save_weights(path, precision, run, args):
    """Save the weights alone, in fp32, with what they reached."""
    if dist_util.rank() == 0:
        content = {"model": precision.model_state_dict(), "flags": result_flags(args)}
        save_checkpoint(content | {"step": run["step"], "accuracy": run["accuracy"]}, path)


def check_finite(records, precision, run, batches, args, files, log):
    """Log skipped steps; raise UsageError where the run cannot go on."""
    first = run["window"] - len(records)
    for window, record in enumerate(records, first):
        run["skipped_in_a_row"] = 0 if record.finite else run["skipped_in_a_row"] + 1
        if record.finite:
            continue
        log.info(
            f"Skipped step {record.updates + 1}: loss {record.loss}, gradient norm"
            f" {record.grad_norm}, loss scale {record.loss_scale:g}"
        )
        if precision.scaled and run["skipped_in_a_row"] < MAX_SKIPPED:
            continue
        accumulation = args.gradient_accumulation_steps
        parts = range(window * accumulation, (window + 1) * accumulation)
        indices = torch.cat([batches.indices(i) for i in parts]).tolist()
        good = files.steps()
        log.info(f"Training images of that step: {indices}")
        raise UsageError(
            f"step {record.updates + 1} is not finite (loss {record.loss}, gradient norm"
            f" {record.grad_norm}); its images' indices are in {files.log}; last good checkpoint:"
            f" {good[0] if good else 'none'}"
        )


def log_head(log, args, model, device, resumed_step):
    """What the log begins with, or goes on with: flags, versions, device, parameters, commit."""
    if resumed_step is not None:
        log.info(f"Resumed from step {resumed_step}")
        return
    log.warning(
        f"Process rank: {args.local_rank}, device: {device}, n_gpu: {torch.cuda.device_count()},"
        f" distributed training: {dist_util.world_size() > 1}, 16-bits training: {args.fp16}"
    )
    log.info(str(CONFIGS[args.model_type]))
    log.info(f"Training parameters {args}")
    parameters = sum(p.numel() for p in model.parameters())
    log.info(f"Total Parameter: \t{parameters / 1e6:.1f}M")
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "numpy"))
    git = subprocess.run(
        ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
    )
    log.info(
        f"Environment: Python {platform.python_version()}, {packages}, {platform.processor() or platform.machine()},"
        f" {torch.get_num_threads()} threads, commit {git.stdout.strip() or 'unknown'}"
    )
    log.info("***** Running training *****")
    log.info(f"  Total optimization steps = {args.num_steps}")
    log.info(
        f"  Instantaneous batch size per GPU = {args.train_batch_size // args.gradient_accumulation_steps}"
    )
    log.info(
        "  Total train batch size (w. parallel, distributed & accumulation) ="
        f" {args.train_batch_size * dist_util.world_size()}"
    )
    log.info(f"  Gradient Accumulation steps = {args.gradient_accumulation_steps}")
    log.text("flags", str(args))


def log_steps(log, records, images_per_s):
    for record in records:
        if record.finite:
            log.scalars(
                record.updates,
                {
                    "train/loss": record.loss,
                    "train/lr": record.learning_rate,
                    "train/grad_norm": record.grad_norm,
                    "train/loss_scale": record.loss_scale,
                },
            )
    log.scalars(records[-1].updates, {"train/images_per_s": images_per_s})


class StopSignal:
    """SIGTERM, SIGINT or SIGUSR1 asks to stop after the step; a second one stops at once."""

    def __init__(self):
        self.received = None
        for number in EXIT_STATUS:
            signal.signal(number, self._handle)

    def _handle(self, number, frame):
        if self.received:
            os._exit(128 + number)
        self.received = number

    def agreed(self):
        """Whether any process was asked to stop; all processes must call it."""
        return dist_util.any_process(self.received is not None)

    @property
    def name(self):
        return signal.Signals(self.received or signal.SIGTERM).name

    @property
    def exit_status(self):
        return EXIT_STATUS[self.received] if self.received else 0


if __name__ == "__main__":
    sys.exit(main())
