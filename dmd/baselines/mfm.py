"""Factorised codes: one that predicts, and one a modality that helps to rebuild it."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from dmd.baselines.base import LSTM, Baseline, BaselineOutput, Triple, masks, mlp
from dmd.baselines.memory_fusion import MemoryFusion
from dmd.batch import Batch


def mmd(x: Tensor, y: Tensor) -> Tensor:
    """Squared maximum mean discrepancy of two samples (n, d) and (m, d), with a Gaussian kernel.

    Zero for equal samples, never negative; its square root is a distance of distributions.
    """

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        # Divided by d: the typical squared distance of two normal vectors grows with it.
        distance = (a[:, None] - b[None]).square().sum(dim=2)  # (n, m)
        return (-distance / a.shape[1]).exp().mean()

    x, y = x.float(), y.float()  # small differences of means
    return (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)).clamp_min(0)


class Decoder(nn.Module):
    """A sequence from a vector: an LSTM that sees the vector first and then only its own state.

    Public code feeds the state in twice, as input and as state: the same functions, with the sum of
    the two matrices in place of one.
    """

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.cells = nn.LSTM(width, width, batch_first=True)
        self.output = nn.Linear(width, outputs)

    def forward(self, x: Tensor, steps: int) -> Tensor:
        """(B, width) -> (B, steps, outputs)."""
        first = nn.functional.pad(x[:, None], (0, 0, 0, steps - 1))
        return self.output(self.cells(first)[0])


class MFM(Baseline):
    """Multimodal Factorization Model (Tsai et al., 2019).

    One code of all modalities, which predicts, and one code a modality, which does not; both
    together have to rebuild the modality. All four are to be distributed like normal noise.

    encoder: of the common code: "memory" is the Memory Fusion Network, for aligned clips; "lstm"
    joins the last states of an LSTM a modality; "auto" is the first where lengths are equal.
    hidden: width of the LSTMs. memory: of the Memory Fusion Network. code: width of the codes.
    factor: width of what networks make of a code. dropout: in these networks.
    reconstruction_weight: of the squared error over valid steps, a mean for each modality, summed.
    mmd_weight: of the discrepancy between codes and noise, summed over the codes. Both losses
    exist in training only.
    Faithful: the four codes and their factors, the encoders, decoders that start from the common
    and the modality's factor, prediction from the common one alone, all losses at once.
    Adapted: one width for all modalities; one weight for their reconstructions; padding does not
    count. Public code divides the kernel's squared distance by the squared width of the code, so
    that all codes look alike; here by the width. Clips without alignment need another encoder.
    Left out: the networks that stand in for a missing modality.
    """

    def __init__(
        self,
        widths: Triple,
        lengths: Triple,
        encoder: Literal["auto", "memory", "lstm"] = "auto",
        hidden: int = 48,
        memory: int = 64,
        code: int = 32,
        factor: int = 32,
        dropout: float = 0.2,
        reconstruction_weight: float = 0.5,
        mmd_weight: float = 1.0,
    ) -> None:
        super().__init__(widths, lengths)
        self.reconstruction_weight, self.mmd_weight = reconstruction_weight, mmd_weight
        aligned = len(set(lengths)) == 1
        if encoder == "memory" and not aligned:
            raise ValueError(f"encoder='memory' needs aligned clips: the lengths are {lengths}")
        self.fusion = (
            MemoryFusion(widths, hidden, memory, dropout)
            if encoder != "lstm" and aligned
            else nn.ModuleList(LSTM(width, hidden) for width in widths)
        )
        joined = 3 * hidden + (memory if isinstance(self.fusion, MemoryFusion) else 0)
        self.lstms = nn.ModuleList(LSTM(width, hidden) for width in widths)
        self.codes = nn.ModuleList(nn.Linear(n, code) for n in (hidden, hidden, hidden, joined))
        self.factors = nn.ModuleList(mlp(code, factor, factor, dropout) for _ in range(4))
        self.decoders = nn.ModuleList(Decoder(2 * factor, width) for width in widths)
        self.head = mlp(factor, factor, 1, dropout)

    def encode(self, batch: Batch) -> list[Tensor]:
        """A batch of B clips -> codes (B, code) of language, visual, acoustic, and of all three."""
        valid = masks(batch)
        pairs = zip(batch.features, valid, strict=True)
        features = [x.masked_fill(~mask[:, :, None], 0.0) for x, mask in pairs]
        last = self.last_states(self.lstms, features, valid)
        if not isinstance(self.fusion, MemoryFusion):
            common = torch.cat(self.last_states(self.fusion, features, valid), dim=1)
        elif len({x.shape[1] for x in features}) > 1:
            raise ValueError("MFM with a memory needs aligned clips, with as many steps in all")
        else:
            common = self.fusion(features, torch.stack(valid).any(dim=0))
        return [code(x) for code, x in zip(self.codes, [*last, common], strict=True)]

    @staticmethod
    def last_states(
        lstms: nn.ModuleList, features: Sequence[Tensor], valid: Sequence[Tensor]
    ) -> list[Tensor]:
        """Features (B, T_m, D_m), masks (B, T_m) -> last states (B, hidden), by modality."""
        return [lstm(x, mask)[1] for lstm, x, mask in zip(lstms, features, valid, strict=True)]

    def decode(self, factors: Sequence[Tensor], steps: Sequence[int]) -> list[Tensor]:
        """Factors (B, factor) of L, V, A and all -> sequences (B, steps[m], D_m)."""
        *own, common = factors
        parts = zip(self.decoders, own, steps, strict=True)
        return [decoder(torch.cat([common, x], dim=1), n) for decoder, x, n in parts]

    def reconstruction(self, rebuilt: Sequence[Tensor], batch: Batch) -> Tensor:
        """Mean squared error of the valid steps, summed over the modalities: a scalar."""
        parts = zip(rebuilt, batch.features, masks(batch), strict=True)
        return torch.stack([(x - y)[mask].square().mean() for x, y, mask in parts]).sum()

    def forward(self, batch: Batch) -> BaselineOutput:
        """A batch of B clips -> predictions (B,) and, in training, the two losses."""
        self.check(batch)
        codes = self.encode(batch)
        factors = [factor(z).relu() for factor, z in zip(self.factors, codes, strict=True)]
        prediction = self.head(factors[3]).squeeze(1)
        if not self.training:
            return BaselineOutput(prediction, {})
        rebuilt = self.decode(factors, [x.shape[1] for x in batch.features])
        noise = torch.stack([mmd(z, torch.randn_like(z)) for z in codes]).sum()
        losses = {
            "reconstruction": self.reconstruction_weight * self.reconstruction(rebuilt, batch),
            "mmd": self.mmd_weight * noise,
        }
        return BaselineOutput(prediction, losses)
