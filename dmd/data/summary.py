"""What is in a dataset, as plain data (`describe`) and as text (`table`)."""

from typing import Any

import torch

from dmd.batch import MODALITIES
from dmd.data.dataset import Dataset, Splits

CLASSES = range(-3, 4)


def describe(splits: Splits) -> dict[str, Any]:
    """Counts of the three splits, as values that JSON can hold.

    For each split: clips; videos (what stands in an id before the first `$_$`, or else before its
    last `_`; None without ids); labels, the clips in each of the seven classes of rounded scores;
    and for each modality its width, its padded steps, the least, median and most valid steps, and
    what may be missing: values that are not finite (padding included), features that are zero in
    all clips, clips that are zero in all features, both at the valid steps.
    """
    return {"name": splits.name, "splits": {split.name: _describe(split) for split in splits}}


def _describe(split: Dataset) -> dict[str, Any]:
    clips = split.clips
    assert clips.lengths is not None  # set by Batch
    modalities = {}
    for m, (name, x, mask) in enumerate(zip(MODALITIES, clips.features, clips.masks, strict=True)):
        lengths = clips.lengths[:, m]
        used = (x != 0) & mask[..., None]
        modalities[name] = {
            "width": x.shape[2],
            "padded": x.shape[1],
            "min": int(lengths.min()),
            "median": float(lengths.double().quantile(0.5)),
            "max": int(lengths.max()),
            "non_finite": int((~torch.isfinite(x)).sum()),
            "zero_features": int((~used.any(dim=(0, 1))).sum()),
            "zero_clips": int((~used.any(dim=(1, 2))).sum()),
        }
    rounded = split.label.round()
    return {
        "clips": len(split),
        "videos": None if clips.ids is None else len({_video(name) for name in clips.ids}),
        "labels": {str(c): int((rounded == c).sum()) for c in CLASSES},
        "modalities": modalities,
    }


def _video(clip: str) -> str:
    if "$_$" in clip:  # MulT's ids have it twice: video, start, end
        return clip.partition("$_$")[0]
    return clip.rpartition("_")[0] or clip


def table(splits: Splits) -> str:
    """What `describe` says, as aligned text for a terminal."""
    found = describe(splits)
    counts = [["split", "clips", "videos", *(f"{c:+d}" if c else "0" for c in CLASSES)]]
    missing = ("not finite", "zero features", "zero clips")
    details = [["split", "modality", "width", "padded", "min", "median", "max", *missing]]
    for name, split in found["splits"].items():
        videos = "-" if split["videos"] is None else split["videos"]
        counts.append([name, split["clips"], videos, *split["labels"].values()])
        for modality, values in split["modalities"].items():
            median = f"{values['median']:g}"
            details.append([name, modality, *{**values, "median": median}.values()])
    return "\n".join(
        [
            f"{found['name']}: clips by rounded label",
            _align(counts, left=1),
            "",
            "steps by modality, and what may be missing",
            _align(details, left=2),
        ]
    )


def _align(rows: list[list[Any]], left: int) -> str:
    """The rows as lines of columns: the first `left` flush left, the others flush right."""
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    lines = (
        "  ".join(
            cell.ljust(width) if n < left else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in texts
    )
    return "\n".join(line.rstrip() for line in lines)
