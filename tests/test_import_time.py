"""`import dmd` is quick: little more than `import torch`, and no plotting or table library."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROBE = """
import sys, time
times = [time.process_time()]
import torch, numpy, safetensors.torch
times.append(time.process_time())
import dmd
times.append(time.process_time())
heavy = {"matplotlib", "sklearn", "pandas", "scipy", "seaborn", "IPython", "ipywidgets"}
print(times[1] - times[0], times[2] - times[1], *sorted(heavy & {*sys.modules}))
"""


def probe():
    """Seconds of processor time for torch and for dmd, and the heavy modules that came along."""
    words = [sys.executable, "-c", PROBE]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    torch, dmd, *heavy = done.stdout.split()
    return float(torch), float(dmd), heavy


def test_import_is_quick_and_light():
    runs = [probe() for _ in range(3)]
    assert runs[0][2] == []
    torch, dmd = (min(run[part] for run in runs) for part in (0, 1))
    assert dmd < 0.3
    assert torch + dmd < 2.5
