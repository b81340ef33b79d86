"""Turn features of any numeric type into finite 32-bit floats, and say what had to be replaced."""

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Report:
    """How many of `values` values `sanitise` replaced by 0: by kind, and in all (`replaced`)."""

    values: int
    nan: int = 0
    positive_infinity: int = 0
    negative_infinity: int = 0
    too_large: int = 0

    @property
    def replaced(self) -> int:
        """All values that were replaced."""
        return self.nan + self.positive_infinity + self.negative_infinity + self.too_large

    def __str__(self) -> str:
        kinds = {
            "NaN": self.nan,
            "inf": self.positive_infinity,
            "-inf": self.negative_infinity,
            "too large for 32 bits": self.too_large,
        }
        found = ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
        return f"{self.replaced} of {self.values} values replaced by 0" + (found and f" ({found})")


def sanitise(x: Any) -> tuple[np.ndarray, Report]:
    """`x` as finite float32 of the same shape, and the report of what was replaced.

    NaN, inf, -inf and finite values beyond the range of float32 become 0, as a feature that was
    not measured. `x` itself is never changed; where it is clean float32 already, it is returned.
    Raises ValueError where `x` does not hold real numbers.
    """
    x = np.asarray(x)
    if x.dtype.kind not in "biuf":
        raise ValueError(f"expected an array of real numbers, got one of {x.dtype}")
    with np.errstate(over="ignore", invalid="ignore"):
        y = x.astype(np.float32, copy=False)
    wrong = ~np.isfinite(y)
    if not wrong.any():
        return y, Report(x.size)
    report = Report(
        values=x.size,
        nan=int(np.isnan(x).sum()),
        positive_infinity=int(np.isposinf(x).sum()),
        negative_infinity=int(np.isneginf(x).sum()),
        too_large=int((wrong & np.isfinite(x)).sum()),
    )
    return np.where(wrong, np.float32(0), y), report
