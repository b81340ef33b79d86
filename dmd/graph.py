"""The graph distillation unit: who teaches whom, and how strongly (Eqs. 7-9)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class GraphOutput:
    """What a graph over M modalities says of a batch of B clips.

    logits: (M, B), the prediction f(X_m) from each modality alone.
    edges: (B, M, M), the weight W_ij of the distillation from modality i to modality j; the
        diagonal is zero and the rest of each clip's matrix sums to one (all zero in a unit that
        does not distil).
    distances: (B, M, M), the distance E_ij between the logits of i and j.
    features: (M, B, d'), the vectors the unit was given.
    """

    logits: Tensor
    edges: Tensor
    distances: Tensor
    features: Tensor


class GDUnit(nn.Module):
    """The graph distillation unit for any number of modalities M >= 2.

    feature_dim: width d' of the modality vectors.
    stop_teacher_gradient: E_ij moves the student j only. The distance is symmetric, so without
        this the edges i -> j and j -> i pull the same two logits together in the same way.
    edge_temperature: edge logits are divided by it before the softmax.
    distil: whether the unit has edges; without them only the regressor remains.
    regress: whether the unit has a regressor; without it `forward` is given the logits.
    edge_hidden: 0: g reads logits and features as they are; more: linear maps of both to that
        many channels each. Without a nonlinearity in between g is linear all the same.

    `regressor` is f with theta_1, `edge` is g with theta_2 (Eq. 8).
    """

    def __init__(
        self,
        feature_dim: int,
        modalities: int = 3,
        stop_teacher_gradient: bool = True,
        edge_temperature: float = 1.0,
        distil: bool = True,
        regress: bool = True,
        edge_hidden: int = 0,
    ) -> None:
        super().__init__()
        if modalities < 2:
            raise ValueError(f"a distillation graph needs at least 2 modalities, not {modalities}")
        self.modalities = modalities
        self.stop_teacher_gradient = stop_teacher_gradient
        self.edge_temperature = edge_temperature
        self.feature_dim = feature_dim
        self.regressor = nn.Linear(feature_dim, 1) if regress else None
        node = 2 * edge_hidden if edge_hidden else feature_dim + 1
        self.edge = nn.Linear(2 * node, 1) if distil else None
        self.edge_logit = nn.Linear(1, edge_hidden) if distil and edge_hidden else None
        self.edge_feature = nn.Linear(feature_dim, edge_hidden) if distil and edge_hidden else None

    def forward(self, features: Tensor, logits: Tensor | None = None) -> GraphOutput:
        """Modality vectors (M, B, d') -> logits (M, B), edges (B, M, M), distances (B, M, M).

        logits (M, B) are given if and only if the unit has no regressor.
        """
        if features.dim() != 3 or features.shape[::2] != (self.modalities, self.feature_dim):
            raise ValueError(
                f"expected features of shape ({self.modalities}, clips, {self.feature_dim}), "
                f"got {tuple(features.shape)}"
            )
        if (logits is None) == (self.regressor is None):
            raise ValueError("logits go with a unit that has no regressor, and only with that")
        if self.regressor is not None:
            logits = self.regressor(features).squeeze(-1)
        assert logits is not None
        edges = self.edge_weights(features, logits)
        return GraphOutput(logits, edges, self.distances(logits), features)

    def distances(self, logits: Tensor) -> Tensor:
        """Logits (M, B) -> E (B, M, M) with E_ij = |f_i - f_j|, teacher i, student j (Eq. 7)."""
        student = logits.T
        teacher = student.detach() if self.stop_teacher_gradient else student
        return (teacher[:, :, None] - student[:, None, :]).abs()

    def edge_weights(self, features: Tensor, logits: Tensor) -> Tensor:
        """Vectors (M, B, d') and logits (M, B) -> W (B, M, M), a softmax over all edges (Eq. 8)."""
        count = self.modalities
        if self.edge is None:
            return features.new_zeros(features.shape[1], count, count)
        logits = logits[:, :, None]
        if self.edge_logit is not None and self.edge_feature is not None:
            logits, features = self.edge_logit(logits), self.edge_feature(features)
        node = torch.cat([logits, features], dim=2).transpose(0, 1)  # (B, M, width of a node)
        source = node[:, :, None, :].expand(-1, -1, count, -1)  # row i of the pair (i, j)
        target = node[:, None, :, :].expand(-1, count, -1, -1)  # column j of the pair (i, j)
        score = self.edge(torch.cat([source, target], dim=3)).squeeze(-1)  # (B, M, M)
        loops = torch.eye(count, dtype=torch.bool, device=score.device)
        score = (score / self.edge_temperature).masked_fill(loops, -torch.inf)
        return score.flatten(1).softmax(dim=1).unflatten(1, (count, count))
