"""The loaders of pickled datasets, on files that are written here in exactly those layouts."""

import hashlib
import os
import pickle
import warnings

import numpy as np
import pytest
import python2_pickle
import torch

from dmd import data
from dmd.batch import Batch, PerModality
from dmd.data import Dataset, Splits, mmsa, mult, sanitise

COUNTS = {"train": 5, "valid": 3, "test": 4}
T_L, T_V, T_A = 6, 9, 7
WIDTHS = (8, 4, 3)


def features(seed, clips, steps, width):
    """Random features without zeros."""
    x = np.random.default_rng(seed).uniform(0.5, 1, (clips, steps, width))
    return x.astype(np.float32)


def padded(x, lengths):
    return x * (np.arange(x.shape[1]) < np.asarray(lengths)[:, None])[..., None]


def mmsa_content(aligned=False):
    """An MMSA file: unaligned ones state lengths of audio and vision and may pad with anything."""
    content = {}
    for seed, (split, clips) in enumerate(COUNTS.items()):
        rng = np.random.default_rng(seed)
        steps_v, steps_a = (T_L, T_L) if aligned else (T_V, T_A)
        lengths = rng.integers(1, T_L + 1, clips)
        bert = np.zeros((clips, 3, T_L), dtype=np.int64)
        bert[:, 0] = rng.integers(100, 30000, (clips, T_L))
        bert[:, 1] = np.arange(T_L) < lengths[:, None]
        label = np.linspace(-3, 3, clips)
        values = {
            "raw_text": np.array([f"clip {i} sagt ümlaut" for i in range(clips)], dtype=object),
            "audio": features(seed + 20, clips, steps_a, WIDTHS[2]),
            "vision": features(seed + 10, clips, steps_v, WIDTHS[1]).astype(np.float64),
            "id": [f"v{i}$_${i + 1}" for i in range(clips)],
            "text": features(seed, clips, T_L, WIDTHS[0]),
            "text_bert": bert,
            "annotations": ["Positive"] * clips,
            "classification_labels": np.full(clips, 2.0),
            "regression_labels": label.astype(np.float32 if seed else np.float64),
        }
        if aligned:
            values["audio"] = padded(values["audio"], lengths)
            values["vision"] = padded(values["vision"], lengths)
        else:
            values["audio_lengths"] = rng.integers(1, steps_a + 1, clips).tolist()
            values["vision_lengths"] = rng.integers(1, steps_v + 1, clips)
        content[split] = values
    return content


def mult_content():
    """A MulT file: padded on the left, labels (N, 1, 1), ids in three parts."""
    content = {}
    for seed, (split, clips) in enumerate(COUNTS.items()):
        content[split] = {
            "vision": features(seed + 10, clips, T_V, WIDTHS[1]),
            "text": features(seed, clips, T_L, WIDTHS[0]),
            "audio": features(seed + 20, clips, T_A, WIDTHS[2]).astype(np.float64),
            "labels": np.linspace(-3, 3, clips, dtype=np.float32).reshape(-1, 1, 1),
            "id": np.array([[b"video", b"%d.5" % i, b"%d" % (i + 2)] for i in range(clips)]),
        }
    return content


def write(path, content, protocol=4):
    path.write_bytes(pickle.dumps(content, protocol))
    return path


