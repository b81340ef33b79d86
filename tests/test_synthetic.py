"""The synthetic clips have the properties that the book builds on, and are the same everywhere."""

import time
from functools import cache

import numpy as np
import pytest
import torch
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from dmd.batch import MODALITIES
from dmd.data import Dataset, Splits, load
from dmd.data.synthetic import (
    CLIPS_PER_VIDEO,
    GRID,
    HALF_WIDTH,
    MOOD_SHARE,
    NONVERBAL_SHARE,
    SIZES,
    STEP,
)
from dmd.data.vocabulary import (
    ADJECTIVES,
    CHOICES,
    FLUENT,
    HESITANT,
    HESITATIONS,
    INTENSIFIERS,
    NOUNS,
    VERBS,
)

SEEDS = range(3)
FINGERPRINTS = {  # of size="tiny", seed=0: a change of any value changes them
    True: "8f976bed923eef65fd25a0ec9e953bb0dd76b5abea63005d9b374a4eaec5320b",
    False: "003a26913e84bd3880fae91cebe5bdc275be4c4e240cc24bca8340bd4b471617",
}


@cache
def synthetic(size: str, seed: int = 0, aligned: bool = True) -> Splits:
    return load("synthetic", size=size, seed=seed, aligned=aligned)


def pooled(split: Dataset, weights: list[np.ndarray] | None = None) -> list[np.ndarray]:
    """Features (N, D_m) of each modality, averaged over its valid steps with weights (N, T_m)."""
    out = []
    for m, (x, mask) in enumerate(zip(split.clips.features, split.clips.masks, strict=True)):
        w = mask.numpy() * (1.0 if weights is None else weights[m])
        out.append(np.einsum("nt,ntd->nd", w / w.sum(axis=1, keepdims=True), x.numpy()))
    return out


def at_events(split: Dataset, lag_sign: int = 1) -> list[np.ndarray]:
    """Weights (N, T_m): how much event each step holds, at the time when its modality shows it."""
    arousal, lag = split.truth["shared_trajectory"][..., 1].numpy(), split.truth["lag"].numpy()
    out = []
    for m, steps in enumerate(split.lengths):
        middle = (np.arange(steps) + 0.5) / split.clips.lengths[:, m, None].numpy()
        point = ((middle - lag_sign * lag[:, m, None]) * GRID).astype(int).clip(0, GRID - 1)
        out.append(np.take_along_axis(arousal, point, axis=1) + 1e-3)
    return out


def ridge(train: np.ndarray, label: np.ndarray, test: np.ndarray) -> np.ndarray:
    probe = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-1, 4, 12)))
    return probe.fit(train, label).predict(test)


def accuracy(prediction: np.ndarray, label: np.ndarray) -> float:
    """Percentage of the non-neutral clips whose sign is right."""
    return 100 * ((prediction > 0) == (label > 0))[label != 0].mean()


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.corrcoef(x, y)[0, 1])


@cache
def probes(size: str, seed: int, aligned: bool = True) -> np.ndarray:
    """Predictions (4, N) for the test split, from each modality's mean and from all together."""
    splits = synthetic(size, seed, aligned)
    train, test = pooled(splits.train), pooled(splits.test)
    pairs = [*zip(train, test, strict=True), (np.hstack(train), np.hstack(test))]
    return np.stack([ridge(a, splits.train.label.numpy(), b) for a, b in pairs])


def probe_accuracy(size: str, seed: int, aligned: bool = True) -> np.ndarray:
    label = synthetic(size, seed, aligned).test.label.numpy()
    return np.array([accuracy(p, label) for p in probes(size, seed, aligned)])


# --- how hard it is, and for whom ---------------------------------------------------------------


@pytest.mark.parametrize("aligned", [True, False])
def test_linear_probes_rank_the_modalities_as_on_mosi(aligned):
    scores = np.mean([probe_accuracy("mosi", seed, aligned) for seed in SEEDS], axis=0)
    language, visual, acoustic, together = scores
    assert 75 <= language <= 80
    assert 58 <= visual <= 64
    assert 53 <= acoustic <= 58
    assert language < together < language + 5


