"""RAVEN: what face and voice do while a word is said moves the word's vector."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmd.baselines.base import LSTM, Baseline, BaselineOutput, Triple, masks
from dmd.batch import Batch

TINY = 1e-8  # keeps the division by the length of a zero shift finite, and its gradient


def frames_of_words(words: Tensor, frames: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """First and last frame of each word, (B, steps) each: equal shares of the valid frames.

    words, frames: (B,), how many of each a clip has; steps: words with padding. The shares cover
    all frames and overlap by one where the numbers do not divide; with as many frames as words,
    word t has frame t alone. Words in the padding get the last frame.
    """
    word = torch.arange(steps, device=words.device)
    words, frames = words[:, None], frames[:, None]
    first = word * frames // words
    last = ((word + 1) * frames + words - 1) // words - 1  # rounded up
    return torch.minimum(first, frames - 1), torch.minimum(last, frames - 1)


class RAVEN(Baseline):
    """Recurrent Attended Variation Embedding Network (Wang, Shen, Liu, Liang, Zadeh and Morency,
    2019): an LSTM reads words that the frames of face and voice have shifted.

    hidden: state of the LSTM over the words. cell: state of the two over the frames. limit: beta,
    the longest that a shift may be, as a share of the length of its word's vector. dropout: on the
    frames and on the shifted words.
    Faithful: for each non-verbal modality an LSTM that starts anew at each word and reads its
    frames; a gate for each, one number a word, from its state and the word; the shift h, linear in
    the gated states; the word e + min(1, beta |e| / |h|) h; the last state of an LSTM over these.
    Adapted: the gate passes a sigmoid, which the public code leaves out; the public code also cuts
    the gradient before the frames' LSTMs and again after the shift, so that only the LSTM over the
    words and its head learn: here all of it does. A learned frame opens each word, since aligned
    clips have one frame a word, which alone would leave the LSTM nothing to recur. Where frames are
    not assigned to words (unaligned clips), each word gets an equal share of them. The words are
    the language features, without an embedding to train. No normalisation of the acoustic features.
    """

    def __init__(
        self,
        widths: Triple,
        lengths: Triple,
        hidden: int = 64,
        cell: int = 32,
        limit: float = 0.2,
        dropout: float = 0.2,
    ) -> None:
        super().__init__(widths, lengths)
        if limit <= 0:
            raise ValueError(f"limit must be above 0, not {limit}")
        self.limit = limit
        language, *nonverbal = widths
        self.dropout = nn.Dropout(dropout)
        self.embed = nn.ModuleList(nn.Linear(width, cell) for width in nonverbal)
        self.start = nn.Parameter(torch.randn(len(nonverbal), cell))
        self.lstms = nn.ModuleList(LSTM(cell, cell) for _ in nonverbal)
        self.gates = nn.ModuleList(nn.Linear(cell + language, 1) for _ in nonverbal)
        self.shift = nn.Linear(2 * cell, language)
        self.words = LSTM(language, hidden)
        self.head = nn.Linear(hidden, 1)

    def frames(self, m: int, x: Tensor, mask: Tensor, words: Tensor) -> Tensor:
        """Frames (B, T_m, D_m) and their mask, mask of the words (B, T_L) -> (B, T_L, cell).

        m: 0 for visual, 1 for acoustic. What a word gets is the state after its last frame.
        """
        x = self.embed[m](self.dropout(x))  # (B, T_m, cell)
        first, last = frames_of_words(words.sum(dim=1), mask.sum(dim=1), words.shape[1])
        count = last - first + 1  # (B, T_L)
        offset = torch.arange(int(count.max()), device=x.device)
        index = torch.minimum(first[:, :, None] + offset, last[:, :, None])
        x = x[torch.arange(len(x), device=x.device)[:, None, None], index]
        start = self.start[m].expand(*words.shape, 1, -1)
        x = torch.cat([start, x], dim=2)  # (B, T_L, 1 + frames a word, cell)
        valid = F.pad(offset < count[:, :, None], (1, 0), value=True)
        _, state = self.lstms[m](x.flatten(0, 1), valid.flatten(0, 1))
        return state.unflatten(0, words.shape)

    def shifts(self, batch: Batch) -> Tensor:
        """How far each word is moved, (B, T_L, D_L)."""
        words, *nonverbal = batch.features
        mask, *others = masks(batch)
        gated = []
        for m, (x, valid) in enumerate(zip(nonverbal, others, strict=True)):
            state = self.frames(m, x, valid, mask)
            gate = self.gates[m](torch.cat([state, words], dim=2)).sigmoid()  # (B, T_L, 1)
            gated.append(gate * state)
        shift = self.shift(torch.cat(gated, dim=2))
        most = self.limit * torch.linalg.vector_norm(words, dim=2, keepdim=True)
        length = torch.linalg.vector_norm(shift, dim=2, keepdim=True)
        return shift * (most / length.clamp_min(TINY)).clamp_max(1.0)

    def forward(self, batch: Batch) -> BaselineOutput:
        """A batch of B clips -> predictions (B,)."""
        self.check(batch)
        shifted = self.dropout(batch.language + self.shifts(batch))
        _, last = self.words(shifted, masks(batch)[0])
        return BaselineOutput(self.head(last).squeeze(1), {})
