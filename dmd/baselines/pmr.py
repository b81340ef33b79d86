"""PMR: a message hub that takes from every modality, and gives back, layer after layer."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dmd.attention import EncoderLayer, LayerNorm, sinusoidal_positions, visible_keys
from dmd.baselines.base import Baseline, BaselineOutput, Triple, masks, mean_over_time
from dmd.batch import MODALITIES, Batch
from dmd.decoupling import ShallowEncoder
from dmd.fusion import ResidualRegressor
from dmd.kernels import drop


class Reinforcement(nn.Module):
    """A target attends to a source; a filter decides how much of what it learns is passed on."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.layer = EncoderLayer(dim, heads, [dropout])
        self.filter = nn.Linear(2 * dim, dim)

    def forward(self, target: Tensor, source: Tensor, source_mask: Tensor) -> Tensor:
        """Target (B, T, d), source (B, S, d), mask (B, S) -> reinforced target (B, T, d)."""
        visible = visible_keys(target[None], source[None], source_mask[None])
        reinforced = self.layer(target[None], source[None], visible)[0]
        passed = self.filter(torch.cat([target, reinforced], dim=2)).sigmoid()
        return target + passed * (reinforced - target)


class ExchangeLayer(nn.Module):
    """One round: the hub reinforces each modality, each modality reinforces the hub."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.to_modality = nn.ModuleList(Reinforcement(dim, heads, dropout) for _ in MODALITIES)
        self.to_message = nn.ModuleList(Reinforcement(dim, heads, dropout) for _ in MODALITIES)
        # One score for all: the softmax compares the modalities' proposals.
        self.score = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, 1, bias=False))

    def forward(
        self,
        features: Sequence[Tensor],
        message: Tensor,
        valid: Sequence[Tensor],
        message_mask: Tensor,
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """Features (B, T_m, d), message (B, S, d), their masks -> both reinforced, and weights.

        The weights (3, B, S) say how much of each step of the message comes from which modality.
        """
        parts = zip(self.to_modality, features, strict=True)
        features = [reinforce(x, message, message_mask) for reinforce, x in parts]
        parts_back = zip(self.to_message, features, valid, strict=True)
        proposals = torch.stack([back(message, x, mask) for back, x, mask in parts_back])
        weights = self.score(proposals).softmax(dim=0)  # (3, B, S, 1)
        return features, (weights * proposals).sum(dim=0), weights.squeeze(3)


class PMR(Baseline):
    """Progressive Modality Reinforcement, after the paper (Lv et al., CVPR 2021).

    A hub holds a common message: at first the steps of all modalities, one after the other in time.
    In each layer every modality is reinforced by the message through crossmodal attention, then the
    message by every reinforced modality. Takes aligned and unaligned clips.
    dim: width of a modality and of the message. heads: of the attention. layers: of exchange.
    top_layers: of the self-attention over message and modalities. kernels: steps under the
    convolutions (L, V, A). embedding_dropout: on the embedded sequences. attention_dropout: on the
    attention weights. output_dropout: in the network that reads the result.
    Faithful, to the paper's summary: the hub, the exchange in both directions with all modalities
    through crossmodal attention, a new message made of the features just reinforced, repetition, a
    prediction from the reinforced features.
    Inferred: no official code exists. The first message is the joined steps, and no two units share
    weights. The filter of a unit is a sigmoid gate per channel, on target and reinforced target,
    that mixes the two. The three proposals for a new message are mixed by a softmax over the
    modalities, step by step. Position codes are added once, before the first layer. Self-attention
    reads the joined message and modalities, and the mean over time of each of these four parts,
    side by side, goes to a residual network: in this way long sequences do not count more.
    """

    def __init__(
        self,
        widths: Triple,
        lengths: Triple,
        dim: int = 30,
        heads: int = 5,
        layers: int = 2,
        top_layers: int = 1,
        kernels: Triple = (3, 3, 3),
        embedding_dropout: float = 0.2,
        attention_dropout: float = 0.1,
        output_dropout: float = 0.1,
    ) -> None:
        super().__init__(widths, lengths)
        if dim % heads:
            raise ValueError(f"heads={heads} must divide dim={dim}")
        self.embedding_dropout = embedding_dropout
        self.shallow = nn.ModuleList(
            ShallowEncoder(width, dim, kernel)
            for width, kernel in zip(widths, kernels, strict=True)
        )
        self.layers = nn.ModuleList(
            ExchangeLayer(dim, heads, attention_dropout) for _ in range(layers)
        )
        self.top = nn.ModuleList(
            EncoderLayer(dim, heads, [attention_dropout]) for _ in range(top_layers)
        )
        self.norm = LayerNorm(1, dim)
        self.head = ResidualRegressor(4 * dim, 4 * dim, output_dropout)

    def embed(self, batch: Batch, valid: Sequence[Tensor]) -> list[Tensor]:
        """A batch of B clips -> each modality's steps at one width, with position codes."""
        found = []
        for encode, x, mask in zip(self.shallow, batch.features, valid, strict=True):
            x = encode(x, mask)  # (B, T_m, d)
            x = math.sqrt(x.shape[2]) * x + sinusoidal_positions(*x.shape[1:], x.dtype, x.device)
            dropped = self.training and self.embedding_dropout
            found.append(drop(x, self.embedding_dropout) if dropped else x)
        return found

    def exchange(self, batch: Batch) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The reinforced modalities (B, T_m, d); all messages (B, S, d), first to last; weights.

        S is the sum of the modalities' lengths; the weights (3, B, S) are those of each layer.
        """
        self.check(batch)
        valid = masks(batch)
        features = self.embed(batch, valid)
        messages, weights = [torch.cat(features, dim=1)], []
        message_mask = torch.cat(valid, dim=1)
        for layer in self.layers:
            features, message, shares = layer(features, messages[-1], valid, message_mask)
            messages.append(message)
            weights.append(shares)
        return features, messages, weights

    def forward(self, batch: Batch) -> BaselineOutput:
        """A batch of B clips -> predictions (B,)."""
        features, messages, _ = self.exchange(batch)
        valid = masks(batch)
        part_masks = [torch.cat(valid, dim=1), *valid]  # of the message, then the modalities
        joined = torch.cat([messages[-1], *features], dim=1)[None]  # (1, B, 2S, d)
        visible = visible_keys(joined, joined, torch.cat(part_masks, dim=1)[None])
        for layer in self.top:
            joined = layer(joined, None, visible)
        parts = self.norm(joined)[0].split([mask.shape[1] for mask in part_masks], dim=1)
        means = [mean_over_time(x, mask) for x, mask in zip(parts, part_masks, strict=True)]
        return BaselineOutput(self.head(torch.cat(means, dim=1))[0], {})
