"""The methods that the paper compares DMD with (Tables 1 and 2), built and called like DMD."""

from typing import Any

from dmd.baselines.base import Baseline, BaselineOutput, MethodConfig
from dmd.baselines.ef_lstm import EFLSTM
from dmd.baselines.fdmer import FDMER
from dmd.baselines.graph_mfn import GraphMFN
from dmd.baselines.lf_lstm import LFLSTM
from dmd.baselines.lmf import LMF
from dmd.baselines.mctn import MCTN
from dmd.baselines.mfm import MFM
from dmd.baselines.mica import MICA
from dmd.baselines.misa import MISA
from dmd.baselines.mult import MulT
from dmd.baselines.mult_gd import MulTGD
from dmd.baselines.pmr import PMR
from dmd.baselines.raven import RAVEN
from dmd.baselines.tfn import TFN
from dmd.options import nearest

METHODS: dict[str, type[Baseline]] = {
    "ef_lstm": EFLSTM,
    "lf_lstm": LFLSTM,
    "tfn": TFN,
    "lmf": LMF,
    "mfm": MFM,
    "raven": RAVEN,
    "mctn": MCTN,
    "mult": MulT,
    "mult_gd": MulTGD,
    "graph_mfn": GraphMFN,
    "misa": MISA,
    "pmr": PMR,
    "mica": MICA,
    "fdmer": FDMER,
}
NAMES = tuple(METHODS)

__all__ = ["METHODS", "NAMES", "Baseline", "BaselineOutput", "MethodConfig", "build"]


def build(
    name: str, widths: tuple[int, int, int], lengths: tuple[int, int, int], **options: Any
) -> Baseline:
    """The method called `name` for features of these widths and at most these lengths (L, V, A).

    options: those of the method, see its class; `METHODS[name].options()` lists their defaults.
    Raises ValueError for an unknown name or option, naming the nearest, and for lengths that
    differ where a method needs aligned clips.
    """
    if name not in METHODS:
        raise ValueError(nearest(name, METHODS, "method"))
    model: Baseline = METHODS[name].build(name, widths, lengths, options)
    return model
