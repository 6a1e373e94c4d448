"""Processes: which one is this, how many are there, sums over all. One process needs no set-up."""

import os
import sys
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from utils.errors import UserError


def launched():
    """Whether torchrun (or another launcher with its environment) started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def init(args):
    """Join the process group, if there is one; returns this process's device."""
    if torch.cuda.is_available():
        flag, number = "--gpu_id", args.gpu_id
        if launched():  # an old launcher passes the flag, torchrun sets the variable
            flag = "--local_rank"
            number = os.environ.get("LOCAL_RANK", max(args.local_rank, 0))
        number, last = int(number), torch.cuda.device_count() - 1
        if number > last:
            raise UserError(f"{flag} {number}: the GPUs here are 0 to {last}")
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    elif torch.backends.mps.is_available():
        device = torch.device("mps")
    else:
        device = torch.device("cpu")
    if launched():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def is_main():
    return rank() == 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_processes(tensor):
    """The sum of a tensor over all processes, on its device."""
    if not dist.is_initialized():
        return tensor
    total = tensor.to("cuda") if dist.get_backend() == "nccl" else tensor.clone()
    dist.all_reduce(total)
    return total.to(tensor.device)


def any_process(flag):
    """Whether `flag` is true in any process; all must call it."""
    return bool(sum_over_processes(torch.tensor(int(flag))))


def share_buffers(model):
    """Give all processes the main one's buffers, such as BatchNorm's running statistics."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


@contextmanager
def main_first():
    """The main process runs the block before the others, which then find what it has made."""
    if dist.is_initialized() and not is_main():
        dist.barrier()
    try:
        yield
    finally:  # an error in the main process must not leave the others waiting
        if dist.is_initialized() and is_main():
            dist.barrier()


def wrap(model):
    """The model with its gradients averaged over processes, if there are several."""
    if not dist.is_initialized():
        return model
    device = next(model.parameters()).device
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def shutdown():
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(status):
    """End this process with `status`, of several processes without Python's own clean-up.

    Gloo's threads outlive the process group. One that still frees a tensor while Python cleans up
    aborts the process, and torchrun reports a finished training as failed.
    """
    if launched():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status or 0)
    sys.exit(status)
