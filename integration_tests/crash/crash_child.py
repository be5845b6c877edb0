"""Runs the workload in a forked process for each line on standard input, which kills itself or is killed.

    {"directory": …, "script": "tight", "kill_at": 17, "tears_write": false}
    {"directory": …, "script": "tight", "kill_after_s": 0.013}      null: never, but nothing is wrapped either

What comes back are JSON lines: one for the opening and one for each operation that was flushed, with the blocks then
to be found, and at the end how the process ended, ``{"signal": 9}``, or ``{"signal": 0, "trace": …}`` for one that
was to count its steps only. Forking one process that has imported everything is what makes thousands of kills
affordable; it never has a second thread itself. A request as the argument runs in this process instead.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from io_steps import IOSteps
from workload import SCRIPTS, Workload

TOO_LONG_S = 60.0

_write = os.write


def report(**facts: Any) -> None:
    """Straight to the pipe: what is in it survives the kill."""
    data = json.dumps(facts).encode() + b"\n"
    while data:
        data = data[_write(1, data) :]


def run(request: dict[str, Any]) -> None:
    faulthandler.dump_traceback_later(TOO_LONG_S, exit=True)  # a run that hangs says where
    is_timed = "kill_after_s" in request
    steps = IOSteps(request.get("kill_at", 0), tears_write=request.get("tears_write", False), syncs=is_timed)
    if not is_timed:
        steps.install()
    max_size_bytes, operations = SCRIPTS[request["script"]]
    workload = Workload(Path(request["directory"]), max_size_bytes)
    with steps.paused():
        report(done=0, held=workload.held())
    for number, operation in enumerate(operations, start=1):
        workload.perform(operation)
        with steps.paused():
            report(done=number, held=workload.held())
    workload.close()
    report(trace=steps.trace)


def main() -> None:
    logging.disable(logging.WARNING)  # the corrupt block of the workload
    if len(sys.argv) > 1:
        run(json.loads(sys.argv[1]))
        return
    for line in sys.stdin:
        request = json.loads(line)
        begin_s = time.monotonic()
        pid = os.fork()
        if pid == 0:
            try:
                run(request)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        if request.get("kill_after_s") is not None:
            time.sleep(request["kill_after_s"])
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        report(
            signal=os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0,
            status=os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
            wall_s=time.monotonic() - begin_s,
        )


if __name__ == "__main__":
    main()
