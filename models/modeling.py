"""The Vision Transformer. Source: Dosovitskiy et al. 2021, with the reference's names and sizes.

Shapes: B batch, N tokens (patches, and the class token first), D hidden size, H heads, d = D/H.
"""

import torch
import torch.nn.functional as F
from torch import nn

from models.configs import model_config
from models.embeddings import Embeddings
from models.norm_blocks import ALL
from models.norm_layers import is_per_token
from models.norms import NORM_TYPES, QK_NORMS
from models.recompute import recomputed

CLASS_TOKEN = slice(0, 1)


class Attention(nn.Module):
    """Multi-head self-attention, (B, N, D) -> (B, N, D). With `vis` it keeps its weights."""

    def __init__(self, config, vis=False, qk_norm="none", drop_path=0.0):
        super().__init__()
        dim = config.hidden_size
        self.num_heads = config.transformer.num_heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self.query_norm = QK_NORMS[qk_norm](dim // self.num_heads)
        self.key_norm = QK_NORMS[qk_norm](dim // self.num_heads)
        self.inner_norm = nn.Identity()  # a norm type may put its own here
        self.attn_dropout = nn.Dropout(config.transformer.attention_dropout_rate)
        self.proj_dropout = nn.Dropout(config.transformer.attention_dropout_rate)
        self.drop_path = stochastic_depth(drop_path)
        self.vis = vis
        self.weights = None  # of the last forward pass, (B, H, N, N), if `vis`

    def forward(self, x, tokens=ALL):
        """`tokens`: a slice of the N, those whose output is wanted; attention is over all."""
        q = self.query_norm(self.split_heads(self.query(x[:, tokens])))
        k = self.key_norm(self.split_heads(self.key(x)))
        v = self.split_heads(self.value(x))
        y = self.attend(q, k, v)  #                             (B, H, N, d)
        y = self.inner_norm(y.transpose(1, 2).flatten(2))  #    (B, N, D)
        return self.drop_path(self.proj_dropout(self.out(y)))

    def split_heads(self, x):
        """(B, N, D) -> (B, H, N, d)"""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def attend(self, q, k, v):
        """softmax(q k^T / sqrt(d)) v"""
        if not self.vis:
            p = self.attn_dropout.p if self.training else 0.0
            return F.scaled_dot_product_attention(q, k, v, dropout_p=p)
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        self.weights = scores.softmax(dim=-1)
        return self.attn_dropout(self.weights) @ v


class Mlp(nn.Module):
    """D -> mlp_dim -> D with the exact GELU, (B, N, D) -> (B, N, D)."""

    def __init__(self, config, drop_path=0.0):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.transformer.mlp_dim)
        self.fc2 = nn.Linear(config.transformer.mlp_dim, config.hidden_size)
        self.inner_norm = nn.Identity()  # a norm type may put its own here
        self.dropout = nn.Dropout(config.transformer.dropout_rate)
        self.drop_path = stochastic_depth(drop_path)
        for layer in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.normal_(layer.bias, std=1e-6)

    def forward(self, x):
        x = self.dropout(F.gelu(self.fc1(x)))  #                (B, N, mlp_dim)
        x = self.fc2(self.inner_norm(x))  #                     (B, N, D)
        return self.drop_path(self.dropout(x))


class Encoder(nn.Module):
    """The blocks and the final norm: (B, N, D) -> (B, N, D), or (B, 1, D), the class token only.

    With `grad_checkpointing` a block's activations are not kept, but computed again for its
    gradients.
    """

    def __init__(self, config, norm_type, qk_norm="none", vis=False):
        super().__init__()
        dim, depth = config.hidden_size, config.transformer.num_layers
        block, norm, final_norm, *_ = NORM_TYPES[norm_type]
        self.layer = nn.ModuleList()
        for index in range(depth):
            drop_path = config.transformer.drop_path_rate * index / max(1, depth - 1)
            branches = Attention(config, vis, qk_norm, drop_path), Mlp(config, drop_path)
            self.layer.append(block(*branches, norm, dim, index, depth))
            if config.zero_branches and not block.own_start:
                zero(branches[0].out, branches[1].fc2)
        self.encoder_norm = (final_norm or norm)(dim)
        self.reads_class_token_alone = config.classifier == "token" and not vis
        self.grad_checkpointing = False

    def forward(self, x):
        for block in self.layer:
            # If the head reads only the class token, the last block need not compute the others.
            class_token_alone = block is self.layer[-1] and self.reads_class_token_alone
            class_token_alone &= block.per_token and is_per_token(self.encoder_norm)
            tokens = CLASS_TOKEN if class_token_alone else ALL
            inputs = (x,) if tokens == ALL else (x, tokens)
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = recomputed(block, *inputs)
            else:
                x = block(*inputs)
        return self.encoder_norm(x)


def stochastic_depth(rate):
    """A layer that drops a branch, image by image. Source: Huang et al. 2016."""
    if not rate:
        return nn.Identity()
    from torchvision.ops import StochasticDepth  # takes a second to import

    return StochasticDepth(rate, "row")


def zero(*layers):
    """Make linear layers return zeros initially."""
    for layer in layers:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


class Transformer(nn.Module):
    def __init__(self, config, img_size, norm_type, qk_norm="none", vis=False):
        super().__init__()
        self.embeddings = Embeddings(config, img_size)
        self.encoder = Encoder(config, norm_type, qk_norm, vis)

    def forward(self, x):
        return self.encoder(self.embeddings(x))


class VisionTransformer(nn.Module):
    """Vision Transformer for classification.

    `forward(x)`, x (B, 3, img_size, img_size): logits (B, num_classes) and the attention weights, a
    list of (B, H, N, N) per block if `vis`, else empty. `forward(x, labels)`, labels (B,) or
    probabilities (B, num_classes): the mean cross entropy, in fp32. `zero_head`: whether
    `load_pretrained` is to start the head at zero. Raises ValueError for an unknown norm type or an
    img_size that the patch does not divide.
    """

    def __init__(
        self,
        config,
        img_size=224,
        norm_type="LN",
        num_classes=21843,
        zero_head=False,
        vis=False,
        qk_norm="none",
    ):
        super().__init__()
        if norm_type not in NORM_TYPES:
            raise ValueError(f"norm_type {norm_type!r} is none of {', '.join(NORM_TYPES)}")
        self.norm_type, self.qk_norm = norm_type, qk_norm
        self.num_classes = num_classes
        self.zero_head = zero_head
        self.classifier = config.classifier
        self.vis = vis
        self.transformer = Transformer(config, img_size, norm_type, qk_norm, vis)
        self.head = nn.Linear(config.hidden_size, num_classes)
        if config.zero_head:
            zero(self.head)
        if prepare := NORM_TYPES[norm_type].prepare:
            prepare(self)
        if config.classifier == "token" and (config.zero_head or config.zero_branches):
            nn.init.normal_(self.transformer.embeddings.cls_token, std=0.02)  # zeros never learn

    def forward(self, x, labels=None):
        x = self.transformer(x)  #                                  (B, N or 1, D)
        x = x[:, 0] if self.classifier == "token" else x.mean(1)
        logits = self.head(x).float()
        if labels is not None:
            return F.cross_entropy(logits, labels)
        blocks = self.transformer.encoder.layer if self.vis else ()
        return logits, [block.attn.weights for block in blocks]


def build_model(flags, num_classes, vis=False):
    """A newly initialized model for the flags of a run."""
    config = model_config(flags)
    return VisionTransformer(
        config, flags.img_size, flags.norm_type, num_classes, vis=vis, qk_norm=flags.qk_norm
    )
