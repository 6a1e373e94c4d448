"""The Vision Transformer. Source: Dosovitskiy et al. 2021, with the reference's names and sizes.

Shapes: B batch, N tokens (patches + 1), D hidden size, H heads, d = D/H head size.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from models.configs import CONFIGS  # noqa: F401  (the model and its sizes are imported together)
from models.layers import Dropout, Linear, linear
from models.norms import NORM_TYPES, checkpoint_contexts


class Attention(nn.Module):
    """Multi-head self-attention, (B, N, D) -> (B, N, D) and the weights (B, H, N, N) if `vis`.

    Query, key and value are one linear here; state dicts hold the reference's three.
    """

    def __init__(self, config, vis):
        super().__init__()
        dim = config.hidden_size
        self.vis = vis
        self.num_heads = config.transformer.num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.out = Linear(dim, dim)
        self.attn_dropout = Dropout(config.transformer.attention_dropout_rate)
        self.proj_dropout = Dropout(config.transformer.attention_dropout_rate)
        self.register_state_dict_post_hook(self._split_qkv)
        self.register_load_state_dict_pre_hook(self._fuse_qkv)

    def forward(self, x, class_only=False):
        """`class_only`: the class token's output alone, (B, 1, D)."""
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.num_heads, D // self.num_heads)
        qkv = qkv.permute(2, 0, 3, 1, 4)  #                     (3, B, H, N, d)
        # Two batched products: on a CPU faster than the fused kernel for so few tokens.
        products = self.vis or (x.device.type == "cpu" and self.attn_dropout.p == 0 and N <= 256)
        q, k, v = qkv.contiguous() if products else qkv
        if class_only:
            q = q[:, :, :1]
        weights = None
        if products:
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
            weights = scores.softmax(dim=-1)  #                 (B, H, N, N)
            y = self.attn_dropout(weights) @ v  #               (B, H, N, d)
        else:
            p = self.attn_dropout.p if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=p)
        y = self.out(y.transpose(1, 2).reshape(B, -1, D))
        return self.proj_dropout(y), weights if self.vis else None

    @staticmethod
    def _split_qkv(module, state_dict, prefix, local_metadata):
        for kind in ("weight", "bias"):
            parts = state_dict.pop(f"{prefix}qkv.{kind}").chunk(3)
            for name, part in zip(("query", "key", "value"), parts):
                state_dict[f"{prefix}{name}.{kind}"] = part
        for name in ("query", "key", "value", "out"):  # the reference's order
            for kind in ("weight", "bias"):
                key = f"{prefix}{name}.{kind}"
                state_dict[key] = state_dict.pop(key)

    @staticmethod
    def _fuse_qkv(module, state_dict, prefix, *_):
        for kind in ("weight", "bias"):
            keys = [f"{prefix}{name}.{kind}" for name in ("query", "key", "value")]
            if all(key in state_dict for key in keys):
                parts = [state_dict.pop(key) for key in keys]
                state_dict[f"{prefix}qkv.{kind}"] = torch.cat(parts)


class Mlp(nn.Module):
    """D -> mlp_dim -> D with the exact GELU, (B, N, D) -> (B, N, D)."""

    def __init__(self, config):
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.transformer.mlp_dim)
        self.fc2 = Linear(config.transformer.mlp_dim, config.hidden_size)
        self.dropout = Dropout(config.transformer.dropout_rate)
        for layer in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.normal_(layer.bias, std=1e-6)

    def forward(self, x):
        x = self.dropout(self.fc1(x, gelu=True))  #             (B, N, mlp_dim)
        return self.dropout(self.fc2(x))  #                     (B, N, D)


