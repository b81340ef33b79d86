"""The device of a run, and memory that stays with the process."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from dmd.device import keep_freed_memory
torch.set_num_threads(1)
if {keep}:
    keep_freed_memory()
def pages(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3): [torch.ones(1 << 21) for _ in range(3)]
before = pages()
for _ in range(20): [torch.ones(1 << 21) for _ in range(3)]
print(pages() - before)
"""


def faults(keep):
    """New pages for 60 blocks of 8 MB, of which three exist at a time."""
    script = [sys.executable, "-c", FAULTS.format(keep=keep)]
    return int(subprocess.run(script, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux hands pages back at once")
def test_freed_memory_stays_with_the_process():
    assert faults(keep=True) < 100 < 10_000 < faults(keep=False)
