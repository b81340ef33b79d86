"""The numbers that the paper reports, in percent, by the names that rows have in `dmd study`."""

from collections.abc import Mapping

# Accuracy of the sign in percent. Table 1, CMU-MOSI: aligned, aligned with BERT, unaligned.
MOSI = {
    "ef_lstm": 75.3, "lf_lstm": 76.8, "tfn": 73.9, "lmf": 76.4, "mfm": 78.1, "raven": 78.0,
    "mctn": 79.3, "mult": 83.0, "pmr": 83.6, "dmd": 84.5,
}  # fmt: skip
MOSI_BERT = {"misa": 83.4, "fdmer": 84.6, "dmd": 86.0}
MOSI_UNALIGNED = {
    "ef_lstm": 73.6, "lf_lstm": 77.6, "raven": 72.7, "mctn": 75.9, "mult": 81.1, "pmr": 82.4,
    "mica": 82.6, "dmd": 83.5,
}  # fmt: skip
MOSEI = {  # Table 2, CMU-MOSEI, the same three
    "ef_lstm": 78.2, "lf_lstm": 80.6, "graph_mfn": 76.9, "raven": 79.1, "mctn": 79.8,
    "mult": 82.5, "pmr": 83.3, "dmd": 85.0,
}  # fmt: skip
MOSEI_BERT = {"misa": 85.5, "fdmer": 86.1, "dmd": 86.6}
MOSEI_UNALIGNED = {
    "ef_lstm": 76.1, "lf_lstm": 77.5, "raven": 75.4, "mctn": 79.3, "mult": 81.6, "pmr": 83.1,
    "mica": 83.7, "dmd": 84.8,
}  # fmt: skip
TABLE3 = {  # F1 in percent on CMU-MOSI
    "nothing": 79.0, "decoupling": 79.3, "decoupling_homo": 80.8, "decoupling_homo_hetero": 80.6,
    "decoupling_homo_attention": 81.1, "dmd": 83.5,
}  # fmt: skip
TABLE5 = {"mult": 81.1, "mult_gd": 82.2, "dmd": 83.5}  # CMU-MOSI
# Each modality alone, CMU-MOSEI: without and with decoupling (Table 4), and HomoGD (Sec. 4.2).
ALONE = {"FD": ((81.2, 58.2, 53.4), (82.7, 62.8, 64.9)),
         "HomoGD": ((80.9, 56.5, 54.4), (82.4, 61.8, 64.1))}  # fmt: skip
STD = (12.1, 8.9)  # of the three, as printed in Table 4
BEHIND_ATTENTION = 83.8  # the visual modality in HeteroGD, Sec. 4.2


def gains(block: Mapping[str, float]) -> dict[str, float]:
    """By how much DMD is above each other method of a block of the paper's tables."""
    return {name: round(block["dmd"] - x, 1) for name, x in block.items() if name != "dmd"}