class Embeddings(nn.Module):
    """Images (B, 3, S, S) to tokens (B, N, D): patches, class token, position embeddings.

    Raises ValueError when S is no multiple of the patch.
    """

    def __init__(self, config, img_size):
        super().__init__()
        patch = config.patches.size[0]
        if img_size % patch:
            raise ValueError(f"img_size {img_size} is not a multiple of the patch size {patch}")
        dim = config.hidden_size
        tokens = (img_size // patch) ** 2 + 1
        self.position_embeddings = nn.Parameter(torch.zeros(1, tokens, dim))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.patch_embeddings = nn.Conv2d(3, dim, kernel_size=patch, stride=patch)
        self.dropout = Dropout(config.transformer.dropout_rate)

    def forward(self, x):
        conv = self.patch_embeddings
        (B, C, S, _), P = x.shape, conv.stride[0]
        # A convolution whose stride is its kernel is one matrix product over the patches.
        x = (
            x.reshape(B, C, S // P, P, S // P, P)
            .permute(0, 2, 4, 1, 3, 5)
            .reshape(B, -1, C * P * P)
        )
        x = linear(x, conv.weight.flatten(1), conv.bias)  #     (B, N-1, D)
        x = torch.cat([self.cls_token.to(x.dtype).expand(B, -1, -1), x], dim=1)
        return self.dropout(x + self.position_embeddings.to(x.dtype))  # (B, N, D)


class Block(nn.Module):
    """A pre-norm encoder block, (B, N, D) -> (B, N, D); its norm type adds what it needs."""

    def __init__(self, config, norm_type, index, vis):
        super().__init__()
        self.rule = NORM_TYPES[norm_type]
        self.rule.install(self, config.hidden_size, index, config.transformer.num_layers)
        self.ffn = Mlp(config)
        self.attn = Attention(config, vis)

    def forward(self, x, class_only=False):
        """`class_only`: the class token's output alone, (B, 1, D)."""
        y, weights = self.attn(self.rule.branch_input(self, x, "attn"), class_only)
        x = self.rule.residual(self, x[:, :1] if class_only else x, y, "attn")
        y = self.ffn(self.rule.branch_input(self, x, "ffn"))
        return self.rule.residual(self, x, y, "ffn"), weights


def recomputed(block, *inputs):
    """block(*inputs), keeping the inputs alone; its gradients compute the rest again.

    Source: Chen et al. 2016. A compiler recomputes without touching statistics by itself.
    """
    compiling = torch.compiler.is_compiling()
    contexts = {} if compiling else {"context_fn": partial(checkpoint_contexts, block)}
    return checkpoint(block, *inputs, use_reentrant=False, **contexts)


class Encoder(nn.Module):
    def __init__(self, config, norm_type, vis):
        super().__init__()
        self.vis = vis
        self.grad_checkpointing = False
        depth = config.transformer.num_layers
        self.layer = nn.ModuleList(Block(config, norm_type, i, vis) for i in range(depth))
        self.encoder_norm = NORM_TYPES[norm_type].final_norm(config.hidden_size)

    def forward(self, x):
        attention_weights = []
        last = self.layer[-1]
        for block in self.layer:
            # The head reads the class token alone. Where no norm after it looks at the others, the
            # last block's output and MLP need not be computed for them.
            class_only = block is last and not self.vis and last.rule.per_token(last)
            if self.grad_checkpointing and torch.is_grad_enabled():
                x, weights = recomputed(block, x, class_only)
            else:
                x, weights = block(x, class_only)
            if self.vis:
                attention_weights.append(weights)
        return self.encoder_norm(x), attention_weights


class Transformer(nn.Module):
    def __init__(self, config, img_size, norm_type, vis):
        super().__init__()
        self.embeddings = Embeddings(config, img_size)
        self.encoder = Encoder(config, norm_type, vis)

    def forward(self, x):
        return self.encoder(self.embeddings(x))


class VisionTransformer(nn.Module):
    """Vision Transformer for classification.

    `forward(x)`, x (B, 3, img_size, img_size): logits (B, num_classes) and the attention weights, a
    list of (B, H, N, N) per block if `vis`, else empty. `forward(x, labels)`, labels (B,): the mean
    cross entropy, in fp32. `zero_head` makes loaded foreign weights start with a head of zeros.
    Raises ValueError for an unknown norm type or an img_size that the patch does not divide.
    """

    def __init__(
        self, config, img_size=224, norm_type="LN", num_classes=21843, zero_head=False, vis=False
    ):
        super().__init__()
        if norm_type not in NORM_TYPES:
            raise ValueError(f"norm_type {norm_type!r} is none of {', '.join(NORM_TYPES)}")
        self.num_classes = num_classes
        self.zero_head = zero_head
        self.classifier = config.classifier
        self.transformer = Transformer(config, img_size, norm_type, vis)
        self.head = nn.Linear(config.hidden_size, num_classes)

    def forward(self, x, labels=None):
        x, attention_weights = self.transformer(x)
        logits = self.head(x[:, 0]).float()
        if labels is not None:
            return F.cross_entropy(logits, labels)
        return logits, attention_weights
