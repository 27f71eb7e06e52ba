"""A process for each job, forked from one that has imported everything.

Importing torch and what training needs takes seconds. A `Launcher` is a process that has done so and then, for each
line of JSON on its standard input, forks: the copy runs one job of `bench.job` in a process group of its own, so that
its crash or the kernel's out-of-memory killer ends that job alone. Where forking such a process is not safe (outside
Linux), the job gets a fresh interpreter instead.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue


class Launcher:
    """Runs one job at a time; not to be shared by threads. The process starts with the first job."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.running = 0  # the job's process id

    def run(self, job: Path, result: Path, log: Path, timeout: float) -> int | None:
        """Run the job of a file; its result and what it prints go into two others.

        Returns the exit status, negative for the signal that ended it; None where it was stopped after `timeout`
        seconds. Raises EOFError when the launcher itself ended.
        """
        if self.process is None or self.process.poll() is not None:
            command = [sys.executable, "-m", "burnish.bench.launcher"]
            environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(  # unbuffered, as select does not see into a buffer
                command, bufsize=0, stdin=pipe, stdout=pipe, env=environment, start_new_session=True
            )
        assert self.process.stdin is not None and self.process.stdout is not None
        with suppress(BrokenPipeError):  # then there is no answer either
            self.process.stdin.write(json.dumps([str(job), str(result), str(log)]).encode() + b"\n")
        self.running = self._answer()
        try:
            ready, _, _ = select.select([self.process.stdout], [], [], timeout)
            if not ready:
                self._kill()
            status = self._answer()
        finally:
            self.running = 0
        return status if ready else None

    def close(self) -> None:
        """End the launcher, and its job where one runs."""
        self._kill()
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def _answer(self) -> int:
        assert self.process is not None and self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise EOFError("the launcher of jobs ended")
        return int(line)

    def _kill(self) -> None:
        if self.running:
            with suppress(ProcessLookupError):
                os.killpg(self.running, signal.SIGKILL)


@contextmanager
def launchers(count: int) -> Iterator[SimpleQueue[Launcher]]:
    """Launchers to be taken and put back by threads; neither they nor their jobs outlive the block."""
    made = [Launcher() for _ in range(count)]
    free: SimpleQueue[Launcher] = SimpleQueue()
    for launcher in made:
        free.put(launcher)
    try:
        yield free
    finally:
        for launcher in made:
            launcher.close()


def main() -> None:
    """Answer each line [job, result, log] with the job's process id and, once it ended, its exit status."""
    forks = sys.platform == "linux"
    if forks:
        import torch._dynamo  # noqa: F401 - every optimiser of torch's imports it
        from transformers import PreTrainedTokenizerFast  # noqa: F401

        from burnish.kernels import training

        training.library()
        gc.collect()
        gc.freeze()
    for line in sys.stdin:
        job, result, log = json.loads(line)
        if forks:
            pid = os.fork()
            if not pid:
                os._exit(_child(job, result, log))
            with suppress(OSError):
                os.setpgid(pid, pid)
            print(pid, flush=True)
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
        else:
            command = [sys.executable, "-m", "burnish.bench.job", job, result]
            with open(log, "wb") as out:
                process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
            print(process.pid, flush=True)
            print(process.wait(), flush=True)


def _child(job: str, result: str, log: str) -> int:
    from burnish.bench import job as jobs

    os.setpgid(0, 0)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(out, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    try:
        return jobs.main(job, result)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


if __name__ == "__main__":
    main()
