"""The token heads with PyTorch's own layers in them, weights copied: what tests and the benchmark hold ours against."""

from copy import deepcopy

import torch
from torch import Tensor, nn

from mmfuse.attention import MultiHeadAttention
from mmfuse.token_fusion import Block, BottleneckHead


@torch.no_grad()
def copy_attention(ours: MultiHeadAttention, theirs: nn.MultiheadAttention):
    "Our four linear maps into PyTorch's packed parameters."
    three = ours.q, ours.k, ours.v
    theirs.in_proj_weight.copy_(torch.cat([x.weight for x in three]))
    theirs.in_proj_bias.copy_(torch.cat([x.bias for x in three]))
    theirs.out_proj.load_state_dict(ours.out.state_dict())


class MhaBlock(nn.Module):
    "`Block` with `nn.MultiheadAttention`."

    def __init__(self, block: Block):
        super().__init__()
        ours, d = block.attention, block.norm.normalized_shape[0]
        self.norm_q, self.norm_kv, self.norm = map(
            deepcopy, (block.norm_q, block.norm_kv, block.norm)
        )
        self.mlp = deepcopy(block.mlp)
        self.attention = nn.MultiheadAttention(
            d, ours.n_heads, ours.dropout, batch_first=True, dtype=ours.q.weight.dtype
        )
        copy_attention(ours, self.attention)

    def forward(self, q: Tensor, kv: Tensor, mask: Tensor | None = None) -> Tensor:
        q = q.expand(len(kv), -1, -1)
        kv, ignore = self.norm_kv(kv), None if mask is None else ~mask
        read, _ = self.attention(
            self.norm_q(q), kv, kv, key_padding_mask=ignore, need_weights=False
        )
        q = q + read
        return q + self.mlp(self.norm(q))


def _feed_forward(block: Block, layer: nn.Module):
    layer.linear1.load_state_dict(block.mlp[0].state_dict())
    layer.linear2.load_state_dict(block.mlp[3].state_dict())


def _arguments(block: Block) -> dict:
    ours, wide = block.attention, block.mlp[0]
    return dict(
        d_model=wide.in_features, nhead=ours.n_heads, dim_feedforward=wide.out_features,
        dropout=ours.dropout, activation="gelu", batch_first=True, norm_first=True,
        dtype=wide.weight.dtype,
    )  # fmt: skip


class DecoderBlock(nn.Module):
    "`Block` as `nn.TransformerDecoderLayer`, whose self-attention of the queries adds nothing."

    def __init__(self, block: Block):
        super().__init__()
        self.norm_kv = deepcopy(block.norm_kv)
        self.layer = layer = nn.TransformerDecoderLayer(**_arguments(block))
        copy_attention(block.attention, layer.multihead_attn)
        _feed_forward(block, layer)
        layer.norm2.load_state_dict(block.norm_q.state_dict())
        layer.norm3.load_state_dict(block.norm.state_dict())
        nn.init.zeros_(layer.self_attn.out_proj.weight)
        nn.init.zeros_(layer.self_attn.out_proj.bias)

    def forward(self, q: Tensor, kv: Tensor, mask: Tensor | None = None) -> Tensor:
        ignore = None if mask is None else ~mask
        q = q.expand(len(kv), -1, -1)
        return self.layer(q, self.norm_kv(kv), memory_key_padding_mask=ignore)


def encoder_layer(block: Block) -> nn.TransformerEncoderLayer:
    "`Block` that reads itself, if its two norms are the same."
    layer = nn.TransformerEncoderLayer(**_arguments(block))
    copy_attention(block.attention, layer.self_attn)
    _feed_forward(block, layer)
    layer.norm1.load_state_dict(block.norm_q.state_dict())
    layer.norm2.load_state_dict(block.norm.state_dict())
    return layer


def with_torch(head: nn.Module, kind: type[nn.Module] = MhaBlock) -> nn.Module:
    "A copy of a head in which every `Block` is PyTorch's."
    head = deepcopy(head)
    for parent in list(head.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Block):
                setattr(parent, name, kind(child))
    return head.train(head.training)


class PlainBottleneck(nn.Module):
    "MBT from `nn.TransformerEncoderLayer`: both sides whole in every layer (Nagrani et al. 2021, equations 8 and 9)."

    def __init__(self, head: BottleneckHead):
        super().__init__()
        self.head = deepcopy(head)
        self.pairs = nn.ModuleList(
            nn.ModuleList(encoder_layer(b) for b in pair) for pair in head.layers
        )
        self.train(head.training)

    def forward(self, img: Tensor, txt: Tensor, mask: Tensor) -> Tensor:
        img, txt, mask = self.head.projected(img, txt, mask)
        shared = self.head.bottleneck.expand(len(img), -1, -1)
        k = shared.shape[1]
        ignore = ~torch.cat([mask.new_ones(len(mask), k), mask], 1)
        for see, read in self.pairs:
            a = see(torch.cat([shared, img], 1))
            b = read(torch.cat([shared, txt], 1), src_key_padding_mask=ignore)
            shared, img, txt = (a[:, :k] + b[:, :k]) / 2, a[:, k:], b[:, k:]
        return self.head.classifier(self.head.norm(shared).mean(1))
