"""Multimodal Transformer with graph distillation between its three reinforced modalities."""

from torch import Tensor

from dmd.baselines.base import BaselineOutput, Triple
from dmd.baselines.mult import MulT
from dmd.batch import Batch
from dmd.graph import GDUnit, GraphOutput
from dmd.losses import distillation, task


class MulTGD(MulT):
    """MulT with a GD-Unit (Li et al., CVPR 2023, Table 5), for aligned and unaligned clips.

    The unit reads the states (2d wide) from which MulT predicts; it adds losses and leaves the
    prediction as it is: with the same weights both methods predict the same.
    dim, heads, layers, kernels, causal, embedding_dropout, attention_dropout, output_dropout: as
    in MulT. distillation: weight of Eq. 9. unimodal: weight of the task loss of each of the
    unit's three logits; those of clips without labels have none.
    Faithful: one unit for the three reinforced modalities (Eqs. 7-9), the weight that the paper
    gives to distillation (lambda_2 of Eq. 11).
    Inferred: the paper has one sentence on this method. Like DMD here, f of Eq. 8 learns from a
    task loss of its own, which reaches the states as well, and a teacher gets no gradient. The
    unit's vectors are the last steps, which MulT predicts from, not means over time. Set
    distillation to 0 to tell what the edges add from what the unimodal losses do.
    """

    def __init__(
        self,
        widths: Triple,
        lengths: Triple,
        dim: int = 30,
        heads: int = 5,
        layers: int = 4,
        kernels: Triple = (3, 3, 3),
        causal: bool = False,
        embedding_dropout: float = 0.25,
        attention_dropout: float = 0.1,
        output_dropout: float = 0.1,
        distillation: float = 0.05,
        unimodal: float = 1.0,
    ) -> None:
        dropouts = embedding_dropout, attention_dropout, output_dropout
        super().__init__(widths, lengths, dim, heads, layers, kernels, causal, *dropouts)
        self.unit = GDUnit(2 * dim)
        self.weights = {"distillation": distillation, "unimodal": unimodal}

    def graph(self, batch: Batch) -> GraphOutput:
        """A batch of B clips -> their logits (3, B), edges and distances (B, 3, 3)."""
        found: GraphOutput = self.unit(self.states(batch))
        return found

    def forward(self, batch: Batch) -> BaselineOutput:
        """A batch of B clips -> predictions (B,), and what the unit adds to the loss."""
        graph = self.graph(batch)
        losses: dict[str, Tensor] = {"distillation": distillation(graph.edges, graph.distances)}
        if batch.label is not None:  # the mean over heads and clips -> the sum over heads
            losses["unimodal"] = len(graph.logits) * task(graph.logits, batch.label)
        weighted = {name: self.weights[name] * x for name, x in losses.items()}
        return BaselineOutput(self.predict(graph.features), weighted)
