"""Processes: who am I, how many are we, sums over all of us. One process needs no set-up."""

import ctypes
import os
from contextlib import contextmanager, suppress

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


class DeviceError(ValueError):
    """The device that the flags ask for is not there; the message is one line for the user."""


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def keep_freed_memory():
    """Have glibc keep what PyTorch frees, so that the next step finds its pages mapped."""
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)


def return_freed_memory():
    """Have glibc give back the pages of what is free; what is never used again costs nothing."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def launched():
    """Whether torchrun (or another launcher with its environment) started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def init(args):
    """Join the process group, if there is one; returns this process's device."""
    keep_freed_memory()
    if torch.cuda.is_available():
        flag, number = "--gpu_id", args.gpu_id
        if launched():  # an old launcher passes the flag, torchrun sets the variable
            flag = "--local_rank"
            number = os.environ.get("LOCAL_RANK", max(args.local_rank, 0))
        number, last = int(number), torch.cuda.device_count() - 1
        if number > last:
            raise DeviceError(f"{flag} {number}: the GPUs here are 0 to {last}")
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
    """The sum over all processes of a tensor on the CPU."""
    if not dist.is_initialized():
        return tensor
    tensor = tensor.to("cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(tensor)
    return tensor.cpu()


def any_process(flag):
    """Whether `flag` is true in any process; all must call it."""
    return bool(sum_over_processes(torch.tensor(int(flag))))


@contextmanager
def main_first():
    """The main process goes through the block before the others, which find what it left."""
    if dist.is_initialized() and not is_main():
        dist.barrier()
    yield
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
