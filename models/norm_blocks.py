"""Encoder blocks with the norm in one place or another: each `forward` is its paper's equation.

Shapes: B batch, N tokens (the class token first), D channels; L blocks.
"""

from torch import nn

from models.norm_layers import is_per_token

ALL = slice(None)


class Block(nn.Module):
    """An encoder block, x (B, N, D) -> (B, N, D), over the branches `attn` and `ffn`.

    `norm(dim)` makes a norm layer; `index` counts the blocks from 0 to `depth` - 1.

    The head may read only the class token. Then the last block is called as `forward(x, tokens)`,
    for some of the tokens, if its `per_token` says that all layers after the attention map each
    token by itself. Otherwise it computes all tokens.
    """

    after_attention = None  # the names of the layers after the attention; None: not known
    own_start = False  # whether its branches have their own initialization

    def __init__(self, attn, ffn, norm, dim, index, depth):
        super().__init__()
        self.index, self.depth = index, depth
        self.add_norms(norm, dim)
        self.ffn = ffn
        self.attn = attn
        self.initialize()

    def add_norms(self, norm, dim):
        """Make the layers and parameters that the block has besides its branches."""
        self.attention_norm = norm(dim)
        self.ffn_norm = norm(dim)

    def initialize(self):
        """Change the branches' weights or layers, where the method says so."""

    @property
    def per_token(self):
        names = self.after_attention
        return names is not None and all(is_per_token(self.get_submodule(n)) for n in names)


class PreNorm(Block):
    """x <- x + Attn(Norm(x));  x <- x + MLP(Norm(x)).

    Source: Dosovitskiy et al. 2021, equations 2 and 3.
    """

    after_attention = ("ffn_norm",)

    def forward(self, x, tokens=ALL):
        x = x[:, tokens] + self.attn(self.attention_norm(x), tokens)
        x = x + self.ffn(self.ffn_norm(x))
        return x


# Other placements of the norm


class PostNorm(Block):
    """x <- Norm(x + Attn(x));  x <- Norm(x + MLP(x)). Source: Vaswani et al. 2017, section 3.1."""

    after_attention = ("attention_norm", "ffn_norm")

    def forward(self, x, tokens=ALL):
        x = self.attention_norm(x[:, tokens] + self.attn(x, tokens))
        x = self.ffn_norm(x + self.ffn(x))
        return x


class DeepNorm(PostNorm):
    """x <- Norm(a x + F(x)), a = (2L)^(1/4), for both branches F.

    Value, out and MLP weights start as Xavier's times (8L)^(-1/4); query and key as Xavier's.
    Source: Wang et al. 2022 (arXiv 2203.00555), figure 2; microsoft/torchscale, encoder.py.
    """

    own_start = True

    def initialize(self):
        self.alpha = (2 * self.depth) ** 0.25
        xavier(self, gain=(8 * self.depth) ** -0.25)

    def forward(self, x, tokens=ALL):
        x = self.attention_norm(self.alpha * x[:, tokens] + self.attn(x, tokens))
        x = self.ffn_norm(self.alpha * x + self.ffn(x))
        return x


class ResPost(Block):
    """x <- x + Norm(Attn(x));  x <- x + Norm(MLP(x)), with norms that start at gain 0.

    Source: Liu et al. 2022 (Swin V2), section 3.2; microsoft/Swin-Transformer,
    models/swin_transformer_v2.py.
    """

    after_attention = ("attention_norm", "ffn_norm")
    own_start = True

    def initialize(self):
        nn.init.zeros_(self.attention_norm.weight)
        nn.init.zeros_(self.ffn_norm.weight)
        drop_path_after_norms(self)

    def forward(self, x, tokens=ALL):
        x = x[:, tokens] + self.drop_path(self.attention_norm(self.attn(x, tokens)))
        x = x + self.drop_path(self.ffn_norm(self.ffn(x)))
        return x


class Peri(Block):
    """x <- x + Norm(Attn(Norm(x)));  x <- x + Norm(MLP(Norm(x))), with four norms.

    Source: Kim et al. 2025 (arXiv 2502.02732), equation 3. Gemma 2 places its RMSNorms like this.
    """

    after_attention = ("attention_out_norm", "ffn_norm", "ffn_out_norm")
    own_start = True  # the outer norms would divide branches of zeros

    def add_norms(self, norm, dim):
        super().add_norms(norm, dim)
        self.attention_out_norm = norm(dim)
        self.ffn_out_norm = norm(dim)

    def initialize(self):
        drop_path_after_norms(self)

    def forward(self, x, tokens=ALL):
        y = self.attention_out_norm(self.attn(self.attention_norm(x), tokens))
        x = x[:, tokens] + self.drop_path(y)
        x = x + self.drop_path(self.ffn_out_norm(self.ffn(self.ffn_norm(x))))
        return x


class LayerNormScaling(PreNorm):
    """x <- x + F(Norm(x) / sqrt(l)), block l = 1..L, for both branches F.

    Source: Sun et al. 2025 (arXiv 2502.05795), equation 4; lmsdss/LayerNorm-Scaling,
    peft_pretraining/modeling_llama.py.
    """

    def forward(self, x, tokens=ALL):
        scale = (self.index + 1) ** -0.5
        x = x[:, tokens] + self.attn(scale * self.attention_norm(x), tokens)
        x = x + self.ffn(scale * self.ffn_norm(x))
        return x


class Keel(Block):
    """x <- Norm(2L x + F(Norm(x))), for both branches F but the first: x <- x + Attn(Norm(x)).

    Source: Chen & Wei 2026 (arXiv 2601.19895); lucidrains/vit-pytorch, vit_with_keel_post_ln.py.
    """

    after_attention = ("attention_out_norm", "ffn_norm", "ffn_out_norm")

    def add_norms(self, norm, dim):
        super().add_norms(norm, dim)
        self.attention_out_norm = norm(dim) if self.index > 0 else nn.Identity()
        self.ffn_out_norm = norm(dim)
        self.alpha = 2 * self.depth
        self.attention_alpha = self.alpha if self.index > 0 else 1

    def forward(self, x, tokens=ALL):
        y = self.attn(self.attention_norm(x), tokens)
        x = self.attention_out_norm(self.attention_alpha * x[:, tokens] + y)
        x = self.ffn_out_norm(self.alpha * x + self.ffn(self.ffn_norm(x)))
        return x


def xavier(block, gain):
    """Xavier initialization of a block; the weights of value, out and the MLP times `gain`."""
    attn, ffn = block.attn, block.ffn
    for linear in (attn.query, attn.key):
        nn.init.xavier_uniform_(linear.weight)
    for linear in (attn.value, attn.out, ffn.fc1, ffn.fc2):
        nn.init.xavier_uniform_(linear.weight, gain)


def drop_path_after_norms(block):
    """Drop branches after their norms, which would turn a dropped branch into their bias."""
    block.drop_path = block.attn.drop_path
    block.attn.drop_path = block.ffn.drop_path = nn.Identity()
