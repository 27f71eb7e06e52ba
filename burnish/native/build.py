"""C files of the package, built by the system's compiler on first use.

Building takes some seconds, once per machine: the library is kept in $XDG_CACHE_HOME/burnish (~/.cache/burnish),
named by its sources, the compiler and the processor.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from burnish.device import compiler, compiler_line

FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-shared", "-fPIC")  # contraction changes roundings
BUILDS = (("-fopenmp",), ())  # the second where the compiler has no OpenMP

log = logging.getLogger(__name__)


def load(sources: Sequence[Path], extra: Sequence[str] = ()) -> ctypes.CDLL | None:
    """The library of C files of one folder, built with `extra` flags too; None, logged, where it cannot be had."""
    tool = compiler()
    if tool is None:
        log.warning(compiler_line())
        return None
    try:
        return ctypes.CDLL(str(_built(tool, sources, extra, cache())))
    except OSError:  # a cache that cannot be written to, or not executed from
        pass
    except subprocess.SubprocessError as error:
        names = ", ".join(path.name for path in sources)
        log.warning("%s failed on %s; burnish runs on plain torch, slower: %s", tool, names, error)
        return None
    try:
        with tempfile.TemporaryDirectory() as folder:
            return ctypes.CDLL(str(_built(tool, sources, extra, Path(folder))))
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("no native kernels; burnish runs on plain torch, slower: %s", error)
        return None


def cache() -> Path:
    """The folder of what is made once per machine."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "burnish"


def _built(tool: str, sources: Sequence[Path], extra: Sequence[str], folder: Path) -> Path:
    """The library in `folder`, compiled unless it is there. Safe beside other processes that do the same."""
    stat = os.stat(tool)
    texts = [path.read_text() for path in (*sources, *sorted(sources[0].parent.glob("*.h")))]
    key = [*texts, tool, str(stat.st_size), str(stat.st_mtime_ns), *FLAGS, *extra, _processor()]
    digest = hashlib.sha256("|".join(key).encode()).hexdigest()[:16]
    path = folder / f"{sources[0].stem}-{digest}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as room:
        made = Path(room) / path.name
        for index, parallel in enumerate(BUILDS):
            files = [word for source in sources for word in ("-x", "c", str(source))]  # g++ forgets -x
            command = [tool, *FLAGS, *extra, *parallel, "-o", str(made), *files]
            try:
                subprocess.run(command, check=True, capture_output=True, timeout=600)
                break
            except subprocess.SubprocessError:
                if index == len(BUILDS) - 1:
                    raise
        os.replace(made, path)
    return path


def _processor() -> str:
    """What -march=native depends on: the processor's name and instruction sets, where /proc tells them."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = platform.processor()
    lines = re.findall(r"^(?:model name|flags|Features|CPU part)\s*:.*$", text, re.MULTILINE)
    return platform.machine() + "".join(sorted(set(lines)) or text)