def load_quietly(loader, path, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return loader.load(path, **options)


def complaint(loader, path, kind=ValueError, **options):
    """The message of the error: one line that names the file."""
    with pytest.raises(kind) as caught:
        load_quietly(loader, path, **options)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


@pytest.fixture
def path(tmp_path):
    return tmp_path / "clips.pkl"


# MMSA


def test_mmsa_unaligned_gives_every_field_in_its_place(path):
    content = mmsa_content()
    splits = load_quietly(mmsa, write(path, content))
    assert splits.name == "mmsa" and splits.options == {"path": str(path), "language": "text"}
    assert splits.widths == WIDTHS and splits.lengths == (T_L, T_V, T_A)
    for split in splits:
        values, clips = content[split.name], split.clips
        np.testing.assert_array_equal(clips.language, values["text"])
        np.testing.assert_array_equal(clips.visual, values["vision"].astype(np.float32))
        np.testing.assert_array_equal(clips.acoustic, values["audio"])
        np.testing.assert_array_equal(clips.lengths[:, 0], values["text_bert"][:, 1].sum(1))
        np.testing.assert_array_equal(clips.lengths[:, 1], values["vision_lengths"])
        np.testing.assert_array_equal(clips.lengths[:, 2], values["audio_lengths"])
        np.testing.assert_array_equal(split.label, values["regression_labels"].astype("f4"))
        assert all(x.dtype == torch.float32 for x in (*clips.features, split.label))
        assert clips.ids == values["id"]
        assert split.transcripts == values["raw_text"].tolist()
        assert [len(names) for names in split.feature_names] == list(WIDTHS)


def test_mmsa_aligned_takes_lengths_from_the_zeros_at_the_end(path):
    content = mmsa_content(aligned=True)
    content["train"]["audio"][0, 1] = 0  # a gap inside a clip is no padding
    splits = load_quietly(mmsa, write(path, content))
    for split in splits:
        mask = content[split.name]["text_bert"][:, 1].sum(1)
        expected = np.stack([mask] * 3, axis=1)
        if split.name == "train":
            expected[0, 2] = 1 if mask[0] <= 2 else mask[0]
        np.testing.assert_array_equal(split.clips.lengths, expected)


def test_mmsa_without_a_mask_takes_language_lengths_from_the_zeros(path):
    content = mmsa_content(aligned=True)
    lengths = {}
    for split, values in content.items():
        lengths[split] = values.pop("text_bert")[:, 1].sum(1)
        values["text"] = padded(values["text"], lengths[split])
    for split in load_quietly(mmsa, write(path, content)):
        np.testing.assert_array_equal(split.clips.lengths[:, 0], lengths[split.name])


def test_mmsa_clip_without_steps_becomes_one_step_of_zeros(path):
    content = mmsa_content()
    content["valid"]["audio_lengths"][1] = 0
    content["valid"]["vision_lengths"][2] = 0
    content["valid"]["text_bert"][0, 1] = 0
    clips = load_quietly(mmsa, write(path, content)).valid.clips
    for m, clip in ((0, 0), (1, 2), (2, 1)):
        assert clips.lengths[clip, m] == 1
        assert not clips.features[m][clip, 0].any()
    np.testing.assert_array_equal(clips.acoustic[0], content["valid"]["audio"][0])


def test_mmsa_language_may_come_from_another_key_but_not_from_token_ids(path):
    content = mmsa_content()
    for seed, values in enumerate(content.values()):
        glove = features(seed + 50, len(values["id"]), 4, 300)
        values["glove"] = padded(glove, [2] * len(values["id"]))
    write(path, content)
    splits = load_quietly(mmsa, path, language="glove")
    assert splits.widths == (300, *WIDTHS[1:])
    assert (splits.train.clips.lengths[:, 0] == 2).all()
    assert "token ids" in complaint(mmsa, path, language="text_bert")
    assert "did you mean 'glove'?" in complaint(mmsa, path, language="glov")


def test_mmsa_fields_may_be_lists(path):
    content = mmsa_content()
    as_lists = {
        split: {
            key: list(x) if key == "text" else x.tolist() if isinstance(x, np.ndarray) else x
            for key, x in values.items()
        }
        for split, values in content.items()
    }
    arrays = load_quietly(mmsa, write(path, content))
    lists = load_quietly(mmsa, write(path.with_name("lists.pkl"), as_lists))
    assert arrays.fingerprint() == lists.fingerprint()
    assert lists.train.transcripts == arrays.train.transcripts


@pytest.mark.parametrize("protocol", range(6))
def test_mmsa_of_every_protocol_and_of_old_numpy(path, protocol):
    expected = load_quietly(mmsa, write(path, mmsa_content())).fingerprint()
    assert load_quietly(mmsa, write(path, mmsa_content(), protocol)).fingerprint() == expected
    if protocol < 4:  # later protocols state the length of names, and of what follows them
        path.write_bytes(path.read_bytes().replace(b"numpy._core", b"numpy.core"))
        assert load_quietly(mmsa, path).fingerprint() == expected


@pytest.mark.filterwarnings("ignore:.*none of the published", "error:.*not writable")
def test_read_only_arrays_become_tensors_that_may_be_changed(path):
    content = mmsa_content()
    for values in content.values():
        values["text"].flags.writeable = False
    splits = mmsa.load(write(path, content, protocol=5))
    splits.train.clips.language[0] = 7  # torch warns where this would be undefined
    np.testing.assert_array_equal(splits.train.clips.language[1], content["train"]["text"][1])


@pytest.mark.filterwarnings("ignore:.*none of the published")
def test_infinite_and_huge_features_become_zero_with_one_warning(path):
    content = mmsa_content(aligned=True)
    content["train"]["audio"][0, 0, :2] = -np.inf
    content["train"]["vision"][1, 0, 0] = 1e39  # beyond float32, and it is a float64 field
    content["test"]["text"][0, 0, 0] = np.nan
    # A last step that could not be measured is a step all the same.
    content["test"]["audio"][0] = 1
    content["test"]["audio"][0, -1] = -np.inf
    write(path, content)
    with pytest.warns(UserWarning, match="replaced by 0") as caught:
        splits = mmsa.load(path)
    (message,) = (str(w.message) for w in caught if "replaced" in str(w.message))
    assert str(path) in message and "\n" not in message
    for part in (
        f"audio of the train split: 2 of {5 * T_L * 3} values replaced by 0 (2 -inf)",
        "vision of the train split: 1 of",
        "1 too large for 32 bits",
        "text of the test split: 1 of",
        "1 NaN",
    ):
        assert part in message
    assert not splits.train.clips.acoustic[0, 0, :2].any()
    assert splits.train.clips.acoustic[0, 0, 2] == content["train"]["audio"][0, 0, 2]
    assert splits.test.clips.lengths[0, 2] == T_L


def test_an_unknown_file_gives_a_warning_and_a_known_one_none(path, monkeypatch):
    write(path, mmsa_content())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.warns(UserWarning, match=digest) as caught:
        mmsa.load(path)
    assert len(caught) == 1 and str(path) in str(caught[0].message)
    monkeypatch.setitem(mmsa.CHECKSUMS, "known now", digest)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mmsa.load(path)


def test_the_published_checksums_are_four_sha256():
    assert len(set(mmsa.CHECKSUMS.values())) == 4
    assert all(len(bytes.fromhex(digest)) == 32 for digest in mmsa.CHECKSUMS.values())


def changed(key, value):
    """A change of one field of the validation split."""

    def change(content):
        content["valid"][key] = value(content["valid"][key]) if callable(value) else value

    return change


def label(value):
    def change(x):
        x[1] = value
        return x

    return changed("regression_labels", change)


WRONG_MMSA = {
    "missing split": (lambda c: c.update(val=c.pop("valid")), "no split 'valid'", "'val'"),
    "split is no mapping": (lambda c: c.update(valid=[1]), "valid split is a list"),
    "missing key": (lambda c: c["valid"].update(visions=c["valid"].pop("vision")),
                    "no 'vision'", "did you mean 'visions'?"),
    "no keys": (lambda c: c.update(valid={}), "no 'regression_labels'"),
    "key with a line break": (lambda c: c.update(valid={"regression\nlabels": 1}), "\\n"),
    "fewer clips": (changed("audio", lambda x: x[:-1]), "'audio'", "2 entries", "3 labels"),
    "fewer ids": (changed("id", lambda x: x[:-1]), "'id'", "2 entries"),
    "more transcripts": (changed("raw_text", ["a"] * 4), "'raw_text'", "4 entries"),
    "fewer lengths": (changed("vision_lengths", [1, 1]), "'vision_lengths'", "2 entries"),
    "two axes": (changed("vision", lambda x: x[0]), "'vision'", "shape"),
    "no steps": (changed("vision", lambda x: x[:, :0]), "'vision'", "shape"),
    "text as features": (changed("text", [["a"], ["b"], ["c"]]), "'text'", "numbers"),
    "text array as features": (changed("text", np.array(["a", "b", "c"])), "'text'", "numbers"),
    "mapping as features": (changed("text", {}), "'text'", "dict"),
    "ragged": (changed("audio", [np.ones((2, 3)), np.ones((3, 3)), np.ones((2, 3))]), "'audio'",
               "same shape"),
    "complex": (changed("audio", lambda x: x.astype(complex)), "'audio'", "complex"),
    "huge integers": (changed("audio_lengths", [2**100] * 3), "'audio_lengths'"),
    "length beyond the steps": (changed("audio_lengths", [1, T_A + 1, 1]), "'audio_lengths'",
                                "8 for clip 1", f"0 and {T_A}"),
    "negative length": (changed("audio_lengths", [1, 1, -1]), "'audio_lengths'", "-1 for clip 2"),
    "half a step": (changed("audio_lengths", [1.5, 1, 1]), "'audio_lengths'", "1.5 for clip 0"),
    "length NaN": (changed("audio_lengths", [np.nan, 1, 1]), "'audio_lengths'", "nan for clip 0"),
    "two lengths a clip": (changed("audio_lengths", np.ones((3, 2))), "'audio_lengths'", "(3, 2)"),
    "mask with a gap": (changed("text_bert", lambda x: x[:, :, ::-1] * 0 + [1, 0, 1, 0, 0, 0]),
                        "'text_bert'", "gap"),
    "mask of other steps": (changed("text_bert", lambda x: x[:, :, 1:]), "'text_bert'", "shape"),
    "NaN label": (label(np.nan), "v1$_$2", "nan"),
    "infinite label": (label(np.inf), "v1$_$2", "inf"),
    "label beyond float32": (changed("regression_labels", [0.0, 1e300, 0.0]), "v1$_$2", "inf"),
    "label out of range": (label(3.5), "v1$_$2", "3.5", "[-3, 3]"),
    "labels in two columns": (changed("regression_labels", np.ones((3, 2))),
                              "'regression_labels'", "(3, 2)"),
    "label is text": (changed("regression_labels", ["a", "b", "c"]), "'regression_labels'"),
    "one label for all": (changed("regression_labels", 1.0), "'regression_labels'", "float"),
    "id is a list": (changed("id", [["a", "b"]] * 3), "'id'", "list"),
    "ids are one text": (changed("id", "abc"), "'id'", "str"),
    "other width": (changed("text", lambda x: x[:, :, :5]), "widths", "valid"),
    "empty split": (lambda c: c.update(valid={k: v[:0] for k, v in c["valid"].items()}), "empty"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_MMSA)
def test_a_wrong_mmsa_file_is_refused_in_one_sentence(case, path):
    change, *parts = WRONG_MMSA[case]
    content = mmsa_content()
    change(content)
    message = complaint(mmsa, write(path, content))
    for part in ("valid", *parts):
        assert part in message


def test_what_is_no_dataset_is_refused(path):
    assert "list" in complaint(mmsa, write(path, [1, 2]))
    path.write_bytes(b"\x80\x04cos\nsystem\n.")
    assert "os.system" in complaint(mmsa, path)
    complaint(mmsa, path.with_name("absent.pkl"), FileNotFoundError)


# Export


def splits_by_hand(aligned, ids=True, transcripts=True):
    """Three splits with clips of every length from one step on, and values beyond the lengths."""
    steps = (T_L,) * 3 if aligned else (T_L, T_V, T_A)
    made = []
    for seed, (name, clips) in enumerate(COUNTS.items()):
        rng = np.random.default_rng(seed)
        lengths = np.stack([rng.integers(1, t + 1, clips) for t in steps], axis=1)
        lengths[0] = 1
        if aligned:
            lengths[:] = lengths[:, :1]
        x = [features(seed + m, clips, t, w) for m, (t, w) in enumerate(zip(steps, WIDTHS))]  # noqa: B905
        x[1][0, 0] = 0  # a valid step of zeros
        x[2][1:] = padded(x[2][1:], lengths[1:, 2] - 1)  # the last valid step is all zeros
        batch = Batch(
            *map(torch.from_numpy, x),
            torch.from_numpy(lengths),
            torch.from_numpy(np.round(rng.uniform(-3, 3, clips) * 5).astype(np.float32) / 5),
            [f"{name}é$_${i}" for i in range(clips)] if ids else None,
        )
        names = PerModality(*([f"{i}" for i in range(w)] for w in WIDTHS))
        words = ["so ‘good’\n", "", "a" * 300, "ünï", "x"][:clips] if transcripts else None
        made.append(Dataset(name, batch, names, words))
    return Splits(*made)


@pytest.mark.parametrize("aligned", [True, False])
def test_load_gives_back_what_export_wrote(aligned, path):
    splits = splits_by_hand(aligned)
    mmsa.export(splits, path)
    back = load_quietly(mmsa, path)
    assert back.fingerprint() == splits.fingerprint()  # features, lengths and labels, bit by bit
    for split, again in zip(splits, back, strict=True):
        assert again.name == split.name
        assert again.clips.ids == split.clips.ids
        assert again.transcripts == split.transcripts
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_export_without_ids_transcripts_and_lengths(path):
    splits = splits_by_hand(True, ids=False, transcripts=False)
    for split in splits:
        split.clips = Batch(*split.clips.features, label=split.clips.label)
    mmsa.export(splits, path)
    back = load_quietly(mmsa, path)
    assert back.fingerprint() == splits.fingerprint()
    assert back.train.transcripts is None
    assert back.test.clips.ids == [f"test$_${i}" for i in range(COUNTS["test"])]


def test_export_has_the_keys_and_classes_of_mmsa(path):
    splits = splits_by_hand(False)
    splits.train.label[:] = torch.tensor([-0.2, 0.0, 0.2, -3, 3])
    mmsa.export(splits, path)
    content = pickle.loads(path.read_bytes())  # written here, so the stock reader may read it
    assert set(content) == set(COUNTS)
    for values in content.values():
        assert set(values) == set(mmsa_content()["train"])
    train = content["train"]
    assert train["classification_labels"].tolist() == [0, 1, 2, 0, 2]
    assert train["annotations"] == ["Negative", "Neutral", "Positive", "Negative", "Positive"]
    assert train["text_bert"].shape == (5, 3, T_L)
    assert not train["text_bert"][:, [0, 2]].any()
    assert path.read_bytes()[:2] == b"\x80\x04"
    assert train["audio"].flags.writeable  # other frameworks change it in place


def test_a_failed_export_leaves_the_old_file_and_nothing_else(path, monkeypatch):
    splits = splits_by_hand(True)
    mmsa.export(splits, path)
    before = path.read_bytes()

    def disk_full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pickle, "dump", disk_full)
    with pytest.raises(OSError) as caught:
        mmsa.export(splits, path)
    assert str(caught.value) == f"cannot write {path}: No space left on device"
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_export_to_where_nothing_can_be_written(tmp_path):
    splits = splits_by_hand(True)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for target in ("absent/clips.pkl", "file/clips.pkl", "folder"):
        with pytest.raises(OSError) as caught:
            mmsa.export(splits, tmp_path / target)
        assert str(caught.value).startswith(f"cannot write {tmp_path / target}: ")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


# MulT


def test_mult_gives_every_field_in_its_place(path):
    content = mult_content()
    splits = load_quietly(mult, write(path, content))
    assert splits.name == "mult" and splits.options == {"path": str(path)}
    for split in splits:
        values, clips = content[split.name], split.clips
        np.testing.assert_array_equal(clips.language, values["text"])
        np.testing.assert_array_equal(clips.visual, values["vision"])
        np.testing.assert_array_equal(clips.acoustic, values["audio"].astype(np.float32))
        np.testing.assert_array_equal(split.label, values["labels"][:, 0, 0])
        assert clips.lengths.tolist() == [[T_L, T_V, T_A]] * len(split)
        assert clips.ids[0] == "video$_$0.5$_$2"


@pytest.mark.parametrize("ids", [
    ["one", "two", "three"],
    [b"one", b"two", b"three"],
    np.array(["one", "two", "three"]),
    np.array([b"one", b"two", b"three"], dtype=object),
    [(b"one",), ["two"], np.array([b"three"])],
])  # fmt: skip
def test_mult_ids_of_every_kind(ids, path):
    content = mult_content()
    content["valid"]["id"] = ids
    assert load_quietly(mult, write(path, content)).valid.clips.ids == ["one", "two", "three"]


def test_mult_without_ids(path):
    content = mult_content()
    expected = load_quietly(mult, write(path, content)).fingerprint()
    for values in content.values():
        del values["id"]
    found = load_quietly(mult, write(path, content))
    assert found.fingerprint() == expected
    assert all(split.clips.ids is None for split in found)


def test_mult_padding_moves_from_the_left_to_the_right(path):
    content = mult_content()
    x = content["train"]["audio"]
    whole = x.copy()
    x[0, :3] = 0  # padded on the left
    x[1, 4:] = 0  # on the right
    x[2, :2] = x[2, -1:] = 0  # on both sides: not ours to say what that means
    x[3] = 0  # nothing there
    x[4, 3] = 0  # a gap
    clips = load_quietly(mult, write(path, content)).train.clips
    assert clips.lengths[:, 2].tolist() == [T_A - 3, 4, T_A - 1, 1, T_A]
    moved = clips.acoustic.numpy()
    np.testing.assert_array_equal(moved[0, : T_A - 3], whole[0, 3:].astype(np.float32))
    assert not moved[0, T_A - 3 :].any()
    for clip in (1, 2, 3, 4):
        np.testing.assert_array_equal(moved[clip], x[clip].astype(np.float32))
    assert clips.lengths[:, :2].tolist() == [[T_L, T_V]] * 5  # each modality by itself


def test_mult_of_python_2(path):
    content = mult_content()
    expected = load_quietly(mult, write(path, content))
    for values in content.values():
        values["id"] = [tuple(parts) for parts in values["id"].tolist()]
    path.write_bytes(python2_pickle.dumps(content))
    found = load_quietly(mult, path)
    assert found.fingerprint() == expected.fingerprint()
    assert found.train.clips.ids == expected.train.clips.ids


WRONG_MULT = {
    "mmsa keys": (lambda c: c["valid"].update(regression_labels=c["valid"].pop("labels")),
                  "no 'labels'", "regression_labels"),
    "fewer clips": (changed("text", lambda x: x[:-1]), "'text'", "2 entries"),
    "two labels a clip": (changed("labels", np.ones((3, 1, 2))), "'labels'", "(3, 1, 2)"),
    "label out of range": (changed("labels", np.full((3, 1, 1), 4.0)), "4", "[-3, 3]"),
    "id of numbers and lists": (changed("id", [[["a"]], "b", "c"]), "'id'", "list"),
    "two axes": (changed("audio", lambda x: x[:, 0]), "'audio'", "shape"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_MULT)
def test_a_wrong_mult_file_is_refused_in_one_sentence(case, path):
    change, *parts = WRONG_MULT[case]
    content = mult_content()
    change(content)
    message = complaint(mult, write(path, content))
    for part in ("valid", *parts):
        assert part in message


def test_both_formats_are_found_by_name(path):
    write(path, mult_content())
    assert data.load("mult", path=path).name == "mult"
    write(path, mmsa_content())
    with pytest.warns(UserWarning):
        assert data.load("mmsa", path=str(path)).name == "mmsa"
    with pytest.raises(ValueError, match="path="):
        data.load("mmsa")
    with pytest.raises(ValueError, match="language=5"):
        data.load("mmsa", path=path, language=5)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("mmsa", {"path": None}, "needs the option path"),
        ("mmsa", {"path": 5}, "path=5 is not the path"),
        ("mult", {"path": b"clips.pkl"}, "is not the path"),
        ("mosi_utterances", {"root": 5}, "root=5 is not the path"),
    ],
)
def test_what_is_no_path_is_refused(name, options, says):
    with pytest.raises(ValueError, match=says):
        data.load(name, **options)


