"""Graph-MFN: every group of modalities is a vertex, and a memory keeps what they made of a step."""

from itertools import combinations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmd.baselines.base import LSTM, Baseline, BaselineOutput, Triple, masks, mlp
from dmd.batch import Batch

# The groups of modalities by size; a letter a modality: L, V, A, LV, LA, VA, LVA.
GROUPS = tuple("".join(group) for n in (1, 2, 3) for group in combinations("LVA", n))
# What feeds a vertex: the smaller groups in it. All vertices feed the one that sums up the graph.
SOURCES = {group: [part for part in GROUPS if set(part) < set(group)] for group in GROUPS[3:]} | {
    "all": list(GROUPS)
}
EDGES = [(source, vertex) for vertex, sources in SOURCES.items() for source in sources]


class GraphMFN(Baseline):
    """Graph Memory Fusion Network with the Dynamic Fusion Graph (Zadeh, Liang, Poria, Cambria and
    Morency, 2018): at every step a graph over the seven groups of modalities decides how strongly
    each group feeds the larger ones, and a gated memory gathers the result over the clip.

    hidden: width of the LSTMs' states. node: width of a vertex. memory: of the memory. inner: of
    the hidden layer of each network. dropout: in all of them.
    Faithful: an LSTM a modality; single vertices from its states at this step and the one before;
    a network for each larger group, fed by all smaller groups within it, each times its efficacy;
    a network from the three single vertices to all 19 efficacies; a vertex fed by all seven; a
    memory with gates for keeping and for writing; last states and memory give the score. It takes
    aligned clips only.
    Adapted: vertices are made of the LSTMs' outputs, as in public code. The networks have a
    nonlinearity and efficacies pass a sigmoid, which that code leaves out. It also keeps the
    networks of the groups in a plain dict, where the optimiser does not find them (208,656
    parameters at its settings): here they are trained. The memory stops at a clip's last valid
    step.
    """

    aligned_only = True

    def __init__(
        self,
        widths: Triple,
        lengths: Triple,
        hidden: int = 32,
        node: int = 32,
        memory: int = 32,
        inner: int = 32,
        dropout: float = 0.2,
    ) -> None:
        super().__init__(widths, lengths)
        self.memory = memory
        self.lstms = nn.ModuleList(LSTM(width, hidden) for width in widths)
        self.singles = nn.ModuleList(nn.Linear(2 * hidden, node) for _ in widths)
        self.efficacy = mlp(3 * node, inner, len(EDGES), dropout)
        self.groups = nn.ModuleDict(
            {name: mlp(len(parts) * node, inner, node, dropout) for name, parts in SOURCES.items()}
        )
        self.content = mlp(node, inner, memory, dropout)
        self.gates = mlp(node + memory, inner, 2 * memory, dropout)
        self.head = mlp(3 * hidden + memory, inner, 1, dropout)

    def efficacies(self, singles: list[Tensor]) -> dict[tuple[str, str], Tensor]:
        """Single vertices (B, T, node) -> for each edge (source, vertex) a weight (B, T, 1)."""
        weights = self.efficacy(torch.cat(singles, dim=2)).sigmoid()  # (B, T, 19)
        return dict(zip(EDGES, weights.split(1, dim=2), strict=True))

    def vertices(
        self, singles: list[Tensor], efficacies: dict[tuple[str, str], Tensor]
    ) -> dict[str, Tensor]:
        """Single vertices and weights of the edges -> all vertices (B, T, node) by name."""
        found = dict(zip("LVA", singles, strict=True))
        for name, parts in SOURCES.items():  # smaller groups come first
            fed = [found[part] * efficacies[part, name] for part in parts]
            found[name] = self.groups[name](torch.cat(fed, dim=2))
        return found

    def remember(self, graph: Tensor, mask: Tensor) -> Tensor:
        """What the graph says of each step (B, T, node), mask (B, T) -> memory (B, memory)."""
        content = self.content(graph).tanh()  # (B, T, memory)
        kept = graph.new_zeros(len(graph), self.memory)
        for step, new, valid in zip(graph.unbind(1), content.unbind(1), mask.T, strict=True):
            keep, write = self.gates(torch.cat([step, kept], dim=1)).sigmoid().chunk(2, dim=1)
            kept = torch.where(valid[:, None], keep * kept + write * new, kept)
        return kept

    def forward(self, batch: Batch) -> BaselineOutput:
        """A batch of B clips -> predictions (B,)."""
        self.check(batch)
        mask = masks(batch)[0]  # aligned: the same in all modalities
        singles, ends = [], []
        for x, lstm, single in zip(batch.features, self.lstms, self.singles, strict=True):
            states, last = lstm(x, mask)  # (B, T, hidden), (B, hidden)
            before = F.pad(states, (0, 0, 1, 0))[:, :-1]  # zero before the first step
            singles.append(single(torch.cat([before, states], dim=2)).relu())
            ends.append(last)
        graph = self.vertices(singles, self.efficacies(singles))["all"]
        joined = torch.cat([*ends, self.remember(graph, mask)], dim=1)
        return BaselineOutput(self.head(joined).squeeze(1), {})
