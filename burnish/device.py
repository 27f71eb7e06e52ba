"""The machine: device, dtype, seeds, a synchronised clock, memory, energy, and what `burnish env` prints."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import json
import os
import platform
import random
import re
import shutil
import sys
import sysconfig
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from burnish.config import UserError, nearest

DTYPES = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "float32": torch.float32,
    "fp64": torch.float64,
    "float64": torch.float64,
}
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "datasets", "numpy")
OPTIONAL_PACKAGES = ("peft", "bitsandbytes", "torchao", "gguf", "tensorboard", "triton")
POWERCAP = Path("/sys/class/powercap")
CGROUPS = Path("/sys/fs/cgroup")
CGROUP_MEMBERSHIP = Path("/proc/self/cgroup")


def pick_device(name: str = "auto") -> torch.device:
    """`name`: auto (CUDA if there is one), cpu, cuda or cuda:N. Raises UserError for one that is not here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        near = nearest(name, ["auto", "cpu", "cuda"])
        raise UserError(f"device: '{name}' is not one of auto, cpu, cuda, cuda:N{near}")
    device = torch.device(name)
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UserError(f"device: '{name}' asked for, but torch sees {count} CUDA devices; use auto or cpu")
    return device


def parse_dtype(name: str | torch.dtype | None) -> torch.dtype | None:
    """`name`: bf16, fp16, fp32, torch's own name, a dtype, or None. Raises UserError for another."""
    if name is None or isinstance(name, torch.dtype):
        return name
    key = name.removeprefix("torch.").lower()
    if key not in DTYPES:
        raise UserError(f"dtype: '{name}' is not one of {', '.join(DTYPES)}{nearest(key, DTYPES)}")
    return DTYPES[key]


def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for products of bfloat16. x86 without them multiplies float32 several
    times as fast; of other processors torch does not tell, and they are taken to have them."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def seed_everything(seed: int) -> None:
    """Seeds Python, numpy and torch on every device."""
    import numpy

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def clock(device: torch.device | str = "cpu") -> float:
    """Seconds on a monotonic clock, after all work queued on `device` is done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def fetched(x: torch.Tensor) -> Callable[[], list[Any]]:
    """Begin to bring numbers to the host; the function that it gives waits for them, not for what is sent to the device
    meanwhile."""
    if x.device.type != "cuda":
        return x.tolist
    copy = x.to("cpu", non_blocking=True)  # pinned
    event = torch.cuda.current_stream(x.device).record_event()

    def arrive() -> list[Any]:
        event.synchronize()
        return copy.tolist()

    return arrive


def resident_memory() -> int:
    """Bytes of this process resident in memory now (its peak where /proc is missing)."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return _lifetime_peak()


def reset_peak_memory(device: torch.device | str = "cpu") -> None:
    """Starts a new peak at the present use; a thread samples every 2 ms where the kernel cannot do it."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        _sampler.start()


def peak_memory(device: torch.device | str = "cpu") -> int:
    """Most bytes in use since `reset_peak_memory`: allocated on a GPU, resident in this process on a CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _sampler.peak() or _kernel_kilobytes("/proc/self/status", "VmHWM") or _lifetime_peak()


def return_freed_memory() -> None:
    """Give the system the memory that glibc's malloc keeps for later; nothing where there is another malloc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def return_large_blocks() -> None:
    """Have glibc's malloc give blocks of a MiB and more back as soon as they are freed, from now on; it keeps up to
    two of 32 MiB else."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD, which else grows with what is freed


def available_memory(device: torch.device | str = "cpu") -> int:
    """Bytes that this process can still take on `device`, within the cgroup's limit on a CPU."""
    if torch.device(device).type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    free = _kernel_kilobytes("/proc/meminfo", "MemAvailable") or total_memory()
    return max(0, min([free, *(limit - used for limit, used in _cgroups())]))


def total_memory() -> int:
    """Bytes of physical memory, whatever the cgroup allows."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory_limit() -> int | None:
    """Bytes that the tightest cgroup around this process allows; None where none limits it."""
    limits = [limit for limit, _ in _cgroups()]
    return min(limits) if limits else None


def energy_joules() -> float | None:
    """Joules used by the processor packages, from an arbitrary zero (RAPL); None where not readable.

    A counter wraps after minutes to hours of load; one wrap between two calls is accounted for.
    """
    total = 0
    for zone in sorted(POWERCAP.glob("intel-rapl:[0-9]*")):
        try:
            if zone.name.count(":") > 1 or not (zone / "name").read_text().startswith("package"):
                continue
            now, span = (int((zone / name).read_text()) for name in ("energy_uj", "max_energy_range_uj"))
        except OSError:
            continue
        last, wrapped = _energy_seen.get(zone.name, (now, 0))
        _energy_seen[zone.name] = now, wrapped + (span if now < last else 0)
        total += sum(_energy_seen[zone.name])
    return total / 1e6 if total else None


def compiler() -> str | None:
    """Path of the C++ compiler that torch.compile would use; None where there is none."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    return next((path for name in names if (path := shutil.which(name))), None)