# sanitise


def test_sanitise_replaces_what_is_not_finite_and_counts_it():
    x = np.array([[np.nan, np.inf, -np.inf], [1e39, -1e39, 3e38], [np.nan, 0.5, -np.inf]])
    before = x.copy()
    y, report = sanitise(x)
    assert y.dtype == np.float32
    np.testing.assert_array_equal(y, np.array([[0, 0, 0], [0, 0, 3e38], [0, 0.5, 0]], np.float32))
    np.testing.assert_array_equal(x, before)
    assert (report.nan, report.positive_infinity, report.negative_infinity) == (2, 1, 2)
    assert report.too_large == 2 and report.replaced == 7 and report.values == 9
    assert str(report) == (
        "7 of 9 values replaced by 0 (2 NaN, 1 inf, 2 -inf, 2 too large for 32 bits)"
    )


@pytest.mark.parametrize("code", ["?", "i1", "u8", "f2", "f4", ">f4", "f8", "g"])
def test_sanitise_leaves_clean_values_of_every_type(code):
    x = np.array([[0, 1, 1]]).astype(code)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y, report = sanitise(x)
    np.testing.assert_array_equal(y, [[0, 1, 1]])
    assert y.dtype == np.dtype("f4") and report.replaced == 0
    assert str(report) == "0 of 3 values replaced by 0"


@pytest.mark.parametrize("x", [["a"], [1j], [None], [{}]])
def test_sanitise_refuses_what_is_no_number(x):
    with pytest.raises(ValueError, match="real numbers"):
        sanitise(np.array(x))
