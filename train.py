"""Train a Vision Transformer on CIFAR with the normalization of your choice.

python3 train.py --name demo --norm_type Rescale --model_type ViT-B_16 --fp16
torchrun --nproc_per_node 4 train.py --name demo --norm_type LN
"""

import os
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from models.layers import packed_weights
from models.modeling import CONFIGS, VisionTransformer
from models.norms import calibrating
from models.pretrained import PretrainedError, download, load_pretrained
from utils import dist_util
from utils.args import RunFiles, UsageError, parse_args, result_flags
from utils.checkpoint import (
    CheckpointError,
    find_checkpoint,
    load_checkpoint,
    load_weights,
    lock,
    save_run,
    save_weights,
)
from utils.data_utils import DataError, Resizer, TestBatches, TrainBatches, load_dataset, resize
from utils.dist_util import DeviceError
from utils.precision import HALF_DTYPES, ApexPrecision, Precision
from utils.run_logger import RunLogger, read_log
from utils.scheduler import lr_table
from utils.stop_signal import StopSignal

MAX_SKIPPED = 50  # skipped steps in a row that end a run
OUT_OF_MEMORY = "out of memory|allocate memory|bad_alloc"  # PyTorch has one type for GPUs only


def main():
    args = parse_args()
    stop = None if args.eval else StopSignal()
    sys.stdout.reconfigure(errors="backslashreplace")  # a path need not be text; stderr does so
    try:
        files = RunFiles(args)
        files.check_writable()
        if args.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # asked for by cuBLAS
            torch.use_deterministic_algorithms(True)
        device = dist_util.init(args)
        if args.fp16 and args.half_dtype == "auto":
            args.half_dtype = "fp16" if device.type == "cuda" else "bf16"
        if args.eval:
            evaluate_run(args, files, device)
            return 0
        main_process = dist_util.is_main()
        with lock(files.lock, main_process), lock(files.tensorboard_lock, main_process):
            return train(args, files, device, stop)
    except (UsageError, DataError, PretrainedError, CheckpointError, DeviceError) as error:
        sys.stderr.write(f"train.py: error: {error}\n")
    except OSError as error:
        sys.stderr.write(f"train.py: error: {error.filename or 'file'}: {error.strerror}\n")
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or re.search(OUT_OF_MEMORY, str(error))):
            raise
        sys.stderr.write(
            "train.py: error: not enough memory: lower --train_batch_size, --eval_batch_size or"
            " --img_size, raise --gradient_accumulation_steps, or use --grad_checkpointing\n"
        )
    except KeyboardInterrupt:
        return 130
    finally:
        dist_util.shutdown()
    return 2


