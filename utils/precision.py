"""Half precision: apex's levels O0..O3 on PyTorch's own parts, behind one object.

| level | weights                  | forward  | masters | loss scale |
|-------|--------------------------|----------|---------|------------|
| O0    | fp32                     | fp32     | -       | 1          |
| O1    | fp32                     | autocast | -       | dynamic    |
| O2    | half, but BatchNorm fp32 | half     | fp32    | dynamic    |
| O3    | half                     | half     | -       | 1          |

Half is fp16 on CUDA and bf16 elsewhere. bf16 has fp32's range and needs no loss scale.
Source: the optimization levels of NVIDIA's apex.amp.
"""

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from utils.dist_util import return_freed_memory

HALF_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
LEVELS = ("O0", "O1", "O2", "O3")
PARAMETERS_AT_ONCE = 12  # a block's: no more fp32 gradients than these exist during a step
INITIAL_SCALE, MAX_SCALE, CLEAN_STEPS = 2.0**16, 2.0**24, 2000


@dataclass(frozen=True)
class StepRecord:
    """What one step did, read from the device."""

    updates: int  # optimizer steps taken so far
    finite: bool  # whether this one was taken
    loss: float  # mean cross entropy of its images
    grad_norm: float  # unscaled, before clipping
    loss_scale: float
    learning_rate: float


def norm(grad):
    """Euclidean norm, summed up in fp32."""
    if grad.dtype == torch.bfloat16:  # where vector_norm takes three times as long on a CPU
        return grad.float().square_().sum().sqrt()
    return torch.linalg.vector_norm(grad, dtype=torch.float32)


class Precision:
    """Owns loss scale, overflow, masters, clipping and the optimizer step.

    Everything about a step stays on the device; only `read()` waits for it. A step with a
    non-finite loss or gradient changes nothing but the loss scale. Where nothing is scaled it is a
    failure, and no later step changes the weights either.
    """

    def __init__(self, model, level, half_dtype, loss_scale=0.0):
        self.model, self.level = model, level
        self.device = next(model.parameters()).device
        self.half = half_dtype
        self.input_dtype = half_dtype if level in ("O2", "O3") else torch.float32
        self.weights = [p for p in model.parameters() if p.requires_grad]
        exact = [w.detach().clone() for w in self.weights] if level == "O2" else self.weights
        if level in ("O2", "O3"):
            self._cast_weights(keep_batchnorm=level == "O2")
        self.masters = [
            nn.Parameter(e) if level == "O2" and w.dtype != e.dtype else w
            for w, e in zip(self.weights, exact)
        ]
        # `scaled`: whether a non-finite gradient is part of the method; else it is a failure.
        self.scaled = level in ("O1", "O2") and (half_dtype == torch.float16 or loss_scale > 0)
        self.dynamic = self.scaled and loss_scale == 0
        scale = INITIAL_SCALE if self.dynamic else loss_scale if self.scaled else 1.0

        def one(value, dtype):
            return torch.tensor([value], dtype=dtype, device=self.device)

        self.state = {
            "scale": one(scale, torch.float32),
            "clean": one(0, torch.int64),  # steps since the scale last changed
            "updates": one(0, torch.int64),
            "healthy": one(True, torch.bool),
        }
        self.loss = one(0, torch.float32)
        self.is_first_step = True
        self.records = []
        self.batchnorm_buffers = [
            buffer for module in self._batchnorms() for buffer in module.buffers()
        ]

    def _batchnorms(self):
        return (m for m in self.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))

    def _cast_weights(self, keep_batchnorm):
        kept = {p for m in self._batchnorms() for p in m.parameters()} if keep_batchnorm else ()
        for p in self.model.parameters():
            if p not in kept:
                p.data = p.data.to(self.half)
        if not keep_batchnorm:
            for m in self._batchnorms():
                m.to(self.half)

    def attach(self, optimizer):
        """Take the optimizer, made over `self.masters`, that `step` is to drive."""
        self.optimizer = optimizer

    def autocast(self):
        """Context of the forward pass."""
        if self.level != "O1":
            return nullcontext()
        return torch.autocast(self.device.type, self.half)

    def start_step(self):
        """Call before the first forward pass of a step."""
        self.loss.zero_()
        if self.scaled:  # a step that will be skipped must not move BatchNorm's statistics
            self.saved_buffers = [buffer.clone() for buffer in self.batchnorm_buffers]

    def backward(self, loss, accumulation=1):
        """Add the gradients of loss / accumulation, scaled."""
        loss = loss / accumulation
        self.loss += loss.detach()
        (loss * self.state["scale"] if self.scaled else loss).sum().backward()
        if accumulation > 1:  # added up in fp32
            for weight, master in zip(self.weights, self.masters):
                if master is not weight:
                    grad, weight.grad = weight.grad, None
                    master.grad = grad.float() if master.grad is None else master.grad.add_(grad)

    @torch.no_grad()
    def step(self, lr_table, max_grad_norm):
        """Unscale, clip, update the weights, clear the gradients; or skip, if not all is finite.

        lr_table (num_steps + 1,) holds the learning rate of each update, on the device.
        """
        state, scale = self.state, self.state["scale"].clone()
        pairs = list(zip(self.weights, self.masters))
        grads = [weight.grad if master.grad is None else master.grad for weight, master in pairs]
        self.optimizer.zero_grad()  # `grads` has them
        norms = [norm(grad) for grad in grads]
        grad_norm = torch.linalg.vector_norm(torch.stack(norms)) / scale
        finite = grad_norm.isfinite() & self.loss.isfinite()
        if not self.scaled:
            finite = state["healthy"].logical_and_(finite)
        self._record(finite, grad_norm, scale, lr_table)

        # PyTorch's fused optimizers unscale and skip by themselves, as its GradScaler has them do.
        self.optimizer.grad_scale = scale if self.scaled else None
        self.optimizer.found_inf = 1 - finite.float()
        for start in range(0, len(pairs), PARAMETERS_AT_ONCE):
            some = pairs[start : start + PARAMETERS_AT_ONCE]
            for i, (weight, master) in enumerate(some, start):
                weight.grad = None
                master.grad, grads[i] = grads[i].to(master.dtype), None
            nn.utils.clip_grads_with_norm_([m for _, m in some], max_grad_norm, grad_norm[0])
            self.optimizer.step()  # of those that have a gradient
            for weight, master in some:
                if master is not weight:
                    weight.copy_(master)
                master.grad = None

        self._restore_buffers(finite)
        if self.dynamic:
            state["clean"].add_(1).mul_(finite)
            grow = state["clean"] == CLEAN_STEPS
            state["scale"].mul_(torch.where(grow, 2.0, torch.where(finite, 1.0, 0.5)))
            state["scale"].clamp_(max=MAX_SCALE)
            state["clean"].mul_(~grow)
        if self.is_first_step:  # what it left for good lies between what later ones use: holes
            return_freed_memory()
        self.is_first_step = False

    def _restore_buffers(self, finite):
        if self.scaled:
            for buffer, saved in zip(self.batchnorm_buffers, self.saved_buffers):
                buffer.copy_(torch.where(finite[0], buffer, saved))

    def _record(self, finite, grad_norm, scale, lr_table):
        """Count the update, if it is one; set its learning rate; note what `read` will tell."""
        updates = self.state["updates"].add_(finite)
        lr = lr_table.index_select(0, updates.clamp(max=len(lr_table) - 1))
        self.optimizer.param_groups[0]["lr"].copy_(lr[0])
        numbers = (updates, finite, self.loss, grad_norm, scale, lr)
        self.records.append(torch.cat([number.float() for number in numbers]))

    def read(self):
        """Wait for the device: a StepRecord of each step since the last call."""
        rows, self.records = torch.stack(self.records).tolist(), []
        return [StepRecord(int(updates), bool(finite), *rest) for updates, finite, *rest in rows]

    @contextmanager
    def _masters_in_model(self):
        """The model's state dict reads and loads fp32 masters within this context."""
        master_of = dict(zip(self.weights, self.masters))
        slots = [
            (module._parameters, name, p)
            for module in self.model.modules()
            for name, p in module._parameters.items()
            if p is not None
        ]
        for parameters, name, p in slots:
            parameters[name] = master_of.get(p, p)
        try:
            yield
        finally:
            for parameters, name, p in slots:
                parameters[name] = p
            with torch.no_grad():
                for weight, master in zip(self.weights, self.masters):
                    if master is not weight:
                        weight.copy_(master)

    def model_state_dict(self):
        """The model's state dict in fp32, whatever the level."""
        with self._masters_in_model():
            state = self.model.state_dict()
        return {k: v.float() if v.is_floating_point() else v for k, v in state.items()}

    def load_model_state_dict(self, state_dict):
        with self._masters_in_model():
            self.model.load_state_dict(state_dict)

    def state_dict(self):
        return {name: value.cpu().clone() for name, value in self.state.items()}

    def load_state_dict(self, state):
        for name, value in self.state.items():
            value.copy_(state[name])