def compiler_line() -> str | None:
    """One line: what is slower for want of a C++ compiler or Python's headers; None where both are there."""
    if not compiler():
        missing = "no C++ compiler found"
    elif not Path(sysconfig.get_path("include"), "Python.h").exists():
        missing = "Python.h not found (python3-dev)"
    else:
        return None
    return f"{missing}: torch.compile is off; training and quantised inference run on plain torch, slower"


def environment() -> dict[str, Any]:
    """Versions, processor, threads, memory and GPUs, JSON-able, to stand beside every measurement."""
    cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    gpus = [
        {"name": card.name, "memory_bytes": card.total_memory, "capability": f"{card.major}.{card.minor}"}
        for card in cards
    ]
    return {
        "burnish": _version("burnish"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in (*PACKAGES, *OPTIONAL_PACKAGES)},
        "cpu": _cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": total_memory(),
        "memory_limit_bytes": memory_limit(),
        "memory_available_bytes": available_memory(),
        "cuda": torch.version.cuda if gpus else None,
        "gpus": gpus,
        "compiler": compiler(),
        "energy_counters": energy_joules() is not None,
    }


@dataclass(frozen=True)
class EnvConfig:
    json: bool = field(default=False, metadata={"help": "print JSON"})


def run_env(config: EnvConfig) -> int:
    """Prints `environment()`."""
    found = environment()
    if config.json:
        print(json.dumps(found, indent=2))
        return 0
    packages = found["packages"]
    gpus = [f"{gpu['name']}, {_gib(gpu['memory_bytes'])}, CUDA {found['cuda']}" for gpu in found["gpus"]]
    rows = {
        **{name: found[name] for name in ("burnish", "python", "platform")},
        **{name: version or "not installed" for name, version in packages.items()},
        "cpu": f"{found['cpu']}, {found['cpu_capability']}",
        "cores": f"{found['cores']}, {found['threads']} threads in use",
        "memory": f"{_gib(found['memory_bytes'])}, {_gib(found['memory_available_bytes'])} available",
        "memory limit": _gib(found["memory_limit_bytes"]) if found["memory_limit_bytes"] else "none",
        "gpu": "; ".join(gpus) or "none",
        "energy counters": "readable" if found["energy_counters"] else "not readable; no energy is reported",
        "compiler": compiler_line() or found["compiler"],
    }
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
    return 0


class _Sampler:
    """Peak of `resident_memory` by sampling, for kernels that do not let a process reset its own peak."""

    def __init__(self) -> None:
        self._peak = 0
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._peak = resident_memory()
        if self._thread is None:
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()

    def peak(self) -> int:
        """Bytes; 0 where nothing is sampled."""
        return max(self._peak, resident_memory()) if self._thread else 0

    def _sample(self) -> None:
        while True:
            self._peak = max(self._peak, resident_memory())
            time.sleep(0.002)


_sampler = _Sampler()
_energy_seen: dict[str, tuple[int, int]] = {}  # zone -> (last reading, microjoules lost to wraps)


def _kernel_kilobytes(path: str, key: str) -> int | None:
    """Bytes of a `key:  N kB` line of a /proc file; None where it is missing."""
    try:
        found = re.search(rf"^{key}:\s+(\d+) kB", Path(path).read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def _lifetime_peak() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _cgroups() -> list[tuple[int, int]]:
    """(limit, bytes used less cold file cache) of every memory cgroup with a limit around this process."""
    try:
        lines = [line.split(":", 2) for line in CGROUP_MEMBERSHIP.read_text().splitlines()]
    except OSError:
        return []
    found = []
    for _, controllers, path in lines:
        if controllers and "memory" not in controllers.split(","):
            continue
        base = CGROUPS / "memory" if controllers else CGROUPS
        names = ("limit_in_bytes", "usage_in_bytes") if controllers else ("max", "current")
        inactive = "total_inactive_file" if controllers else "inactive_file"
        start = base / path.strip("/")
        for folder in [start, *start.parents]:
            if not folder.is_relative_to(base):
                break
            try:
                limit, used = (int((folder / f"memory.{name}").read_text()) for name in names)
                stat = (folder / "memory.stat").read_text()
            except (OSError, ValueError):  # no such cgroup in this namespace, or "max"
                continue
            cold = re.search(rf"^{inactive} (\d+)", stat, re.MULTILINE)
            if limit < total_memory():
                found.append((limit, used - (int(cold[1]) if cold else 0)))
    return found


def _cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    if package == "burnish":
        from burnish import __version__

        return __version__
    if package == "torch":
        return str(torch.__version__)
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