def train(args, files, device, stop):
    """One run, from its start or its newest checkpoint to its end; returns the exit status."""
    if args.resume == "auto" and is_finished(files.log):
        print(f"{files.log} is finished: nothing to do")
        return 0
    saved, notes = find_checkpoint(args, files)

    # The experiment: data, model, optimizer, schedule
    with dist_util.main_first():
        dataset = load_dataset(args.dataset, args.data_dir)
    model = make_model(args, len(dataset.classes))
    if args.pretrained_dir and not saved:
        with dist_util.main_first():
            auto = args.pretrained_dir == "auto"
            weights_file = download(args.model_type) if auto else args.pretrained_dir
        notes += load_pretrained(model, weights_file)
    model.transformer.encoder.grad_checkpointing = args.grad_checkpointing
    model.to(device)
    precision = make_precision(args, model)
    precision.attach(make_optimizer(args, precision))
    learning_rates = lr_table(
        args.decay_type, args.learning_rate, args.warmup_steps, args.num_steps
    ).to(device)
    resizer = Resizer(args.img_size, device, precision.input_dtype)
    share = (dist_util.rank(), dist_util.world_size())
    batch_size = args.train_batch_size // args.gradient_accumulation_steps
    batches = TrainBatches(dataset, batch_size, resizer, args.seed, device, *share)
    test_batches = TestBatches(dataset, args.eval_batch_size, resizer, device, *share)

    # Where it stands: `step` counts updates, `window` also the steps that were skipped
    run = {"step": 0, "window": 0, "skipped": 0, "skipped_in_a_row": 0, "seconds": 0.0}
    run |= {"evaluated": 0, "accuracy": 0.0, "best_accuracy": 0.0}
    if saved:
        run = restore(saved, precision)
        if not files.best.exists():  # as it is where --resume FILE goes on under another name
            run["best_accuracy"] = 0.0
    is_saved = (run["step"], run["evaluated"]) if saved else None
    if args.overwrite and dist_util.is_main():  # only now: all that the new run needs is at hand
        for path in files.checkpoints():
            path.unlink()
    began = time.monotonic() - run["seconds"]
    log = RunLogger(files.log, files.tensorboard, dist_util.is_main(), run if saved else None)
    if log.is_new:
        log.log_head(args, CONFIGS[args.model_type], model, device, dist_util.world_size())
    if saved:
        log.log_resumed(run["step"])
    for note in notes:
        log.info(note)

    parallel = dist_util.wrap(model)
    # dynamic=False: what is compiled for a batch must not depend on the batches seen before it.
    compiled = torch.compile(parallel, dynamic=False) if args.compile else parallel
    eval_model = torch.compile(model, dynamic=False) if args.compile else model
    last_step = min(args.num_steps, args.stop_after or args.num_steps)
    quiet = not (dist_util.is_main() and sys.stderr.isatty())
    bar = tqdm(total=args.num_steps, initial=run["step"], unit="step", disable=quiet)

    while True:  # do what is due at this step, then train up to the next step with something due
        step = run["step"]
        evaluation_due = step % args.eval_every == 0 or step == args.num_steps
        if evaluation_due and step > run["evaluated"]:
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
                    if dist_util.is_main():
                        save_weights(files.best, precision, run, args)
                    log.info(f"Saved model checkpoint to [DIR: {args.output_dir}]")

        stopping = stop.agreed()
        run["seconds"] = time.monotonic() - began
        saving_due = stopping or step >= last_step or (step > 0 and step % args.save_every == 0)
        if saving_due and is_saved != (step, run["evaluated"]):
            is_saved = step, run["evaluated"]
            if dist_util.is_main():
                save_run(files, precision, run, args)
        if stopping or step >= last_step:
            break

        periods = (args.eval_every, args.save_every, args.log_every)
        due = min(last_step, *(step - step % period + period for period in periods))
        started = time.monotonic()
        model.train()
        for _ in range(due - step):
            seed_step(args.seed, run["window"])
            precision.start_step()
            for part in range(args.gradient_accumulation_steps):
                images, labels = batches(run["window"] * args.gradient_accumulation_steps + part)
                with precision.autocast():
                    loss = (parallel if calibrating(model) else compiled)(images, labels)
                precision.backward(loss, args.gradient_accumulation_steps)
            precision.step(learning_rates, args.max_grad_norm)
            run["window"] += 1
            if stop.now:
                break

        records = precision.read()  # the only place where training waits for the device
        images_per_s = len(records) * args.train_batch_size * dist_util.world_size()
        images_per_s /= time.monotonic() - started
        check_finite(records, run, precision, batches, args.gradient_accumulation_steps, files, log)
        log.log_steps(records, images_per_s)
        run["step"] = records[-1].updates
        bar.update(run["step"] - step)
        bar.set_postfix_str(f"loss {records[-1].loss:.4f}, {images_per_s:.0f} images/s")

    bar.close()
    if step == args.num_steps and not stopping:
        if dist_util.is_main():
            save_weights(files.final, precision, run, args)
        log.hparams(result_flags(args), {"hparams/best_accuracy": run["best_accuracy"]})
        log.log_end(run["best_accuracy"], run["seconds"] / 60)
    else:
        reason = f" by {stop.received.name}" if stop.received else ""
        log.info(f"Stopped{reason} after step {step} of {args.num_steps}; --resume continues")
    log.close()
    return stop.exit_status


@torch.inference_mode()
def evaluate(model, test_batches, precision, stop=None):
    """Mean cross entropy and accuracy in [0, 1] over all test images; None if to stop at once."""
    model.eval()
    sums = []
    with packed_weights(model):
        for images, labels in test_batches:
            with precision.autocast():
                logits, _ = model(images)
            loss = F.cross_entropy(logits, labels, reduction="sum")
            correct = (logits.argmax(dim=1) == labels).sum()
            sums.append(torch.stack([loss, correct, torch.full_like(correct, len(labels))]))
            if stop and stop.now:
                return None
    loss, correct, count = dist_util.sum_over_processes(torch.stack(sums).cpu().double().sum(0))
    return (loss / count).item(), (correct / count).item()


