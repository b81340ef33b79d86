"""Decoupling each modality into a common and a private part, and back (Sec. 3.1, Eqs. 1-3)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dmd.batch import MODALITIES, PerModality


@dataclass
class Decoupled:
    """The parts of one batch; each field holds a tensor (B, T_m, d) a modality."""

    common: PerModality[Tensor]
    private: PerModality[Tensor]
    reconstructed: PerModality[Tensor]
    private_again: PerModality[Tensor]


def shorten(mask: Tensor, lost: int) -> Tensor:
    """Mask (B, T) of a sequence -> (B, T - lost) of one that lost `lost` steps; each clip keeps
    at least one.
    """
    if lost == 0:
        return mask
    first = torch.arange(mask.shape[1] - lost, device=mask.device) == 0
    return mask[:, lost:] | first


class ShallowEncoder(nn.Module):
    """A temporal convolution that brings one modality to the width d and keeps its length T.

    width: input features D_m; dim: output features d; kernel: steps under the convolution.
    padding: `valid` keeps only the steps whose window lies inside the sequence, T - kernel + 1.
    skip_equal: leave features that are d wide as they are.
    """

    def __init__(
        self, width: int, dim: int, kernel: int, padding: str = "same", skip_equal: bool = False
    ) -> None:
        super().__init__()
        self.skip = skip_equal and width == dim
        self.lost = kernel - 1 if padding == "valid" and not self.skip else 0
        self.convolution = nn.Conv1d(width, dim, kernel, padding=padding, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Features (B, T, D_m), mask (B, T) -> shallow features (B, T', d), zero where padded.

        Without a mask no step is padded.
        """
        if mask is not None:  # else padding reaches valid steps through the kernel
            x = x.masked_fill(~mask[:, :, None], 0.0)
        if self.skip:
            return x
        x = self.convolution(x.transpose(1, 2)).transpose(1, 2).contiguous()
        return x if mask is None else x.masked_fill(~shorten(mask, self.lost)[:, :, None], 0.0)


class Decoupling(nn.Module):
    """One shared encoder, and a private encoder and decoder a modality (Eq. 1).

    All of them are linear maps of one time step. Without a bias they leave padded steps zero.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.common_encoder = nn.Linear(dim, dim, bias=False)
        self.private_encoders = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in MODALITIES)
        self.decoders = nn.ModuleList(nn.Linear(2 * dim, dim, bias=False) for _ in MODALITIES)

    def forward(self, shallow: Sequence[Tensor]) -> Decoupled:
        """Shallow features, (B, T_m, d) a modality -> their parts and the way back (Eqs. 1-3)."""
        common, private, reconstructed, private_again = [], [], [], []
        for x, encode, decode in zip(shallow, self.private_encoders, self.decoders, strict=True):
            common.append(self.common_encoder(x))
            private.append(encode(x))
            reconstructed.append(decode(torch.cat([common[-1], private[-1]], dim=-1)))
            private_again.append(encode(reconstructed[-1]))
        return Decoupled(
            PerModality(*common),
            PerModality(*private),
            PerModality(*reconstructed),
            PerModality(*private_again),
        )
