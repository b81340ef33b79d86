"""Synthetic clips whose truth is known: film reviews that nobody gave, shaped like CMU-MOSI.

How a clip comes about:
1. A sentiment s in [-3, 3] is drawn, and one to three emotional events. Time runs from 0 to 1.
   The valence v(t) is a constant mood plus a bump at each event, with mean s over time; the
   arousal a(t) is a bump of height alike at each event, whatever its sign. Both are shared by all
   modalities.
2. Modality m is reliable to a degree r_m between 0 and 1 and late by a lag l_m (early if
   negative). It shows the valence r_m v(t - l_m) + decoys(t) and the arousal r_m a(t - l_m).
   A decoy is a bump of valence that means nothing and comes without arousal: so the time at which
   something shows tells whether it counts, and the mean over time does not.
3. Besides, each modality has three private factors, half the speaker's, half the clip's, and
   independent of the sentiment.
4. Visual and acoustic features are a fixed random mixture of valence, arousal and private
   factors, plus what each spoken word does to face and voice, plus noise. In language, valence
   picks the rated words, arousal the intensifiers, and the private factors topics and fluency;
   the features are word vectors.
5. Five annotators rate s with an error, each in whole numbers; the label is their mean.

The features are rounded to multiples of 1/256, a step far above the rounding errors in which
machines differ, so that a seed gives the same data everywhere.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.random import Generator, Philox, SeedSequence
from numpy.typing import NDArray
from torch import Tensor

from dmd.batch import MODALITIES, Batch, PerModality
from dmd.data import vocabulary
from dmd.data.dataset import Dataset, Splits
from dmd.options import nearest

Triple = tuple[int, int, int]
Array = NDArray[Any]


class Size(NamedTuple):
    """Clips in each split; widths and padded lengths of language, visual, acoustic."""

    clips: Triple
    widths: Triple
    aligned: Triple
    unaligned: Triple


SIZES = {
    "tiny": Size((320, 80, 160), (32, 12, 8), (12, 12, 12), (12, 30, 24)),
    "mosi": Size((1284, 229, 686), (300, 20, 5), (50, 50, 50), (50, 500, 375)),
    "mosei": Size((16326, 1871, 4659), (300, 35, 74), (50, 50, 50), (50, 500, 500)),
}

NONVERBAL_SHARE = 0.25  # of the clips: the face or the voice is more reliable than the words
VISUAL_SHARE = 0.15  # of the clips: the most reliable modality is the face
STRONG = (0.8, 1.0)  # range of the reliability of a clip's most reliable modality
WEAK = ((0.0, 0.3), (0.1, 0.4), (0.0, 0.3))  # the same of the others, by modality
LAG = ((0.0, 0.0), (-0.08, 0.0), (0.0, 0.08))  # ranges: the face is early, the voice late
EVENTS = 3  # at most, in a clip
HALF_WIDTH = 0.12  # of an event
CENTRES = (0.2, 0.8)  # range of the times of events: with any lag they stay inside the clip
MOOD_SHARE = 0.4  # of the sentiment: shown all the time and not by the events
DECOYS = (0.5, 1.6, 2.2)  # standard deviation of the mean of the decoys over time
PRIVATE = 3  # private factors of each modality
RATING_GAIN = 1.2  # from the valence that language shows to the rating of a word
RATING_NOISE = 0.8
TOPIC_PULL = 2.5
EXPRESSION = 0.4  # gain of valence and arousal against private factors in face and voice
ARTICULATION = (0.0, 0.9, 0.5)  # standard deviation of the noise that a word makes in a feature
SENSOR = 0.2  # standard deviation of the noise in each feature and step
WORDS = 12  # in the median clip, or 3/4 of the longest where that is fewer
CLIPS_PER_VIDEO = 14
GRID = 50  # points of `shared_trajectory`
STEP = 256  # features are multiples of 1 / STEP


def load(
    size: str = "tiny",
    aligned: bool = True,
    seed: int = 0,
    widths: Triple | None = None,
    lengths: Triple | None = None,
    clips: Triple | None = None,
    reliability_gap: float = 1.0,
) -> Splits:
    """Generate the three splits; the same arguments give the same data on every machine.

    size: `tiny`, or `mosi` and `mosei`, which have the sizes of those datasets.
    aligned: one step a word in all modalities; or else each modality at a rate of its own.
        Sentiment, words and truth of a clip are the same in both forms.
    seed: of everything that is drawn; a whole number, 0 or more.
    widths, lengths: features and padded steps of language, visual, acoustic, in place of those
        that belong to `size`.
    clips: in the training, validation and test split, likewise.
    reliability_gap: how far a clip's other modalities fall behind its most reliable one, from 1,
        as described above, to 0: all three are equally reliable.
    Every split has, in `truth`, with N clips:
        sentiment (N,): s, before the annotators err.
        shared (N, 2): valence and arousal averaged over time; the valence is the sentiment.
        shared_trajectory (N, 50, 2): the same over time, each value the mean over 1/50 of the clip.
        private_language (N, 3): the pull towards two of the three topics, and hesitation.
        private_visual, private_acoustic (N, 3): factors like lighting or the pitch of a voice.
        reliability (N, 3): r_m, by modality.
        lag (N, 3): l_m, as a share of the clip.
        events (N, 3, 2): time of each event and its share of s (0, 0: no such event).
        decoys (N, 3, 3, 2): by modality, time of each decoy and its share of the mean valence.
    Raises ValueError for an unknown size, and for other values that can't be.
    """
    if not isinstance(size, str) or size not in SIZES:
        raise ValueError(nearest(str(size), SIZES, "size of the synthetic dataset"))
    shape = SIZES[size]
    if not isinstance(aligned, bool):
        raise ValueError(f"aligned={aligned!r} is neither True nor False")
    widths = _triple("widths", shape.widths if widths is None else widths)
    usual = shape.aligned if aligned else shape.unaligned
    lengths = _triple("lengths", usual if lengths is None else lengths)
    if aligned and len(set(lengths)) > 1:
        raise ValueError(
            f"lengths={lengths}: aligned clips have one step a word in every modality; "
            "give three equal lengths or aligned=False"
        )
    if type(seed) is not int or seed < 0:  # True is an int too
        raise ValueError(f"seed={seed!r} is not a whole number of 0 or more")
    clips = _triple("clips", shape.clips if clips is None else clips, "train, valid, test")
    if not 0 <= reliability_gap <= 1:
        raise ValueError(f"reliability_gap={reliability_gap!r} is not between 0 and 1")
    rng = _stream(seed, 0)
    lexicon = vocabulary.Lexicon(rng, widths[0])
    mixing = [rng.standard_normal((2 + PRIVATE, width)) for width in widths[1:]]
    names: PerModality[Sequence[str]] = PerModality(
        vocabulary.feature_names((), "word vector", widths[0]),
        vocabulary.feature_names(vocabulary.ACTION_UNITS, "visual feature", widths[1]),
        vocabulary.feature_names(vocabulary.COVAREP, "acoustic feature", widths[2]),
    )

    def split(number: int, name: str) -> Dataset:
        count = clips[number]
        streams = [_stream(seed, 1 + number, part) for part in range(5)]
        known = Clips(streams[0], count, reliability_gap)
        steps = _steps(streams[1], count, lengths, aligned)
        transcripts, language = _language(streams[2], known, steps, lengths[0], lexicon)
        visual = _nonverbal(streams[3], known, 1, steps, lengths[1], mixing[0])
        acoustic = _nonverbal(streams[4], known, 2, steps, lengths[2], mixing[1])
        videos = sum(-(-n // CLIPS_PER_VIDEO) for n in clips[:number])  # of earlier splits
        ids = [
            f"synthetic-{videos + k // CLIPS_PER_VIDEO:05d}$_${k % CLIPS_PER_VIDEO + 1}"
            for k in range(count)
        ]
        label = torch.from_numpy(known.label)
        batch = Batch(language, visual, acoustic, torch.from_numpy(steps), label, ids)
        return Dataset(name, batch, names, transcripts, known.truth())

    options = {
        **{"size": size, "aligned": aligned, "seed": seed, "widths": widths, "lengths": lengths},
        **{"clips": clips, "reliability_gap": reliability_gap},
    }
    return Splits(split(0, "train"), split(1, "valid"), split(2, "test"), "synthetic", options)


def _triple(name: str, value: Any, parts: str = "language, visual, acoustic") -> Triple:
    if (
        not isinstance(value, list | tuple)
        or len(value) != 3
        or not all(type(v) is int and v > 0 for v in value)
    ):
        raise ValueError(f"{name} must be three positive integers ({parts}), not {value}")
    first, second, third = value
    return first, second, third


def _stream(seed: int, *key: int) -> Generator:
    """A stream of random numbers of its own for every key."""
    return Generator(Philox(SeedSequence(seed, spawn_key=key)))


class Clips:
    """What is true of N clips, before any modality shows it. Names as in `load`."""

    def __init__(self, rng: Generator, count: int, reliability_gap: float) -> None:
        sign = np.where(rng.random(count) < 0.52, 1.0, -1.0)
        self.sentiment = np.clip(sign * rng.normal(1.4, 0.8, count), -3, 3)
        ratings = np.rint(self.sentiment[:, None] + rng.normal(0, 0.5, (count, 5)))
        total = np.clip(ratings, -3, 3).astype(np.int64).sum(axis=1)  # integers have no -0
        self.label = (total / 5).astype(np.float32)

        present = np.arange(EVENTS) < rng.integers(1, EVENTS + 1, (count, 1))
        # What the events add up to is fixed by the sentiment; how they share it is not.
        contrast = rng.standard_normal((count, EVENTS)) * present
        contrast -= present * contrast.sum(1, keepdims=True) / present.sum(1, keepdims=True)
        total = (1 - MOOD_SHARE) * self.sentiment[:, None] / present.sum(1, keepdims=True)
        times = rng.uniform(*CENTRES, (count, EVENTS))
        self.events = np.stack([times, total + contrast], axis=2) * present[:, :, None]

        draw = rng.random(count)
        strongest = np.select([draw < VISUAL_SHARE, draw < NONVERBAL_SHARE], [1, 2], 0)
        low, high = np.array(WEAK).T
        self.reliability = rng.uniform(low, high, (count, 3))
        strong = rng.uniform(*STRONG, count)
        self.reliability[np.arange(count), strongest] = strong
        # A gap of 1 must leave every bit as it is, so nothing but zeros may be added then.
        self.reliability += (1 - reliability_gap) * (strong[:, None] - self.reliability)
        low, high = np.array(LAG).T
        self.lag = rng.uniform(low, high, (count, 3))

        size = rng.standard_normal((count, 3, EVENTS)) * np.array(DECOYS)[:, None] / EVENTS**0.5
        self.decoys = np.stack([rng.uniform(*CENTRES, (count, 3, EVENTS)), size], axis=3)
        video = rng.standard_normal((-(-count // CLIPS_PER_VIDEO), 3, PRIVATE))
        own = rng.standard_normal((count, 3, PRIVATE))
        self.private = (video.repeat(CLIPS_PER_VIDEO, axis=0)[:count] + own) / 2**0.5

    def trajectory(self, clip: Array, start: Array, end: Array) -> tuple[Array, Array]:
        """Valence and arousal (V,), averaged from start (V,) to end (V,) in the clips (V,)."""
        bumps = _bumps(self.events[clip, :, 0], start, end) * (self.events[clip, :, 0] > 0)
        mood = MOOD_SHARE * self.sentiment[clip]
        return mood + (bumps * self.events[clip, :, 1]).sum(axis=1), bumps.sum(axis=1)

    def shown(self, m: int, clip: Array, start: Array, end: Array) -> tuple[Array, Array]:
        """Valence and arousal (V,) as modality m shows them, with gain, lag and decoys."""
        lag, gain = self.lag[clip, m], self.reliability[clip, m]
        valence, arousal = self.trajectory(clip, start - lag, end - lag)
        times, sizes = np.moveaxis(self.decoys[clip, m], 2, 0)
        decoys = (_bumps(times, start, end) * sizes).sum(axis=1)
        return gain * valence + decoys, gain * arousal

    def truth(self) -> dict[str, Tensor]:
        """The known factors, as `load` describes them."""
        count = len(self.sentiment)
        clip, point = np.divmod(np.arange(count * GRID), GRID)
        path = np.stack(self.trajectory(clip, point / GRID, (point + 1) / GRID), axis=1)
        path = path.reshape(count, GRID, 2)
        known = {
            "sentiment": self.sentiment,
            "shared": path.mean(axis=1),
            "shared_trajectory": path,
            **{f"private_{name}": self.private[:, m] for m, name in enumerate(MODALITIES)},
            "reliability": self.reliability,
            "lag": self.lag,
            "events": self.events,
            "decoys": self.decoys,
        }
        return {key: torch.from_numpy(x.astype(np.float32)) for key, x in known.items()}


def _bumps(centres: Array, start: Array, end: Array) -> Array:
    """A bump of area 1 around each centre (V, E), averaged from start (V,) to end (V,)."""

    def area_before(t: Array) -> Array:
        x = np.clip((t[:, None] - centres) / HALF_WIDTH, -1, 1)
        return (1 + x + np.sin(np.pi * x) / np.pi) / 2

    return (area_before(end) - area_before(start)) / (end - start)[:, None]


def _steps(rng: Generator, count: int, lengths: Triple, aligned: bool) -> NDArray[np.int64]:
    """Valid steps (N, 3): words, and the frames of face and voice that they take."""
    words = min(WORDS, 0.75 * lengths[0]) * np.exp(0.5 * rng.standard_normal(count))
    words = np.clip(np.rint(words), min(3, lengths[0]), lengths[0])
    pace = np.exp(0.2 * rng.standard_normal((count, 1)))  # how long a speaker takes for a word
    frames = words[:, None] * (1 if aligned else pace * np.array(lengths[1:]) / lengths[0])
    frames = np.clip(np.rint(frames), 1, lengths[1:])
    return np.column_stack([words, frames]).astype(np.int64)


def _spans(steps: Array) -> tuple[Array, Array, Array]:
    """For every valid step, clip after clip: its clip, start and end, (V,) each."""
    clip = np.repeat(np.arange(len(steps)), steps)
    position = np.arange(len(clip)) - np.repeat(np.cumsum(steps) - steps, steps)
    return clip, position / steps[clip], (position + 1) / steps[clip]


def _rounded(x: Array) -> NDArray[np.float32]:
    return (np.rint(x * STEP) / STEP + 0.0).astype(np.float32)  # + 0.0 makes -0 a plain 0


def _language(
    rng: Generator, clips: Clips, steps: Array, length: int, lexicon: vocabulary.Lexicon
) -> tuple[list[str], Tensor]:
    """Transcripts, and the vectors (N, T, D) of their words."""
    clip, start, end = _spans(steps[:, 0])
    spoken = np.arange(length) < steps[:, :1]
    words = lexicon.clauses(rng, clips.private[:, 0, 2], length)[spoken]
    valence, arousal = clips.shown(0, clip, start, end)
    rating = 3 + RATING_GAIN * valence + RATING_NOISE * rng.standard_normal(len(clip))
    strength = 1 + 0.7 * arousal + rng.standard_normal(len(clip))
    liking = TOPIC_PULL * np.pad(clips.private[clip, 0, :2], ((0, 0), (0, 1)))
    topic = (liking + rng.gumbel(size=liking.shape)).argmax(axis=1)
    words = lexicon.fill(rng, words, (rating, rating, strength, topic))
    sayings = np.split(np.array(lexicon.words)[words], np.cumsum(steps[:, 0])[:-1])
    features = np.zeros((*spoken.shape, lexicon.vectors.shape[1]), np.float32)
    features[spoken] = _rounded(lexicon.vectors)[words]
    return [" ".join(said) for said in sayings], torch.from_numpy(features)


def _nonverbal(
    rng: Generator, clips: Clips, m: int, steps: Array, length: int, mixing: Array
) -> Tensor:
    """Features (N, T, D) of face (m = 1) or voice (m = 2)."""
    width = mixing.shape[1]
    features = np.zeros((len(steps), length, width), np.float32)
    speech, sensor = rng.spawn(2)
    for first in range(0, len(steps), 512):  # in parts, for the sake of memory
        part = steps[first : first + 512]
        clip, start, end = _spans(part[:, m])
        words = part[clip, 0]
        word = np.cumsum(part[:, 0])[clip] - words + ((start + end) / 2 * words).astype(np.int64)
        clip += first
        shown = EXPRESSION * np.column_stack(clips.shown(m, clip, start, end))
        # In float64: in float32 the sums of two machines could fall on two sides of a rounding.
        x = np.hstack([shown, clips.private[clip, m]]) @ mixing / len(mixing) ** 0.5
        x += ARTICULATION[m] * speech.standard_normal((part[:, 0].sum(), width))[word]
        x += SENSOR * sensor.standard_normal(x.shape)
        features[first : first + 512][np.arange(length) < part[:, m, None]] = _rounded(x)
    return torch.from_numpy(features)
