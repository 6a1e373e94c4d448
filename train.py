"""Train a Vision Transformer on CIFAR with the normalization of your choice.

python3 train.py --name demo --norm_type Rescale --model_type ViT-B_16 --fp16
torchrun --nproc_per_node 4 train.py --name demo --norm_type LN
"""

import os
import sys
import time

import numpy as np
import torch
from tqdm import tqdm

from models.configs import model_config
from models.download import download
from models.fast_cpu import accelerate, has_bf16_units
from models.modeling import build_model
from models.norms import MEASURING_STEPS
from models.pretrained import load_pretrained
from utils import dist_util
from utils.args import parse_args
from utils.augmentation import Augmentation
from utils.checkpoint import find_checkpoint, lock, restore, save_run, save_weights
from utils.data_utils import Resizer, TestBatches, TrainBatches, hold_out, load_dataset
from utils.divergence import check_finite
from utils.errors import reported
from utils.evaluation import evaluate, evaluate_run
from utils.flops import training_pflop
from utils.log_reader import is_finished
from utils.optimizers import make_optimizers
from utils.precision import HALF_DTYPES, ApexPrecision, Precision
from utils.run_files import RunFiles, result_flags
from utils.run_logger import RunLogger
from utils.scheduler import SCHEDULES, patch_dropout_steps
from utils.signal_stats import IMAGES as SIGNAL_IMAGES
from utils.signal_stats import signal_scalars
from utils.stop_signal import StopSignal


@reported
def main():
    args = parse_args()
    files = RunFiles(args)
    files.check_writable()
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by cuBLAS
        torch.use_deterministic_algorithms(True)
    try:
        device = dist_util.init(args)
        if args.eval:
            return evaluate_run(args, files, device, *precision_of(args, device))
        stop = StopSignal()
        with lock(files):
            return train(args, files, device, stop)
    finally:
        dist_util.shutdown()


