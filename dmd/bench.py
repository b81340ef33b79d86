"""How fast a training step is, and how far from what the machine can do: `python -m dmd bench`.

Variants of the step run in turn, so that a machine that slows down slows all of them.
"""

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from dmd.checkpoint import provenance
from dmd.device import find_device
from dmd.flops import step_flops
from dmd.model import DMD
from dmd.steps import Case, Step, make_cases

LIMIT = 30.0  # seconds: a series of the scaling ends with a step that takes longer
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
LENGTHS = (50, 100, 200, 400, 700, 1000)


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long `work` takes, on the device too."""
    synchronise(device)
    began = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - began


def operations(step: Step) -> int:
    """Operations dispatched: the profiler's events called `aten::...`, nested ones included."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        step()
    return sum(row.count for row in found.key_averages() if row.key.startswith("aten::"))


def counted_flops(step: Step) -> int:
    """Operations in products, by PyTorch's counter: what the step really multiplies.

    Against `dmd.flops.step_flops` it has more where there are too many attention weights to keep,
    so that the package computes them again, where separate values take their keys along, and where
    heads are padded for a kernel; less for the convolutions, whose input, the clips, needs no
    gradient. It does not know PyTorch's own kernel of attention for processors, which runs with
    bf16 or long sequences where the attention has no dropout.
    """
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def machine_limits(device: torch.device) -> dict[str, float]:
    """What the device can do: medians of large float32 products and copies, and of tiny ones.

    matmul_flops: operations a second in a product of square matrices; copy_bytes: bytes a second,
    read and written; launch_seconds: of adding one number in place.
    """
    size, numbers = (8192, 1 << 28) if device.type == "cuda" else (2048, 1 << 25)
    launches = 2000
    x, y = (torch.randn(size, size, device=device) for _ in range(2))
    product = torch.empty_like(x)
    source = torch.zeros(numbers, device=device)
    target = torch.empty_like(source)
    one = torch.zeros(1, device=device)

    def launch() -> None:
        for _ in range(launches):
            one.add_(1)

    def median(work: Callable[[], object]) -> float:
        return float(np.median([seconds(work, device) for _ in range(8)][1:]))

    return {
        "matmul_flops": 2 * size**3 / median(lambda: torch.mm(x, y, out=product)),
        "copy_bytes": 2 * 4 * numbers / median(lambda: target.copy_(source)),
        "launch_seconds": median(launch) / launches,
    }


