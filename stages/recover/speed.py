"""How fast recovery's steps are on this machine, and what the machine could do at best."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Way:
    """One of several to do the same work.

    Attributes:
        run: does it, and gives a tensor that is there when it is done.
        ready: called before each turn, untimed: puts the process into the state that the way wants.
    """

    run: Callable[[], torch.Tensor]
    ready: Callable[[], object] = lambda: None


def in_turns(ways: Mapping[str, Way], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in its turns, so that what slows the machine down meanwhile slows all of them.

    Args:
        ways: by name.
        rounds: as many times each, after one that does not count: it warms up, and compiles.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            way.ready()
            spent = timed(way.run)
            if turn:
                seconds[name].append(spent)
    return seconds


def timed(run: Callable[[], torch.Tensor]) -> float:
    """Seconds until the result is on the CPU."""
    start = time.perf_counter()
    run().sum().item()
    return time.perf_counter() - start


def matmul_rate(device: torch.device, precision: str, seconds: float = 1.0) -> float:
    """Floating-point operations a second of a large matrix product, the best of many: the ceiling of arithmetic.

    Args:
        device: where.
        precision: fp32, tf32 or bf16.
        seconds: as long.
    """
    size = 8192 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, precision == "tf32"
    try:
        return 2 * size**3 / _best(lambda: (a @ b)[0], seconds)
    finally:
        matmul.allow_tf32 = before


def copy_rate(device: torch.device, seconds: float = 1.0) -> float:
    """Bytes a second, read and written, of a copy larger than any cache, the best of many: the ceiling of memory."""
    source = torch.randn(2**28 if device.type == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best(lambda: target.copy_(source)[:1], seconds)


def _best(run: Callable[[], torch.Tensor], seconds: float) -> float:
    run()
    end, best = time.perf_counter() + seconds, timed(run)
    while time.perf_counter() < end:
        best = min(best, timed(run))
    return best


def thread_count(device: torch.device) -> int:
    """torch threads that compute; 0 where a GPU does."""
    return 0 if device.type == "cuda" else torch.get_num_threads()


def has_bf16(device: torch.device) -> bool:
    """Whether bfloat16 is computed in hardware; elsewhere it is emulated, and slow."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.cpu.get_cpu_capability() != "AVX2" and "bf16" in _cpuinfo()


def processor(device: torch.device) -> str:
    """Its name, or kind."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    named = [line for line in _cpuinfo().splitlines() if line.startswith("model name")]
    return named[0].partition(":")[2].strip() if named else platform.machine()


def _cpuinfo() -> str:
    """What Linux tells; nothing elsewhere."""
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
