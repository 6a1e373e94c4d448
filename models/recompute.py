"""Gradient checkpointing for blocks whose layers keep statistics."""

from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint


def recomputed(block, *inputs):
    """block(*inputs), keeping only the inputs; the backward pass computes the rest again.

    Source: Chen et al. 2016. A compiler's own recomputation leaves statistics alone.
    """
    compiling = torch.compiler.is_compiling()
    contexts = {} if compiling else {"context_fn": partial(_contexts, block)}
    return checkpoint(block, *inputs, use_reentrant=False, **contexts)


def _contexts(block):
    """Contexts of the forward pass and of the recomputation, to be created before the first.

    The recomputation works on a copy of the state from before the forward pass: BatchNorm and
    AddBias compute the same again, and their statistics are updated only once.
    """
    stateful = [m for m in block.modules() if m._buffers]
    found = [
        vars(m) | {"_buffers": {name: buffer.clone() for name, buffer in m._buffers.items()}}
        for m in stateful
    ]

    @contextmanager
    def recomputation():
        left = [vars(m).copy() for m in stateful]
        for m, state in zip(stateful, found):
            vars(m).update(state)
        try:
            yield
        finally:
            for m, state in zip(stateful, left):
                vars(m).update(state)

    return nullcontext(), recomputation()