def high_water(device: torch.device) -> int | None:
    """The most bytes this process has held so far: on a GPU of its memory, else of main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")  # not getrusage, which a process inherits from its parent
    if device.type != "cpu" or not status.exists():
        return None
    words = status.read_text().split()
    return 1024 * int(words[words.index("VmHWM:") + 1])


def _alone(case: Case, steps: int, limit: float, threads: int) -> tuple[list[float], int | None]:
    torch.set_num_threads(threads)
    device = find_device(case.train.device)
    before = high_water(device)
    step = case.step()
    warm_up = seconds(step, device)
    times = [] if warm_up > limit else [seconds(step, device) for _ in range(steps)]
    after = high_water(device)
    return times, None if before is None or after is None else after - before


def alone(case: Case, steps: int, limit: float = math.inf) -> tuple[list[float], int | None]:
    """Run a case in a process of its own: seconds of its steps, and bytes at the peak.

    The bytes are those that model, optimiser, clips and steps add to the process. No times if the
    first step, which warms up, takes longer than `limit` seconds. Raises
    MemoryError where that ran out.
    """
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        try:
            return pool.submit(_alone, case, steps, limit, torch.get_num_threads()).result()
        except BrokenProcessPool as error:
            raise MemoryError("the system ended the process") from error


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    known = isinstance(error, MemoryError | torch.cuda.OutOfMemoryError)
    return known or "can't allocate memory" in str(error)  # so says torch on a CPU


def report(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)


def compare(cases: Mapping[str, Case], rounds: int) -> dict[str, Any]:
    """Measure the machine and all cases: {"machine": ..., "variants": {name: ...}}."""
    device = find_device(next(iter(cases.values())).train.device)
    report("the machine")
    machine = machine_limits(device)
    rows: dict[str, dict[str, Any]] = {}
    steps: dict[str, Step] = {}
    for name, case in cases.items():
        report(f"{name}: memory, operations")
        memory = alone(case, 2)[1]
        step = steps[name] = case.step()
        first = seconds(step, device)
        rows[name] = {
            "parameters": sum(x.numel() for x in DMD(case.model).parameters()),
            "flops": step_flops(case.model, case.train.batch_size),
            "flops_counted": counted_flops(step),
            "operations": operations(step),
            "memory_bytes": memory,
            "first_seconds": first,
        }
        step()
    times: dict[str, list[float]] = {name: [] for name in cases}
    for i in range(rounds):
        report(f"round {i + 1}/{rounds}")
        for name, step in steps.items():
            times[name].append(seconds(step, device))
    for name, case in cases.items():
        low, median, high = np.quantile(times[name], (0.25, 0.5, 0.75)).tolist()
        rows[name] |= {
            "seconds": median,
            "spread_seconds": high - low,
            "clips_per_second": case.train.batch_size / median,
            "floor_ratio": median * machine["matmul_flops"] / rows[name]["flops"],
        }
    return {"machine": machine, "variants": rows}


def exponent(sizes: Sequence[float], times: Sequence[float]) -> float | None:
    """The p of times ~ sizes^p, from a line through their logarithms; None for one point."""
    if len(sizes) < 2:
        return None
    return float(np.polyfit(np.log(sizes), np.log(times), 1)[0])


def free_memory(device: torch.device) -> float:
    """Bytes that are left, where the system says so; a GPU complains by itself."""
    info = Path("/proc/meminfo")
    if device.type != "cpu" or not info.exists():
        return math.inf
    words = info.read_text().split()
    return 1024 * int(words[words.index("MemAvailable:") + 1])


def series(cases: Mapping[int, Case], rounds: int = 3, limit: float = LIMIT) -> dict[str, Any]:
    """Measure cases by size: `points`, `exponent` of the time of a step, and why it `stopped`."""
    points: list[dict[str, Any]] = []
    stopped = None
    for size, case in cases.items():
        if points and points[-1]["memory_bytes"] is not None:
            need = points[-1]["memory_bytes"] * size / points[-1]["size"]
            if need > free_memory(find_device(case.train.device)):
                stopped = f"stopped before {size}: it would need about {need / 1e9:.1f} GB"
                break
        try:
            times, memory = alone(case, rounds, limit)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            stopped = f"stopped at {size}: memory ran out"
            break
        if not times:
            stopped = f"stopped at {size}: a step takes longer than {limit:g} s"
            break
        median = float(np.median(times))
        clips = case.train.batch_size
        report(f"{size}: {clips / median:.1f} clips/s")
        points.append(
            {
                "size": size,
                "seconds": median,
                "clips_per_second": clips / median,
                "memory_bytes": memory,
            }
        )
    found = exponent([p["size"] for p in points], [p["seconds"] for p in points])
    return {"points": points, "exponent": found, "stopped": stopped}


def run(
    preset: str = "paper",
    overrides: Mapping[str, Any] | None = None,
    batch_size: int = 16,
    rounds: int = 20,
    device: str = "auto",
    variants: Sequence[str] | None = None,
    scaling: bool = False,
) -> dict[str, Any]:
    """Measure everything: what `python -m dmd bench --json` prints.

    overrides: options of ModelConfig; rounds: steps that are timed, of each variant; scaling: also
    `preset` with 1 to 1,024 clips, and with sequences of 50 to 1,000 steps.
    """
    began = time.perf_counter()
    cases = make_cases(preset, overrides, batch_size, device, variants)
    own = make_cases(preset, overrides, batch_size, device, [preset])[preset]
    result = {
        "preset": preset,
        "batch_size": batch_size,
        "rounds": rounds,
        "device": own.train.device,
        "model_config": own.model.to_dict(),
        "provenance": provenance(),
        **compare(cases, rounds),
    }
    if scaling:
        report("clips")
        clips = {n: replace(own, train=own.train.replace(batch_size=n)) for n in BATCHES}
        result["scaling"] = {"clips": series(clips)}
        report("steps of the sequences")
        steps = {n: replace(own, model=own.model.replace(lengths=(n, n, n))) for n in LENGTHS}
        result["scaling"]["length"] = series(steps)
    result["provenance"]["seconds"] = round(time.perf_counter() - began, 1)
    return result


COLUMNS = {  # title: key, unit, format
    "parameters": ("parameters", 1, ",.0f"),
    "GFLOP": ("flops", 1e9, ".2f"),
    "counted": ("flops_counted", 1e9, ".2f"),
    "operations": ("operations", 1, ",.0f"),
    "first": ("first_seconds", 1e-3, ",.0f"),
    "ms": ("seconds", 1e-3, ".1f"),
    "spread": ("spread_seconds", 1e-3, ".1f"),
    "MB": ("memory_bytes", 1e6, ",.0f"),
    "clips/s": ("clips_per_second", 1, ",.1f"),
    "x floor": ("floor_ratio", 1, ".1f"),
}


def table(result: Mapping[str, Any]) -> str:
    """What `run` found, for people."""
    machine = result["machine"]
    lines = [
        f"{result['device']}: {machine['matmul_flops'] / 1e9:,.0f} GFLOP/s in float32 matrix "
        f"products, copies at {machine['copy_bytes'] / 1e9:,.1f} GB/s, "
        f"{machine['launch_seconds'] * 1e6:.1f} microseconds to launch an operation",
        f"a training step of {result['batch_size']} clips: median and interquartile range of "
        f"{result['rounds']}, beside the floor of GFLOP at that rate",
        f"{'':<16}" + "".join(f"{title:>11}" for title in COLUMNS),
    ]
    for name, row in result["variants"].items():
        cells = (
            "-" if row[key] is None else format(row[key] / unit, style)
            for key, unit, style in COLUMNS.values()
        )
        lines.append(f"{name:<16}" + "".join(f"{cell:>11}" for cell in cells))
    for name, found in result.get("scaling", {}).items():
        lines += ["", f"{name:>8}{'ms':>11}{'clips/s':>11}"]
        for p in found["points"]:
            lines.append(f"{p['size']:>8}{p['seconds'] * 1e3:>11.1f}{p['clips_per_second']:>11.1f}")
        if found["exponent"] is not None:
            lines.append(f"the time of a step grows as {name} to the power {found['exponent']:.2f}")
        if found["stopped"] is not None:
            lines.append(found["stopped"])
    return "\n".join(lines)