def train(args, files, device, stop):
    """One run, from its start or its newest checkpoint to its end; returns the exit status."""
    if args.resume == "auto" and is_finished(files.log):
        print(f"{files.log} is finished: nothing to do")
        return 0
    saved, notes = find_checkpoint(args, files)

    # The experiment: data, model, optimizer, schedule
    with dist_util.main_first():
        dataset = hold_out(load_dataset(args.dataset, args.data_dir), args.val_split)
    torch.manual_seed(args.seed)
    model = build_model(args, len(dataset.classes))
    if args.pretrained_dir and not saved:
        with dist_util.main_first():
            auto = args.pretrained_dir == "auto"
            weights_file = download(args.model_type) if auto else args.pretrained_dir
        notes += load_pretrained(model, weights_file, args.position_resize)
    model.transformer.encoder.grad_checkpointing = args.grad_checkpointing
    model.to(device)
    level, half_dtype = precision_of(args, device)
    backend = ApexPrecision if args.fp16 and args.amp_backend == "apex" else Precision
    precision = backend(model, level, half_dtype, args.loss_scale)
    precision.attach(make_optimizers(args, precision.named_masters()), args.ema)
    kernels = accelerate(model, args.compile) if args.cpu_kernels == "auto" else "PyTorch's layers"
    machine = f"{level} in {half_dtype or torch.float32}, {kernels}".replace("torch.", "")

    def learning_rate(step):
        factor = SCHEDULES[args.decay_type](step, args.warmup_steps, args.num_steps)
        return args.learning_rate * factor

    resizer = Resizer(args.img_size, device, precision.input_dtype)
    processes = (dist_util.rank(), dist_util.world_size())
    parts = args.gradient_accumulation_steps
    images_per_step = args.train_batch_size * dist_util.world_size()
    augmentation = Augmentation(args, resizer, len(dataset.classes))
    batches = TrainBatches(
        dataset, args.train_batch_size // parts, augmentation, args.seed, device, *processes
    )
    test_batches = TestBatches(dataset, args.eval_batch_size, resizer, device, *processes)

    # The state of the run
    run = {"step": 0, "skipped_in_a_row": 0, "machine": machine}
    run |= {"seconds": 0.0, "seconds_of_training": 0.0}
    run |= {"evaluated": 0, "accuracy": 0.0, "best_accuracy": 0.0}
    if saved:
        run, changes = restore(saved, precision, machine, files)
        notes += changes
    saved_at = (run["step"], run["evaluated"]) if saved else None  # of the newest checkpoint
    if args.fp16 and args.half_dtype == "auto" and half_dtype is None:
        notes.append("--fp16 computes in fp32 here: no bf16 units; --half_dtype bf16 forces bf16")
    if args.warmup_steps > args.num_steps:
        notes.append(f"The warmup of {args.warmup_steps} steps is longer than the run")
    if args.overwrite and dist_util.is_main():  # only now that all the new run needs is loaded
        for path in files.checkpoints():
            path.unlink()
    log = RunLogger(files.log, files.tensorboard, dist_util.is_main(), saved)
    pflop = training_pflop(args, len(dataset.classes)) if dist_util.is_main() else 0.0
    if log.is_new:
        log.log_head(args, model_config(args), model, device, dist_util.world_size(), machine)
        log.info(f"Compute: {pflop:.6f} PFLOP")
    if saved:
        log.log_resumed(run["step"])
    for note in notes:
        log.info(note)

    parallel = dist_util.wrap(model)
    # dynamic=False: what is compiled for a batch must not depend on the batches seen before it.
    compiled = torch.compile(parallel, dynamic=False) if args.compile else parallel
    eval_model = torch.compile(model, dynamic=False) if args.compile else model
    first = run["step"]
    last = max(first, min(args.num_steps, args.stop_after or args.num_steps))
    log.say_plan(args, dataset, model, machine, pflop, run, last)
    quiet = not (dist_util.is_main() and sys.stderr.isatty())
    bar = tqdm(total=args.num_steps, initial=first, unit="step", miniters=1, disable=quiet)
    began = time.monotonic() - run["seconds"]
    last_read = first  # the step up to which the losses have been read

    def evaluate_and_log(step):
        forward = eval_model if step >= MEASURING_STEPS else model
        with precision.averaged():
            result = evaluate(forward, test_batches, precision, stop)
            if not result:  # asked to stop
                return
            loss, run["accuracy"] = result
            run["evaluated"] = step
            log.log_evaluation(step, len(test_batches), args.eval_batch_size, loss, run["accuracy"])
            log.scalars(step, {"test/loss": loss, "test/accuracy": run["accuracy"]})
            if args.log_signal and dist_util.is_main():
                images, labels = test_batches.first(SIGNAL_IMAGES)
                log.attention(step, model, images)
                log.scalars(step, signal_scalars(model, images, labels))
            if run["accuracy"] > run["best_accuracy"]:
                run["best_accuracy"] = run["accuracy"]
                if dist_util.is_main():
                    save_weights(files.best, precision, run, args)
                log.info(f"Saved model checkpoint to [DIR: {args.output_dir}]")

    for step in range(first, last + 1):  # `step` steps have been taken, skipped ones included
        run["step"] = step
        if step > run["evaluated"] and (step % args.eval_every == 0 or step == args.num_steps):
            evaluate_and_log(step)

        losses_are_read = step == last_read
        stopping = losses_are_read and stop.agreed()
        if stopping or step == last or (step > 0 and step % args.save_every == 0):
            run["seconds"] = time.monotonic() - began
            if dist_util.is_main() and saved_at != (step, run["evaluated"]):
                save_run(files, precision, run, args)
            saved_at = step, run["evaluated"]
        if stopping or step == last:
            break

        if losses_are_read:
            last_read_at = time.monotonic()
        model.train()
        model.transformer.embeddings.patch_dropout.active = step < patch_dropout_steps(args)
        seed_step(args.seed, step)
        forward = compiled if step >= MEASURING_STEPS else parallel
        for part in range(parts):
            images, labels = batches(step * parts + part)
            with precision.autocast():
                loss = forward(images, labels)
            precision.backward(loss, parts)
        precision.clip(args.max_grad_norm)
        precision.update(learning_rate(step + 1))
        stop.began = True

        # Read the losses and log when due: the only wait for the device.
        done = step + 1
        periods = (args.log_every, args.eval_every, args.save_every)
        if stop.now or done == last or any(done % period == 0 for period in periods):
            records = precision.read()
            seconds = time.monotonic() - last_read_at
            run["seconds_of_training"] += seconds
            images_per_s = len(records) * images_per_step / seconds
            log.log_steps(done, records, images_per_s)
            check_finite(run, done, records, precision, batches, parts, log, files)
            text = f"loss {records[-1].loss:.4f}, {images_per_s:.0f} images/s"
            bar.set_postfix_str(text, refresh=False)
            bar.update(done - last_read)
            log.say_time_left(done, last_read, images_per_s)
            last_read = done

    bar.close()
    if step == args.num_steps and not stopping:
        with precision.averaged():
            if dist_util.is_main():
                save_weights(files.final, precision, run, args)
        log.hparams(result_flags(args), {"hparams/best_accuracy": run["best_accuracy"]})
        images_per_s = args.num_steps * images_per_step / run["seconds_of_training"]
        log.log_end(run["best_accuracy"], run["seconds"] / 60, images_per_s)
        log.say_next(files)
    else:
        reason = f" by {stop.received.name}" if stop.received else ""
        log.info(f"Stopped{reason} after step {step} of {args.num_steps}; --resume continues")
    log.close()
    return stop.exit_status


def precision_of(args, device):
    """The level and the half type, or None, that the flags select on this device."""
    if not args.fp16:
        return "O0", None
    half = args.half_dtype
    if half == "auto":
        half = {"cuda": "fp16", "mps": "bf16"}.get(device.type)
        half = half or ("bf16" if has_bf16_units() else None)
    return (args.fp16_opt_level, HALF_DTYPES[half]) if half else ("O0", None)


def seed_step(seed, step):
    """All randomness of a step comes from the seed, the step and the process."""
    entropy = np.random.SeedSequence([seed, step, dist_util.rank()])
    torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0]))


if __name__ == "__main__":
    dist_util.leave(main())