def test_the_ranking_holds_in_the_tiny_size():
    scores = np.mean([probe_accuracy("tiny", seed) for seed in range(12)], axis=0)
    language, visual, acoustic, _ = scores
    assert language > visual + 5
    assert visual > acoustic + 2
    assert acoustic > 50


@pytest.mark.parametrize("seed", SEEDS)
def test_no_single_feature_gives_the_sentiment_away(seed):
    splits = synthetic("mosi", seed)
    probe = probes("mosi", seed)[0]
    train, test = np.hstack(pooled(splits.train)), np.hstack(pooled(splits.test))
    y, y_test = splits.train.label.numpy(), splits.test.label.numpy()
    assert max(abs(correlation(x, y)) for x in train.T) < 0.4
    assert correlation(probe, y_test) > 0.55
    # For each feature the best cut and direction on the training clips; then the best feature.
    best, rule = 0.0, None
    for j, x in enumerate(train.T):
        for cut in np.quantile(x, np.linspace(0.05, 0.95, 19)):
            for sign in (1, -1):
                score = accuracy(sign * (x - cut), y)
                if score > best:
                    best, rule = score, (j, cut, sign)
    j, cut, sign = rule
    assert accuracy(sign * (test[:, j] - cut), y_test) < accuracy(probe, y_test) - 8


def test_the_time_of_the_events_helps_and_so_do_the_lags():
    plain, timed, mistimed = np.zeros(3), np.zeros(3), np.zeros(3)
    for seed in SEEDS:
        splits = synthetic("mosi", seed, aligned=False)
        y, y_test = splits.train.label.numpy(), splits.test.label.numpy()
        plain += [correlation(p, y_test) for p in probes("mosi", seed, aligned=False)[:3]]
        for scores, sign in ((timed, 1), (mistimed, -1)):
            train = pooled(splits.train, at_events(splits.train, sign))
            test = pooled(splits.test, at_events(splits.test, sign))
            scores += [correlation(ridge(train[m], y, test[m]), y_test) for m in range(3)]
    for m in (1, 2):
        assert timed[m] > 1.2 * plain[m]
        assert timed[m] > 1.1 * mistimed[m]


@pytest.mark.parametrize("seed", SEEDS)
def test_weighting_by_the_true_reliability_beats_equal_weights(seed):
    split = synthetic("mosi", seed).test
    single, reliability = probes("mosi", seed)[:3], split.truth["reliability"].numpy().T
    label = split.label.numpy()
    weighted = accuracy((reliability * single).sum(axis=0), label)
    assert weighted > accuracy(single.sum(axis=0), label) + 1
    assert weighted > accuracy(probes("mosi", seed)[3], label)


def test_sometimes_the_face_or_the_voice_knows_and_the_words_do_not():
    language, strongest = [], []
    for seed in SEEDS:
        split, single = synthetic("mosi", seed).test, probes("mosi", seed)[:3]
        best = split.truth["reliability"].argmax(dim=1).numpy()
        rows = np.flatnonzero(best > 0)
        label = split.label.numpy()[rows]
        language.append(accuracy(single[0, rows], label))
        strongest.append(accuracy(single[best[rows], rows], label))
    assert np.mean(strongest) > np.mean(language) + 5


def test_reliability_differs_by_modality_and_by_clip():
    reliability = torch.cat([s.truth["reliability"] for s in synthetic("mosi")])
    assert ((reliability >= 0) & (reliability <= 1)).all()
    language, visual, acoustic = reliability.mean(dim=0)
    assert language > visual + 0.1 > acoustic + 0.15
    nonverbal = (reliability.argmax(dim=1) > 0).double().mean()
    error = (NONVERBAL_SHARE * (1 - NONVERBAL_SHARE) / len(reliability)) ** 0.5
    assert abs(nonverbal - NONVERBAL_SHARE) < 4 * error


