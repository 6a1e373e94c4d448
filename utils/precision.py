"""Half precision: apex's levels O0..O3 on PyTorch's own parts, behind one object.

| level | weights                  | forward  | masters | loss scale |
|-------|--------------------------|----------|---------|------------|
| O0    | fp32                     | fp32     | -       | 1          |
| O1    | fp32                     | autocast | -       | dynamic    |
| O2    | half, but BatchNorm fp32 | half     | fp32    | dynamic    |
| O3    | half                     | half     | -       | 1          |

Half is fp16 or bf16; bf16 has fp32's range and needs no loss scale.
Source: the optimization levels of NVIDIA's apex.amp.
"""

from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from utils import dist_util

HALF_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
LEVELS = ("O0", "O1", "O2", "O3")
INITIAL_SCALE, MAX_SCALE, CLEAN_STEPS = 2.0**16, 2.0**24, 2000


class StepRecord(NamedTuple):
    """What one step did, read from the device."""

    finite: bool  # whether the weights were updated
    loss: float  # mean cross entropy of its images
    grad_norm: float  # unscaled, before clipping
    loss_scale: float
    learning_rate: float


class Precision:
    """Owns loss scale, overflow handling, masters, clipping and the optimizer step.

    Everything about a step stays on the device; only `read()` waits for it. A step with a
    non-finite loss or gradient changes no weight, only the loss scale. Without a loss scale
    it is a failure, and no later step changes the weights either.
    """

    def __init__(self, model, level, half_dtype, loss_scale=0.0):
        self.model, self.level, self.half = model, level, half_dtype
        self.device = next(model.parameters()).device
        self.input_dtype = half_dtype if level in ("O2", "O3") else torch.float32
        self.weights = [p for p in model.parameters() if p.requires_grad]
        exact = [w.detach().clone() for w in self.weights] if level == "O2" else self.weights
        if level in ("O2", "O3"):
            self._cast_weights()
        self.masters = [
            nn.Parameter(e) if level == "O2" and w.dtype != e.dtype else w
            for w, e in zip(self.weights, exact)
        ]
        # `scaled`: whether non-finite gradients are to be expected; else they are a failure.
        self.scaled = level in ("O1", "O2") and (half_dtype == torch.float16 or loss_scale > 0)
        self.dynamic = self.scaled and loss_scale == 0
        scale = INITIAL_SCALE if self.dynamic else loss_scale if self.scaled else 1.0
        self.state = {
            "scale": torch.tensor(scale, device=self.device),
            "clean": torch.tensor(0, device=self.device),  # steps since the scale last changed
            "failed": torch.tensor(False, device=self.device),
        }
        self.loss = torch.zeros((), device=self.device)
        self.records = []
        # Statistics move in skipped steps too, as with apex, but must stay finite.
        self.statistics = [b for b in model.buffers() if b.is_floating_point() and self.scaled]
        self.saved_statistics = [buffer.clone() for buffer in self.statistics]

    def _cast_weights(self):
        kept = set()
        for module in self.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                if self.level == "O2":
                    kept.update(module.parameters())
                else:
                    module.to(self.half)  # its statistics too
            elif isinstance(module, ParametrizationList):
                module.to(self.half)  # with the buffers that the weight is computed from
        for p in self.model.parameters():
            if p not in kept:
                p.data = p.data.to(self.half)

    def named_masters(self):
        """The parameters that an optimizer is to update, by the model's names."""
        masters = dict(zip(self.weights, self.masters))
        return {n: masters[p] for n, p in self.model.named_parameters() if p.requires_grad}

    def attach(self, optimizers, ema=0.0):
        """Take the optimizers, made over `named_masters()`, that `update` is to drive.

        With a decay `ema` the weights are averaged too, for `averaged()`.
        """
        self.optimizers, self.ema = optimizers, ema
        self.averages = [master.detach().clone() for master in self.masters] if ema else []

    def autocast(self):
        """Context of the forward pass."""
        if self.level != "O1":
            return nullcontext()
        return torch.autocast(self.device.type, self.half)

    def backward(self, loss, parts=1):
        """Add the gradients of loss / parts, scaled; `loss` is that of one of a step's `parts`."""
        loss = loss / parts
        self.loss += loss.detach()
        (loss * self.state["scale"] if self.scaled else loss).backward()
        for weight, master in zip(self.weights, self.masters):
            if master is not weight and weight.grad is not None:  # accumulated in fp32
                grad, weight.grad = weight.grad.float(), None
                master.grad = grad if master.grad is None else master.grad.add_(grad)

    @torch.no_grad()
    def clip(self, max_norm):
        """Clip the global norm of the unscaled gradients to `max_norm`."""
        masters = [master for master in self.masters if master.grad is not None]
        grads = [master.grad for master in masters]
        if self.level == "O3":  # half gradients: their norms in fp32, without copies of them
            grads = [torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in grads]
        self.grad_norm = nn.utils.get_total_norm(grads) / self.state["scale"]
        nn.utils.clip_grads_with_norm_(masters, max_norm, self.grad_norm)

    @torch.no_grad()
    def update(self, learning_rate):
        """Update the weights, unless something is not finite, and clear the gradients."""
        scale = self.state["scale"].clone()
        finite = self._is_finite()
        self._record(finite, scale, learning_rate)
        self._set_learning_rate(learning_rate)
        for optimizer in self.optimizers:
            self._step(optimizer, finite, scale)
            optimizer.zero_grad()
        for average, master in zip(self.averages, self.masters):
            average.lerp_(master, (1 - self.ema) * finite.to(master.dtype))  # a skipped step: 0
        self._copy_masters()
        self._adjust_scale(finite)

    def _set_learning_rate(self, learning_rate):
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * group.get("factor", 1.0)

    def _step(self, optimizer, finite, scale):
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            # PyTorch's fused optimizers unscale and skip by themselves, as for its GradScaler.
            optimizer.grad_scale = scale if self.scaled else None
            optimizer.found_inf = 1 - finite.float()
            optimizer.step()
        elif finite:  # for other optimizers, this waits for the device
            for group in optimizer.param_groups:
                for master in group["params"]:
                    if master.grad is not None:
                        master.grad /= scale
            optimizer.step()

    def _copy_masters(self):
        for weight, master in zip(self.weights, self.masters):
            if master is not weight:
                weight.copy_(master)

    @contextmanager
    def averaged(self):
        """Within it the model has the averaged weights, if they are kept."""
        if not self.averages:
            yield
            return
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self):
        for average, master in zip(self.averages, self.masters):
            kept = master.clone()
            master.copy_(average)
            average.copy_(kept)
        self._copy_masters()

    def _is_finite(self):
        """Whether the step is to be taken, the same in all processes. Averages their losses."""
        self.loss = dist_util.sum_over_processes(self.loss) / dist_util.world_size()
        finite = self.grad_norm.isfinite() & self.loss.isfinite()
        if not self.scaled:
            finite = finite.logical_and_(~self.state["failed"])
            self.state["failed"].logical_or_(~finite)
        for buffer, saved in zip(self.statistics, self.saved_statistics):
            buffer.copy_(torch.where(buffer.isfinite(), buffer, saved))
            saved.copy_(buffer)
        return finite

    def _adjust_scale(self, finite):
        if self.dynamic:
            state = self.state
            state["clean"].add_(1).mul_(finite)
            grow = state["clean"] == CLEAN_STEPS
            state["scale"].mul_(torch.where(grow, 2.0, torch.where(finite, 1.0, 0.5)))
            state["scale"].clamp_(max=MAX_SCALE)
            state["clean"].mul_(~grow)

    def _record(self, finite, scale, learning_rate):
        numbers = torch.stack([finite.float(), self.loss, self.grad_norm, scale])
        self.records.append((numbers, learning_rate))
        self.loss = torch.zeros_like(self.loss)

    def read(self):
        """Wait for the device: a StepRecord of each step since the last call."""
        numbers, rates = zip(*self.records)
        self.records = []
        rows = torch.stack(numbers).tolist()
        return [StepRecord(bool(row[0]), *row[1:], rate) for row, rate in zip(rows, rates)]

    def model_state_dict(self):
        """The model's state dict in fp32, whatever the level."""
        master_of = dict(zip(self.weights, self.masters))
        exact = {name: master_of.get(p, p) for name, p in self.model.named_parameters()}
        state = self.model.state_dict() | exact
        return {
            k: v.detach().float() if v.is_floating_point() else v.clone() for k, v in state.items()
        }

    @torch.no_grad()
    def load_model_state_dict(self, state):
        self.model.load_state_dict(state)
        master_of = dict(zip(self.weights, self.masters))
        for name, p in self.model.named_parameters():
            if p in master_of:
                master_of[p].copy_(state[name])
        for buffer, saved in zip(self.statistics, self.saved_statistics):
            saved.copy_(buffer)

    def state_dict(self):
        """All that training continues from: fp32 weights, optimizer, loss scale."""
        return {
            "model": self.model_state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "averages": [average.cpu().clone() for average in self.averages],
            "precision": {name: value.cpu().clone() for name, value in self.state.items()},
        }

    def load_state_dict(self, saved):
        self.load_model_state_dict(saved["model"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        for average, state in zip(self.averages, saved["averages"], strict=True):
            average.copy_(state)
        for name, value in self.state.items():
            value.copy_(saved["precision"][name])


class ApexPrecision(Precision):
    """The same levels by an installed apex that still has `apex.amp`; CUDA only, never run here.

    apex casts the model, keeps the masters inside the optimizer and skips steps by itself.
    """

    def __init__(self, model, level, half_dtype, loss_scale=0.0):
        super().__init__(model, "O0", half_dtype)
        self.opt_level, self.static_scale = level, loss_scale or None  # None: the level's own
        self.scaled = level in ("O1", "O2")  # there a non-finite gradient is apex's to handle

    def attach(self, optimizers, ema=0.0):
        from apex import amp

        super().attach(optimizers, ema)
        self.amp = amp
        amp.initialize(
            self.model, optimizers, opt_level=self.opt_level, loss_scale=self.static_scale
        )
        self.masters = [p for optimizer in optimizers for p in amp.master_params(optimizer)]

    def backward(self, loss, parts=1):
        loss = loss / parts
        self.loss += loss.detach()
        with self.amp.scale_loss(loss, self.optimizers) as scaled_loss:
            scaled_loss.backward()

    def clip(self, max_norm):
        self.grad_norm = nn.utils.clip_grad_norm_(self.masters, max_norm).float()

    def update(self, learning_rate):
        scalers = self.amp.state_dict()
        scale = scalers["loss_scaler0"]["loss_scale"] if scalers else 1.0
        finite = self._is_finite()
        self._record(finite, torch.full_like(self.grad_norm, scale), learning_rate)
        self._set_learning_rate(learning_rate)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def state_dict(self):
        return super().state_dict() | {"apex": self.amp.state_dict()}

    def load_state_dict(self, saved):
        super().load_state_dict(saved)
        self.amp.load_state_dict(saved["apex"])
