"""What synthetic clips are made of: rated words with vectors, clauses, names of features."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Array = NDArray[Any]

# The words that a clause leaves open, by level: ratings from -3 to 3, weak to strong, topics.
ADJECTIVES = (
    "awful terrible dreadful horrible unbearable",
    "bad boring weak annoying stupid",
    "slow flat thin odd bland",
    "okay average usual plain ordinary",
    "decent nice pleasant solid neat",
    "good funny charming strong clever",
    "brilliant wonderful amazing superb fantastic",
)
VERBS = (
    "hated loathed",
    "disliked regretted",
    "endured doubted",
    "watched noticed",
    "followed accepted",
    "liked enjoyed",
    "loved adored",
)
INTENSIFIERS = ("slightly", "somewhat", "fairly", "quite", "really", "absolutely")
NOUNS = (
    "plot ending script dialogue twist opening",
    "acting cast hero villain actress director",
    "camera lighting editing music costumes effects",
)
CHOICES = {"ADJECTIVE": ADJECTIVES, "VERB": VERBS, "INTENSIFIER": INTENSIFIERS, "NOUN": NOUNS}

FLUENT = (
    "the NOUN was ADJECTIVE",
    "i VERB the NOUN",
    "INTENSIFIER ADJECTIVE NOUN",
    "ADJECTIVE NOUN and ADJECTIVE NOUN",
    "INTENSIFIER VERB the NOUN",
    "just INTENSIFIER ADJECTIVE",
)
HESITANT = (
    "um like ADJECTIVE NOUN",
    "well INTENSIFIER ADJECTIVE",
    "uh i VERB the NOUN",
    "hmm i guess INTENSIFIER ADJECTIVE",
    "you know ADJECTIVE NOUN",
    "i mean it was ADJECTIVE",
)
HESITATIONS = "um uh hmm well like you know mean guess"

# How much of a word's vector is its rating, intensity, topic (three) and hesitation; the rest
# is the word's own.
WEIGHTS = np.array([0.7, 0.5, 1.5, 1.5, 1.5, 1.0])
OWN = 0.8

# The 20 action units that Facet reports, then further ones of the Facial Action Coding System.
ACTION_UNITS = (
    "AU01 inner brow raiser", "AU02 outer brow raiser", "AU04 brow lowerer",
    "AU05 upper lid raiser", "AU06 cheek raiser", "AU07 lid tightener", "AU09 nose wrinkler",
    "AU10 upper lip raiser", "AU12 lip corner puller", "AU14 dimpler",
    "AU15 lip corner depressor", "AU17 chin raiser", "AU18 lip pucker", "AU20 lip stretcher",
    "AU23 lip tightener", "AU24 lip pressor", "AU25 lips part", "AU26 jaw drop",
    "AU28 lip suck", "AU43 eyes closed",
    "AU08 lips toward each other", "AU11 nasolabial deepener", "AU13 sharp lip puller",
    "AU16 lower lip depressor", "AU19 tongue show", "AU22 lip funneler", "AU27 mouth stretch",
    "AU29 jaw thrust", "AU30 jaw sideways", "AU31 jaw clencher", "AU32 lip bite",
    "AU33 cheek blow", "AU34 cheek puff", "AU35 cheek suck", "AU37 lip wipe",
)  # fmt: skip

# The 74 columns of COVAREP: pitch and voicing, glottal source, spectrum, phase distortion.
COVAREP = (
    "F0", "VUV", "NAQ", "QOQ", "H1H2", "PSP", "MDQ", "peakSlope", "Rd", "Rd_conf", "creak",
    *(f"MCEP_{i}" for i in range(25)),
    *(f"HMPDM_{i}" for i in range(25)),
    *(f"HMPDD_{i}" for i in range(13)),
)  # fmt: skip


def feature_names(known: Sequence[str], otherwise: str, width: int) -> list[str]:
    """`width` names: the known ones as far as they go, then `otherwise` with a number."""
    return [known[i] if i < len(known) else f"{otherwise} {i + 1}" for i in range(width)]


class Lexicon:
    """The words, and a fixed random vector for each.

    words: W strings. vectors: (W, width); the same word has the same vector in every clip. It is
    a random mixture of what the word means (rating, intensity, topic, hesitation) and of a part
    that is the word's alone.
    """

    def __init__(self, rng: Generator, width: int) -> None:
        clauses = [clause.split() for clause in (*FLUENT, *HESITANT)]
        literal = dict.fromkeys(w for clause in clauses for w in clause if w not in CHOICES)
        groups = [group.split() for choice in CHOICES.values() for group in choice]
        self.words = [*literal, *(word for group in groups for word in group)]
        index = {word: i for i, word in enumerate(self.words)}
        # A clause is a row of word numbers, with -2 - k for a word of choice k, and -1 for none.
        code = index | {name: -2 - k for k, name in enumerate(CHOICES)}
        self._clauses = np.full((len(clauses), max(map(len, clauses))), -1)
        for row, clause in zip(self._clauses, clauses, strict=True):
            row[: len(clause)] = [code[word] for word in clause]
        # A choice is a table (levels, alternatives) of word numbers.
        self._choices = [
            np.array([[index[word] for word in group.split()] for group in choice])
            for choice in CHOICES.values()
        ]
        adjectives, verbs, intensifiers, nouns = self._choices
        meaning = np.zeros((len(self.words), len(WEIGHTS)))
        meaning[adjectives, 0] = np.linspace(-1, 1, len(adjectives))[:, None]
        meaning[verbs, 0] = np.linspace(-1, 1, len(verbs))[:, None]
        meaning[intensifiers, 1] = np.linspace(-1, 1, len(intensifiers))[:, None]
        meaning[nouns, 2 + np.arange(len(nouns))[:, None]] = 1
        meaning[[index[word] for word in HESITATIONS.split()], 5] = 1
        own = rng.standard_normal((len(self.words), width))
        # Signs, so that no single feature of the vector tells more of the rating than another.
        signs = rng.choice([-1.0, 1.0], (len(WEIGHTS), width))
        self.vectors = (WEIGHTS * meaning) @ signs + OWN * own

    def clauses(self, rng: Generator, hesitant: Array, length: int) -> Array:
        """(N, length): clauses put together at random, more hesitant ones where (N,) is large.

        Numbers of words, and -2 - k where a word of choice k is to come.
        """
        count = -(-length // min(len(clause.split()) for clause in FLUENT))
        hesitates = rng.random((len(hesitant), count)) < 1 / (1 + np.exp(-3 * hesitant[:, None]))
        drawn = rng.integers(len(FLUENT), size=hesitates.shape) + len(FLUENT) * hesitates
        rows = self._clauses[drawn].reshape(len(hesitant), -1)
        filled_first = np.argsort(rows == -1, axis=1, kind="stable")[:, :length]
        return np.take_along_axis(rows, filled_first, axis=1)

    def fill(self, rng: Generator, words: Array, levels: Sequence[Array]) -> Array:
        """Words (V,) with the open ones chosen: from choice k, a word of level `levels[k]` (V,)."""
        words = words.copy()
        for k, (table, level) in enumerate(zip(self._choices, levels, strict=True)):
            level = np.clip(np.rint(level), 0, len(table) - 1).astype(np.int64)
            word = table[level, rng.integers(table.shape[1], size=len(words))]
            words = np.where(words == -2 - k, word, words)
        return words