class ApexPrecision(Precision):
    """The same levels by an installed apex that still has `apex.amp`; CUDA only, never run here.

    apex casts the model, keeps the masters inside the optimizer and skips steps by itself.
    """

    def __init__(self, model, level, half_dtype, loss_scale=0.0):
        super().__init__(model, "O0", half_dtype)
        self.opt_level, self.static_scale = level, loss_scale or None  # None: the level's own
        self.scaled = level in ("O1", "O2")  # there a non-finite gradient is apex's to handle

    def attach(self, optimizer):
        from apex import amp

        super().attach(optimizer)
        self.amp = amp
        amp.initialize(
            self.model, optimizer, opt_level=self.opt_level, loss_scale=self.static_scale
        )
        self.masters = list(amp.master_params(optimizer))

    def backward(self, loss, accumulation=1):
        loss = loss / accumulation
        self.loss += loss.detach()
        with self.amp.scale_loss(loss, self.optimizer) as scaled_loss:
            scaled_loss.backward()

    def step(self, lr_table, max_grad_norm):
        grad_norm = nn.utils.clip_grad_norm_(self.masters, max_grad_norm).float().view(1)
        finite = grad_norm.isfinite() & self.loss.isfinite()
        scalers = self.amp.state_dict()
        scale = scalers["loss_scaler0"]["loss_scale"] if scalers else 1.0
        self._record(finite, grad_norm, torch.full_like(grad_norm, scale), lr_table)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._restore_buffers(finite)

    def state_dict(self):
        return super().state_dict() | {"apex": self.amp.state_dict()}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.amp.load_state_dict(state["apex"])
