"""MCTN: a representation of words from which face and voice can be told."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmd.baselines.base import LSTM, Baseline, BaselineOutput, Triple, masks
from dmd.batch import Batch


def attend(scores: Tensor, states: Tensor, mask: Tensor) -> Tensor:
    """Mean of states (B, T, d), weighted by the softmax of scores (B, T, 1) over valid steps."""
    weights = scores.masked_fill(~mask[:, :, None], -torch.inf).softmax(dim=1)
    return (weights * states).sum(dim=1)  # (B, d)


def squared_error(target: Tensor, found: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error of (B, T, D) over the valid steps of all clips."""
    return (found[mask] - target[mask]).square().mean()


class Translator(nn.Module):
    """One sequence into another: a two-way LSTM reads, an LSTM cell with attention writes.

    width: of what is read; written: of what is written; hidden: of both states.
    """

    def __init__(self, width: int, written: int, hidden: int) -> None:
        super().__init__()
        self.reader = LSTM(width, hidden, bidirectional=True)
        self.cell = nn.LSTMCell(hidden, hidden)
        self.key = nn.Linear(hidden, hidden)
        self.query = nn.Linear(hidden, hidden, bias=False)
        self.score = nn.Linear(hidden, 1, bias=False)  # a softmax over steps ignores a bias
        self.write = nn.Linear(hidden, written)

    def encode(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, T, width) -> (B, T, hidden), the sum of both directions."""
        states, _ = self.reader(x, mask)
        return states.unflatten(2, (2, -1)).sum(dim=2)

    def decode(self, states: Tensor, mask: Tensor, steps: int) -> Tensor:
        """States (B, T, hidden) with their mask -> (B, steps, written)."""
        key = self.key(states)
        memory = hidden = states.new_zeros(len(states), states.shape[2])
        written = []
        for _ in range(steps):
            scores = self.score(torch.tanh(key + self.query(memory)[:, None]))
            hidden, memory = self.cell(attend(scores, states, mask), (hidden, memory))
            written.append(hidden)
        return self.write(torch.stack(written, dim=1))


class MCTN(Baseline):
    """Multimodal Cyclic Translation Network (Pham, Liang, Manzini, Morency and Póczos, 2019):
    words are translated into the face and back, what was understood of them into the voice, and
    the sentiment is read from what that took. Once trained it needs the words alone.

    hidden: width of all states. visual_weight, cycle_weight, acoustic_weight: of the squared
    errors of the translations to visual, back to language, and to acoustic. dropout: on the
    vector from which the sentiment is read.
    Faithful: the same two-way LSTM and attentive decoder translate language to visual and what
    came out back to language, their features filled up with zeros to one width; its states are
    what a second pair translates to acoustic; an LSTM with attention over the states of the second
    reader gives the score; the weights of the losses.
    Adapted: the errors count valid steps and true channels only. The decoder writes as many steps
    as the batch has. Dropout, and no decay of the last layer's weights. Translations run in
    training only, since the prediction does not depend on them.
    """

    def __init__(
        self,
        widths: Triple,
        lengths: Triple,
        hidden: int = 32,
        visual_weight: float = 0.1,
        cycle_weight: float = 0.1,
        acoustic_weight: float = 0.1,
        dropout: float = 0.2,
    ) -> None:
        super().__init__(widths, lengths)
        language, visual, acoustic = widths
        self.weights = {
            "to_visual": visual_weight,
            "back_to_language": cycle_weight,
            "to_acoustic": acoustic_weight,
        }
        self.width = max(language, visual)
        self.first = Translator(self.width, self.width, hidden)
        self.second = Translator(hidden, acoustic, hidden)
        self.lstm = LSTM(hidden, hidden)
        self.score = nn.Linear(hidden, 1)
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(hidden, 1))

    def fill(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, width), with zeros where D is less."""
        return F.pad(x, (0, self.width - x.shape[2]))

    def forward(self, batch: Batch) -> BaselineOutput:
        """A batch of B clips -> predictions (B,), and in training the translation losses."""
        self.check(batch)
        words = masks(batch)[0]
        states = self.first.encode(self.fill(batch.language), words)  # (B, T_L, hidden)
        joint = self.second.encode(states, words)  # (B, T_L, hidden)
        read, _ = self.lstm(joint, words)
        clip = attend(torch.tanh(self.score(read)), read, words)  # (B, hidden)
        losses = self.translations(batch, states, joint) if self.training else {}
        return BaselineOutput(self.head(clip).squeeze(1), losses)

    def translations(self, batch: Batch, states: Tensor, joint: Tensor) -> dict[str, Tensor]:
        """What the first and the second reader saw (B, T_L, hidden) -> weighted errors by name."""
        language, visual, acoustic = batch.features
        words, face, voice = masks(batch)
        seen = self.first.decode(states, words, visual.shape[1])[:, :, : visual.shape[2]]
        again = self.first.encode(self.fill(seen), face)
        said = self.first.decode(again, face, language.shape[1])[:, :, : language.shape[2]]
        heard = self.second.decode(joint, words, acoustic.shape[1])
        errors = {
            "to_visual": squared_error(visual, seen, face),
            "back_to_language": squared_error(language, said, words),
            "to_acoustic": squared_error(acoustic, heard, voice),
        }
        return {name: self.weights[name] * error for name, error in errors.items()}
