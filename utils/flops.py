"""What a training costs: its compute, counted, and its memory."""

from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from models.modeling import build_model
from models.norm_layers import Measuring
from utils.scheduler import patch_dropout_steps


def training_pflop(flags, num_classes):
    """PFLOP of all steps' forward and backward passes; a multiply-add is two operations.

    Every step counts as one with a full batch, after the first steps' measuring.
    """
    parts = flags.gradient_accumulation_steps
    with torch.device("meta"):
        model = build_model(flags, num_classes)
        images = torch.empty(flags.train_batch_size // parts, 3, flags.img_size, flags.img_size)
        labels = torch.zeros(len(images), dtype=torch.long)
    for module in model.modules():
        if isinstance(module, Measuring):
            module.calls = Measuring.MEASURING_CALLS
    total, dropping = 0, patch_dropout_steps(flags)
    for active, steps in ((True, dropping), (False, flags.num_steps - dropping)):
        if not steps:
            continue
        model.transformer.embeddings.patch_dropout.active = active
        with FlopCounterMode(display=False) as counter:
            model(images, labels).backward()
        total += counter.get_total_flops() * steps
    return total * parts * flags.processes / 1e15


def highest_memory():
    """Peak memory of this process in bytes; on a CPU getrusage would include its parent's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
