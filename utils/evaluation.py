"""Evaluation on the test images, during training and by --eval."""

from pathlib import Path

import torch
from torch.nn import functional as F

from models.fast_cpu import accelerate, fixed_weights
from models.modeling import build_model
from utils import dist_util
from utils.checkpoint import load_checkpoint, load_weights
from utils.data_utils import Resizer, TestBatches, hold_out, load_dataset, resize
from utils.precision import Precision


@torch.inference_mode()
def evaluate(model, test_batches, precision, stop=None):
    """Mean cross entropy and accuracy in [0, 1] over all test images; None if asked to stop."""
    model.eval()
    dist_util.share_buffers(model)
    sums = []
    with fixed_weights(model):
        for images, labels in test_batches:
            with precision.autocast():
                logits, _ = model(images)
            loss = F.cross_entropy(logits, labels, reduction="sum")
            correct = (logits.argmax(dim=1) == labels).sum()
            sums.append(torch.stack([loss, correct, torch.full_like(loss, len(labels))]))
            if stop and stop.now:
                return None
    sums = torch.stack(sums).cpu().double().sum(0)
    loss, correct, count = dist_util.sum_over_processes(sums).tolist()
    return loss / count, correct / count


def evaluate_run(args, files, device, level, half_dtype):
    """--eval: evaluate the run's best weights and draw its figures."""
    from plot_acc_loss import plot_log  # matplotlib takes a second to import
    from plot_attn import plot_attention

    saved = load_checkpoint(files.best)
    with dist_util.main_first():
        dataset = hold_out(load_dataset(args.dataset, args.data_dir), args.val_split)

    def make_model(vis):
        model = build_model(args, len(dataset.classes), vis)
        load_weights(model, saved["model"], files.best)
        return model

    model = make_model(vis=False).to(device)
    precision = Precision(model, level, half_dtype)
    if args.cpu_kernels == "auto":
        accelerate(model)
    resizer = Resizer(args.img_size, device, precision.input_dtype)
    processes = (dist_util.rank(), dist_util.world_size())
    test_batches = TestBatches(dataset, args.eval_batch_size, resizer, device, *processes)
    loss, accuracy = evaluate(model, test_batches, precision)
    if not dist_util.is_main():
        return
    print(f"Valid Loss: {loss:.5f}\nValid Accuracy: {accuracy:.5f}")

    image = resize(dataset.test_images[:1], args.img_size)
    title = dataset.classes[dataset.test_labels[0]]
    name = args.norm_type + "_pretrained" * bool(args.pretrained_dir)
    figures = plot_attention(make_model(vis=True), image, name, title=title)
    try:
        figures.append(plot_log(files.log, Path("img/plot_acc_loss")))
    except (ValueError, FileNotFoundError) as error:
        print(f"No figure of loss and accuracy: {error}")
    print("Figures:", *figures)
