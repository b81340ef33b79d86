"""The Memory Fusion Network, which reads aligned sequences for other methods."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dmd.baselines.base import Triple, mlp


class MemoryFusion(nn.Module):
    """Memory Fusion Network (Zadeh et al., 2018): LSTMs side by side and a memory of all of them.

    At each step attention weighs the cells of all modalities before and after the step, and a
    gated memory takes up what it finds. Padded features have to be finite.
    """

    def __init__(self, widths: Triple, hidden: int, memory: int, dropout: float) -> None:
        super().__init__()
        self.lstms = nn.ModuleList(nn.LSTMCell(width, hidden) for width in widths)
        both = 6 * hidden
        self.attention = mlp(both, hidden, both, dropout)
        self.proposal = mlp(both, hidden, memory, dropout)
        self.keep = mlp(both + memory, hidden, memory, dropout)
        self.write = mlp(both + memory, hidden, memory, dropout)

    @staticmethod
    def read(lstm: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, T, D) -> states and cells at all steps, (B, T, hidden) each."""
        steps = [lstm(x[:, 0])]
        for t in range(1, x.shape[1]):
            steps.append(lstm(x[:, t], steps[-1]))
        states, cells = zip(*steps, strict=True)
        return torch.stack(states, dim=1), torch.stack(cells, dim=1)

    def forward(self, features: Sequence[Tensor], mask: Tensor) -> Tensor:
        """Features (B, T, D_m), mask (B, T) -> last states and memory, (B, 3 * hidden + memory)."""
        pairs = [self.read(lstm, x) for lstm, x in zip(self.lstms, features, strict=True)]
        states, after = (torch.cat(parts, dim=2) for parts in zip(*pairs, strict=True))
        before = torch.cat([torch.zeros_like(after[:, :1]), after[:, :-1]], dim=1)
        both = torch.cat([before, after], dim=2)  # (B, T, 6 * hidden)
        attended = self.attention(both).softmax(dim=2) * both
        proposal = self.proposal(attended).tanh()  # (B, T, memory)
        memory, memories = torch.zeros_like(proposal[:, 0]), []
        for t in range(mask.shape[1]):
            seen = torch.cat([attended[:, t], memory], dim=1)
            keep, write = self.keep(seen).sigmoid(), self.write(seen).sigmoid()
            memory = keep * memory + write * proposal[:, t]
            memories.append(memory)
        found = torch.cat([states, torch.stack(memories, dim=1)], dim=2)
        last = mask.sum(dim=1) - 1
        return found[torch.arange(len(mask), device=last.device), last]
