"""The process that runs the steps, watched from one that launches nothing.

A kernel that waits for what never comes cannot be interrupted from inside its process; an illegal access leaves a
context in which nothing runs any more. Both cost one step here, and not those behind it.
"""

import os
import subprocess
import sys
import time

from fastllm.bench.gpu.machine import Log

POLL_S = 0.2
PATIENCE_S = 30.0  # beyond what a step may take, and for a process to begin its first one


def watch(command, path, deadline, environment=None):
    """Runs `command`, which logs its steps to `path`, again and again until it ends by itself with status 0."""
    while True:
        before = len(Log(path).rows)
        process = subprocess.Popen(command, env=environment)
        try:
            reason = _reason_to_stop(process, path, deadline)
        except KeyboardInterrupt:
            reason = "interrupted"
            deadline = 0.0
        if reason:
            process.kill()
            process.wait()
        log = Log(path)
        if (not reason and process.returncode == 0) or not log.rows:
            return
        if unfinished := _unfinished(log):
            error = reason or f"its process ended with status {process.returncode}"
            log.add(unfinished["step"], kind="error", error=error)
        if time.time() >= deadline or len(log.rows) == before:  # no step has begun: the next process would end alike
            print(f"{time.strftime('%H:%M:%S')}  no more steps: {reason or 'the time is over'}", file=sys.stderr)
            return


def _reason_to_stop(process, path, deadline) -> str:
    """Why the process has to be killed; "" when it has ended."""
    size, since = -1, time.time()
    while process.poll() is None:
        time.sleep(POLL_S)
        now = os.path.getsize(path) if path.exists() else 0
        if now != size:
            size, since = now, time.time()
            step = _unfinished(Log(path))
            limit = (step or {}).get("limit", 0.0) + PATIENCE_S
        if time.time() - since > limit:
            return f"no end after {time.time() - since:.0f} s: a kernel that hangs?"
        if time.time() > deadline + PATIENCE_S:
            return "the time is over"
    return ""


def _unfinished(log) -> dict | None:
    """The row that begins the last step, where no other says how it ended."""
    begun = None
    for row in log.rows:
        if row.get("kind") == "start":
            begun = row
        elif row.get("kind") in ("end", "error"):
            begun = None
    return begun