def evaluate_run(args, files, device):
    """Evaluate the run's best weights and draw its figures."""
    from plot_acc_loss import plot_log  # matplotlib takes a second that training need not wait for
    from plot_attn import plot_attention

    saved = load_checkpoint(files.best, digest_required=True)
    dataset = load_dataset(args.dataset, args.data_dir)
    model = make_model(args, len(dataset.classes), vis=True)
    load_weights(model, saved["model"], files.best)
    image = resize(dataset.test_images[:1], args.img_size)
    title = dataset.classes[dataset.test_labels[0]]
    figures = plot_attention(model, image, args.norm_type, title=title)
    try:
        figures.append(plot_log(files.log, Path("img/plot_acc_loss")))
    except (ValueError, FileNotFoundError) as error:
        print(f"No figure of loss and accuracy: {error}")

    model = make_model(args, len(dataset.classes))
    load_weights(model, saved["model"], files.best)
    model.to(device)
    precision = make_precision(args, model)
    resizer = Resizer(args.img_size, device, precision.input_dtype)
    test_batches = TestBatches(dataset, args.eval_batch_size, resizer, device)
    loss, accuracy = evaluate(model, test_batches, precision)
    print(f"Valid Loss: {loss:.5f}\nValid Accuracy: {accuracy:.5f}")
    print("Figures:", *figures)


def is_finished(log_file):
    try:
        return read_log(log_file).finished
    except (OSError, ValueError):  # no log yet, or not even its head was written
        return False


def make_model(args, num_classes, vis=False):
    torch.manual_seed(args.seed)
    return VisionTransformer(
        CONFIGS[args.model_type], args.img_size, args.norm_type, num_classes=num_classes, vis=vis
    )


def make_precision(args, model):
    level = args.fp16_opt_level if args.fp16 else "O0"
    backend = ApexPrecision if args.fp16 and args.amp_backend == "apex" else Precision
    return backend(model, level, HALF_DTYPES.get(args.half_dtype), args.loss_scale)


def make_optimizer(args, precision):
    optimizer = torch.optim.SGD(
        precision.masters,
        lr=torch.zeros((), device=precision.device),  # looked up in the schedule's table there
        momentum=0.9,
        weight_decay=args.weight_decay,
        fused=True,
    )
    for p in precision.masters:  # a skipped first step would leave them uninitialized
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def restore(saved, precision):
    """Load a checkpoint's content into model, masters and optimizer; returns the run's state."""
    optimizer, theirs, run = precision.optimizer, saved.get("optimizer"), dict(saved["run"])
    try:
        precision.load_model_state_dict(saved["model"])
        precision.load_state_dict(saved["precision"])
        if int(precision.state["updates"]) != run["step"]:
            raise ValueError("it contradicts itself")
        # Into the tensors that there are: no shape, type or hyperparameter comes from the file.
        optimizer.param_groups[0]["lr"].copy_(theirs["param_groups"][0]["lr"])
        for i, p in enumerate(precision.masters):
            for name, tensor in optimizer.state[p].items():
                tensor.view(-1).copy_(theirs["state"][i][name].view(tensor.numel()))
        return run
    except Exception:  # a hand-made one fails in a dozen ways
        raise CheckpointError("--resume: the checkpoint does not fit this program") from None


def seed_step(seed, window):
    """All randomness of a step comes from the seed, its place in the data, and the process."""
    entropy = np.random.SeedSequence([seed, window, dist_util.rank()])
    torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0]))


def check_finite(records, run, precision, batches, accumulation, files, log):
    """Log the skipped steps among the last; raise UsageError if the run cannot go on."""
    for window, record in enumerate(records, run["window"] - len(records)):
        if record.finite:
            run["skipped_in_a_row"] = 0
            continue
        run["skipped"] += 1
        run["skipped_in_a_row"] += 1
        fault = f"loss {record.loss}, gradient norm {record.grad_norm} at step {record.updates + 1}"
        log.info(f"Skipped: {fault}, loss scale {record.loss_scale:g}")
        if precision.scaled and run["skipped_in_a_row"] < MAX_SKIPPED:
            continue
        parts = range(window * accumulation, (window + 1) * accumulation)
        indices = torch.cat([batches.indices(i) for i in parts]).tolist()
        log.info(f"Training images of the step: {indices}")
        good = next(iter(files.steps()), "none")
        raise UsageError(
            f"not finite: {fault}; its images' indices are in {files.log}; last good checkpoint:"
            f" {good}"
        )


if __name__ == "__main__":
    sys.exit(main())