class Reader(nn.Module):
    """A small network that weights the steps of each given modality before it averages them."""

    def __init__(self, widths, modalities, hidden=24):
        super().__init__()
        self.modalities = modalities
        self.look = nn.ModuleList(nn.Conv1d(widths[m], hidden, 3, padding=1) for m in modalities)
        self.gate = nn.ModuleList(nn.Conv1d(hidden, hidden, 1) for _ in modalities)
        self.value = nn.ModuleList(nn.Conv1d(hidden, hidden, 3, padding=1) for _ in modalities)
        self.head = nn.Sequential(
            nn.Linear(hidden * len(modalities), 32), nn.ReLU(), nn.Linear(32, 1)
        )

    def forward(self, batch):
        means = []
        for i, m in enumerate(self.modalities):
            mask = batch.masks[m][:, None]
            x = nn.functional.dropout(batch.features[m], 0.3, self.training).transpose(1, 2)
            h = torch.relu(self.look[i](x)) * mask
            shown = self.value[i](h) * torch.sigmoid(self.gate[i](h)) * mask
            means.append(shown.sum(dim=2) / mask.sum(dim=2))
        return self.head(torch.cat(means, dim=1))[:, 0]


def fitted(splits: Splits, modalities: list[int], epochs: int) -> np.ndarray:
    """Predictions for the test split after some epochs of training."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Reader(splits.widths, modalities)
        adam = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=1e-2)
        for _ in range(epochs):
            for batch in splits.train.batches(32, torch.randperm(len(splits.train))):
                adam.zero_grad()
                nn.functional.l1_loss(model(batch), batch.label).backward()
                adam.step()
        with torch.no_grad():
            return model.eval()(splits.test[:]).numpy()


def test_a_small_network_gets_more_from_the_face_than_a_linear_probe():
    splits = synthetic("mosi")
    label = splits.test.label.numpy()
    network = correlation(fitted(splits, [1], epochs=30), label)
    assert network > correlation(probes("mosi", 0)[1], label) + 0.05


def test_a_small_network_learns_from_the_tiny_size_within_seconds():
    splits = synthetic("tiny")
    start = time.process_time()
    prediction = fitted(splits, [0, 1, 2], epochs=15)
    assert time.process_time() - start < 10
    assert accuracy(prediction, splits.test.label.numpy()) > 65


# --- the truth ----------------------------------------------------------------------------------


def test_the_reliability_gap_lifts_the_weak_modalities_and_nothing_else():
    known = [load("synthetic", reliability_gap=gap).test.truth for gap in (1.0, 0.5, 0.0)]
    wide, half, none = (truth["reliability"] for truth in known)
    best = wide.max(dim=1, keepdim=True).values
    assert torch.equal(none, best.expand(-1, 3))
    torch.testing.assert_close(half, (wide + best) / 2)
    assert all(torch.equal(truth["events"], known[0]["events"]) for truth in known)


def test_the_number_of_clips_of_each_split_is_that_asked_for():
    assert [len(split) for split in load("synthetic", clips=(40, 20, 30))] == [40, 20, 30]


def test_truth_is_consistent_with_itself():
    for split in synthetic("tiny"):
        t = split.truth
        path = t["shared_trajectory"]
        torch.testing.assert_close(t["shared"], path.mean(dim=1))
        torch.testing.assert_close(t["shared"][:, 0], t["sentiment"], atol=1e-5, rtol=0)
        share = t["events"][..., 1].sum(dim=1)
        torch.testing.assert_close(share, (1 - MOOD_SHARE) * t["sentiment"], atol=1e-5, rtol=0)
        times, present = t["events"][..., 0], t["events"][..., 0] > 0
        assert set(present.sum(dim=1).tolist()) == {1, 2, 3}
        torch.testing.assert_close(t["shared"][:, 1], present.sum(dim=1).float())
        # Away from all events there is mood and no arousal.
        point = (torch.arange(GRID) + 0.5) / GRID
        near = (point[None, :, None] - times[:, None]).abs() < HALF_WIDTH + 0.5 / GRID
        away = ~(near & present[:, None]).any(dim=2)
        mood = MOOD_SHARE * t["sentiment"][:, None].expand_as(away)
        torch.testing.assert_close(path[..., 0][away], mood[away], atol=1e-5, rtol=0)
        assert path[..., 1][away].abs().max() < 1e-5
        assert (path[..., 1][~away] > 0).float().mean() > 0.9
        # With its lag no modality misses a part of an event.
        seen = times[:, None] + t["lag"][..., None]
        inside = (seen > HALF_WIDTH - 1e-6) & (seen < 1 - HALF_WIDTH + 1e-6)
        assert inside[present[:, None].expand_as(inside)].all()


def test_private_factors_are_independent_of_the_sentiment_and_explain_the_features():
    split = synthetic("mosi").train
    sentiment = split.truth["sentiment"].numpy()
    for m, (name, x) in enumerate(zip(MODALITIES, pooled(split), strict=True)):
        private = split.truth[f"private_{name}"].numpy()
        for factor in private.T:
            assert abs(correlation(factor, sentiment)) < 4 / len(split) ** 0.5
        design = np.column_stack([private, np.ones(len(split))])
        residual = x - design @ np.linalg.lstsq(design, x, rcond=None)[0]
        explained = 1 - (residual**2).sum() / ((x - x.mean(axis=0)) ** 2).sum()
        assert explained > (0.25, 0.6, 0.6)[m]


def test_clips_of_a_video_share_half_their_private_factors_and_not_their_sentiment():
    split = synthetic("mosi").train
    video = torch.arange(len(split)) // CLIPS_PER_VIDEO

    def within(x: torch.Tensor) -> float:
        """Share of the variance that neighbours in a video have in common."""
        same = video[1:] == video[:-1]
        return correlation(x[1:][same].numpy(), x[:-1][same].numpy())

    factors = torch.cat([split.truth[f"private_{name}"] for name in MODALITIES], dim=1)
    assert np.mean([within(x) for x in factors.T]) == pytest.approx(0.5, abs=0.1)
    assert abs(within(split.truth["sentiment"])) < 0.12


def test_labels_are_like_those_of_mosi():
    label = torch.cat([s.label for s in synthetic("mosi")])
    sentiment = torch.cat([s.truth["sentiment"] for s in synthetic("mosi")])
    torch.testing.assert_close(label * 5, (label * 5).round(), atol=1e-5, rtol=0)
    assert not torch.signbit(label[label == 0]).any()
    shares = torch.bincount((label.round() + 3).long(), minlength=7) / len(label)
    assert 0.10 <= shares[3] <= 0.15
    assert (shares > 0.025).all()
    assert shares[[0, 6]].max() < 0.08
    assert shares[[1, 2, 4, 5]].min() > 0.14
    assert correlation(label.numpy(), sentiment.numpy()) > 0.97
    assert not torch.equal(label, (sentiment * 5).round() / 5)


# --- what a clip looks like ---------------------------------------------------------------------


@pytest.mark.parametrize("aligned", [True, False])
def test_clips_are_padded_on_the_right_with_zeros_and_vary_in_length(aligned):
    splits = synthetic("mosi", 0, aligned)
    for split in splits:
        for m, (x, mask) in enumerate(zip(split.clips.features, split.clips.masks, strict=True)):
            assert x.dtype == torch.float32
            assert not x[~mask].any()
            assert x[mask].any(dim=1).all()
            assert torch.equal(x * STEP, (x * STEP).round())
            assert not torch.signbit(x[x == 0]).any()
            steps = split.clips.lengths[:, m].double()
            assert steps.std() / steps.mean() > 0.3
            assert steps.max() > 0.8 * x.shape[1]
    words = splits.train.clips.lengths[:, 0]
    assert 10 <= words.median() <= 14
    assert (splits.train.clips.lengths == words[:, None]).all() == aligned


def test_step_t_of_language_is_word_t_and_a_word_has_one_vector():
    known = " ".join((*FLUENT, *HESITANT, *(g for groups in CHOICES.values() for g in groups)))
    vector: dict[str, torch.Tensor] = {}
    for split in synthetic("tiny"):
        for i, transcript in enumerate(split.transcripts):
            words = transcript.split()
            assert len(words) == split.clips.lengths[i, 0]
            for t, word in enumerate(words):
                x = split.clips.language[i, t]
                assert torch.equal(vector.setdefault(word, x), x)
    assert set(vector) == set(known.split()) - set(CHOICES)
    assert len({tuple(v.tolist()) for v in vector.values()}) == len(vector)


def test_the_words_speak_for_the_sentiment_and_the_vectors_for_the_words():
    groups = [*enumerate(ADJECTIVES), *enumerate(VERBS)]
    rating = {word: level - 3 for level, group in groups for word in group.split()}
    split = synthetic("mosi").train
    heard = [[rating[w] for w in said.split() if w in rating] for said in split.transcripts]
    rows = np.array([i for i, ratings in enumerate(heard) if ratings])
    mean = np.array([np.mean(heard[i]) for i in rows])
    sentiment = split.truth["sentiment"].numpy()[rows]
    reliable = split.truth["reliability"].numpy()[rows, 0] > 0.5
    assert correlation(mean[reliable], sentiment[reliable]) > 0.7
    assert correlation(mean[~reliable], sentiment[~reliable]) < 0.4


def test_the_words_tell_of_arousal_topic_and_hesitation():
    split = synthetic("mosi").train

    def level(groups: tuple[str, ...], factor: torch.Tensor) -> float:
        """Correlation of a factor (N,) with the mean level of the words of these groups."""
        levels = {word: i for i, group in enumerate(groups) for word in group.split()}
        heard = [[levels[w] for w in said.split() if w in levels] for said in split.transcripts]
        rows = [i for i, found in enumerate(heard) if found]
        return correlation(np.array([np.mean(heard[i]) for i in rows]), factor[rows].numpy())

    private = split.truth["private_language"]
    story, people, craft = NOUNS
    elsewhere = set(" ".join(FLUENT).split())
    hesitant = " ".join(w for w in HESITATIONS.split() if w not in elsewhere)
    assert level((f"{people} {craft}", story), private[:, 0]) > 0.5
    assert level((f"{story} {craft}", people), private[:, 1]) > 0.5
    assert level((" ".join(elsewhere), hesitant), private[:, 2]) > 0.5
    assert level(INTENSIFIERS, split.truth["reliability"][:, 0]) > 0.15


def test_every_word_belongs_to_one_group():
    groups = [word for choice in CHOICES.values() for group in choice for word in group.split()]
    assert len(groups) == len(set(groups))
    assert not set(groups) & set(" ".join((*FLUENT, *HESITANT)).split())


def test_aligned_and_unaligned_are_two_forms_of_the_same_clips():
    for a, b in zip(synthetic("mosi"), synthetic("mosi", aligned=False), strict=True):
        assert torch.equal(a.label, b.label) and a.transcripts == b.transcripts
        assert torch.equal(a.clips.language, b.clips.language)
        assert all(torch.equal(a.truth[key], b.truth[key]) for key in a.truth)
        for x, y in zip(pooled(a)[1:], pooled(b)[1:], strict=True):
            assert min(correlation(x[:, j], y[:, j]) for j in range(x.shape[1])) > 0.9


def test_names():
    splits = load("synthetic", widths=(32, 40, 80))
    language, visual, acoustic = splits.train.feature_names
    assert language[16] == "word vector 17"
    assert visual[2] == "AU04 brow lowerer" and visual[39] == "visual feature 40"
    assert (
        acoustic[0] == "F0" and acoustic[11] == "MCEP_0" and acoustic[79] == "acoustic feature 80"
    )
    for names, width in zip(splits.train.feature_names, splits.widths, strict=True):
        assert len(set(names)) == len(names) == width
    ids = [name for split in splits for name in split.clips.ids]
    assert len(set(ids)) == len(ids)
    assert ids[CLIPS_PER_VIDEO + 2] == "synthetic-00001$_$3"
    videos = [{name.split("$_$")[0] for name in split.clips.ids} for split in splits]
    assert len(set.union(*videos)) == sum(map(len, videos))  # no video in two splits


# --- options ------------------------------------------------------------------------------------


def test_sizes_and_options():
    splits = synthetic("mosi", 0, aligned=False)
    assert [len(s) for s in splits] == [1284, 229, 686]
    assert splits.widths == (300, 20, 5) and splits.lengths == (50, 500, 375)
    assert splits.options == {
        "size": "mosi", "aligned": False, "seed": 0,
        "widths": (300, 20, 5), "lengths": (50, 500, 375),
        "clips": (1284, 229, 686), "reliability_gap": 1.0,
    }  # fmt: skip
    assert SIZES["mosei"] == (
        (16326, 1871, 4659), (300, 35, 74), (50, 50, 50), (50, 500, 500)
    )  # fmt: skip
    again = load(splits.name, **splits.options)
    assert again.fingerprint() == splits.fingerprint()


@pytest.mark.parametrize(
    ("widths", "lengths", "aligned"),
    [
        ((1, 1, 1), (1, 1, 1), True),
        ((7, 3, 2), (1, 1, 1), False),
        ([5, 6, 7], [1, 9, 2], False),
        ((16, 90, 90), (20, 20, 20), True),
        (None, (40, 2, 1), False),
    ],
)
def test_widths_and_lengths_are_those_asked_for(widths, lengths, aligned):
    splits = load("synthetic", widths=widths, lengths=lengths, aligned=aligned)
    assert splits.lengths == tuple(lengths)
    assert splits.widths == tuple(widths or (32, 12, 8))
    for split in splits:
        assert all(x.abs().sum() > 0 for x in split.clips.features)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"size": "mossi"}, "did you mean 'mosi'"),
        ({"size": 5}, "unknown size"),
        ({"size": ["mosi"]}, "unknown size"),
        ({"widths": (300, 20)}, "widths must be three positive integers"),
        ({"widths": (True, 20, 5)}, "widths must be three positive integers"),
        ({"widths": 300}, "widths must be three positive integers"),
        ({"lengths": (12, 0, 12), "aligned": False}, "lengths must be three positive integers"),
        ({"clips": (9, 9)}, "clips must be three positive integers (train, valid, test)"),
        ({"reliability_gap": 1.5}, "reliability_gap=1.5 is not between 0 and 1"),
        ({"reliability_gap": float("nan")}, "reliability_gap=nan is not between 0 and 1"),
        ({"lengths": (12, 30, 24)}, "give three equal lengths or aligned=False"),
        ({"seed": -1}, "seed=-1 is not a whole number"),
        ({"seed": True}, "seed=True is not a whole number"),
        ({"seed": 0.5}, "seed=0.5 is not a whole number"),
        ({"aligned": "no"}, "aligned='no' is neither True nor False"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(options, sentence):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
        load("synthetic", **options)
    assert sentence in str(caught.value)


# --- the same everywhere ------------------------------------------------------------------------


@pytest.mark.parametrize("aligned", [True, False])
def test_the_recorded_fingerprint(aligned):
    assert synthetic("tiny", 0, aligned).fingerprint() == FINGERPRINTS[aligned]


def test_nothing_but_the_arguments_counts_and_nothing_else_changes():
    first = load("synthetic", seed=5)
    np.random.seed(1)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        state = torch.get_rng_state(), np.random.get_state()[1].copy()
        second = load("synthetic", seed=5)
        assert torch.equal(state[0], torch.get_rng_state())
        assert (state[1] == np.random.get_state()[1]).all()
    assert first.fingerprint() == second.fingerprint()
    assert all(
        torch.equal(a.truth[key], b.truth[key])
        for a, b in zip(first, second, strict=True)
        for key in a.truth
    )


def test_seeds_and_splits_differ():
    a, b = synthetic("tiny", 0), synthetic("tiny", 1)
    drawn = [s.truth["sentiment"] for splits in (a, b) for s in splits]
    values = torch.cat([x[x.abs() < 3] for x in drawn])  # the clipped ones are alike
    assert len(values.unique()) == len(values)
    the = [  # the vector of one word
        split.clips.language[i, said.split().index("the")]
        for split in (a.train, a.test, b.train)
        for i, said in enumerate(split.transcripts)
        if "the" in said.split()
    ]
    assert len({tuple(x.tolist()) for x in the}) == 2  # one a seed, the same in all splits


@pytest.mark.parametrize("aligned", [True, False])
def test_the_mosi_size_takes_less_than_ten_seconds(aligned):
    start = time.perf_counter()
    load("synthetic", size="mosi", seed=9, aligned=aligned)
    assert time.perf_counter() - start < 10
