"""How the signal travels through the blocks of a Vision Transformer, forward and backward."""

import copy

import torch

IMAGES = 128  # how many are measured
PART = 32  # images per pass, to bound memory; also those for the effective rank


def signal_stats(model, images, labels) -> dict[str, list[float]]:
    """Four numbers of each block of a VisionTransformer, by name, in the blocks' order.

    activation_rms: root of the mean of x^2 over batch, tokens and channels, x the block's output
        (the residual stream), not centered.
    grad_norm: L2 norm of the gradients of the mean cross entropy of the images with respect to the
        block's parameters.
    attention_entropy: -sum_j A_ij log A_ij in nats, mean over queries, heads and images; equal
        attention to N tokens gives log N.
    effective_rank: exp(-sum_i p_i log p_i), p_i = s_i / sum_j s_j, of the singular values s of one
        image's output (tokens x D), not centered; mean over the first 32 images at most.
        Source: Roy & Vetterli 2007.

    images: (B, 3, S, S) in [-1, 1], on the model's device; labels: (B,). A copy of the model is
    measured, in fp32 and evaluation mode, with all tokens of its last block: the model and the
    random state stay as they are. Non-finite values give nan or inf.
    """
    model = measured_copy(model)
    blocks = model.transformer.encoder.layer
    outputs, sums = {}, {}
    for i, block in enumerate(blocks):
        block.register_forward_hook(lambda _, inputs, x, i=i: outputs.update({i: x.detach()}))

    def add(name, values):
        sums[name] = sums.get(name, 0) + torch.stack(values).double()

    with torch.enable_grad(), torch.autocast(images.device.type, enabled=False):
        for part, part_labels in zip(images.float().split(PART), labels.split(PART)):
            weight = len(part) / len(images)
            (weight * model(part, part_labels)).backward()
            x = [outputs[i].double() for i in range(len(blocks))]  # (B, N, D) each
            weights = [block.attn.weights.detach() for block in blocks]  # (B, H, N, N) each
            add("square", [weight * y.square().mean() for y in x])
            add("entropy", [weight * torch.special.entr(a).sum(dim=-1).mean() for a in weights])
            if "rank" not in sums:
                add("rank", [_effective_rank(y) for y in x])
    return {
        "activation_rms": sums["square"].sqrt().tolist(),
        "grad_norm": [_norm_of_gradients(block) for block in blocks],
        "attention_entropy": sums["entropy"].tolist(),
        "effective_rank": sums["rank"].tolist(),
    }


def signal_scalars(model, images, labels) -> dict[str, float]:
    """`signal_stats` by TensorBoard tag; blocks are counted from 1."""
    stats = signal_stats(model, images, labels)
    return {
        f"signal/{name}/block_{i}": value
        for name, values in stats.items()
        for i, value in enumerate(values, start=1)
    }


def measured_copy(model):
    """A copy in fp32 and evaluation mode, whose blocks compute all tokens and keep attention."""
    weights = [block.attn.weights for block in model.transformer.encoder.layer]
    # The last pass's weights may be part of its graph, and such tensors cannot be copied.
    model = copy.deepcopy(model, {id(a): a.detach() for a in weights if a is not None})
    model.float().eval().requires_grad_(True)
    model.vis = True
    for block in model.transformer.encoder.layer:
        block.attn.vis = True
        # The last block may be asked for only the class token: have it compute all.
        block.register_forward_pre_hook(lambda block, inputs: inputs[:1])
    return model


def _effective_rank(x):
    """Mean over the images of x (B, N, D)."""
    if not x.isfinite().all():
        return x.new_tensor(torch.nan)
    s = torch.linalg.svdvals(x)
    p = s / s.sum(dim=-1, keepdim=True)
    return torch.special.entr(p).sum(dim=-1).exp().mean()


def _norm_of_gradients(block):
    grads = [p.grad.double() for p in block.parameters() if p.grad is not None]
    return torch.nn.utils.get_total_norm(grads).item()
