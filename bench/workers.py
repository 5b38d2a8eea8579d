"""The other end of bench/worker.py: starts workers, asks them, and survives their end."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from typing import Any

from .machine import ROOT


class WorkerFailed(RuntimeError):
    """The variant could not do what it was asked; the message says why."""


class Worker:
    """One process with one variant.

    Args:
        timeout: seconds to wait for any answer; after them the process is ended.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # Ctrl-C is for the parent, which ends its workers
        )
        self._answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """The answer.

        Raises:
            WorkerFailed: the variant failed, its process ended, or no answer came in time.
        """
        try:
            self.process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self.process.stdin.flush()
            line = self._answers.get(timeout=self.timeout)
        except (BrokenPipeError, ValueError):
            line = ""
        except queue.Empty:
            self.end()
            raise WorkerFailed(f"no answer in {self.timeout:g} s") from None
        if not line:
            self.process.wait()
            raise WorkerFailed(_ended(self.process.returncode))
        answer = json.loads(line)
        if "failed" in answer:
            raise WorkerFailed(answer["failed"])
        return answer

    def end(self) -> None:
        """End the process and what it started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _ended(code: int) -> str:
    if code == -signal.SIGKILL:
        return "its process was killed, most likely for want of memory"
    return f"its process ended with code {code}"
