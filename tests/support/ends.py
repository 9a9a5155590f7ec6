"""Handles on test programs that take commands as JSON lines, a process each."""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading

import pytest

LIMIT = 90.0
"""Seconds for a command that should take less than ten."""


class Worker:
    """A program `script device`. Every wait has a limit, at which the process is killed and the test fails."""

    def __init__(self, script, device, environment):
        self.process = subprocess.Popen(
            [sys.executable, script, device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **environment},
            text=True,
        )
        self.replies = queue.Queue()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        for line in self.process.stdout:
            # Libraries may write to the output, too.
            with contextlib.suppress(ValueError):
                self.replies.put(json.loads(line))
        self.replies.put(None)

    def start(self, do, **arguments):
        self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self.process.stdin.flush()

    def reply(self, limit=LIMIT):
        try:
            reply = self.replies.get(timeout=limit)
        except queue.Empty:
            self.process.kill()
            pytest.fail(f"an end did not answer within {limit} s")
        assert reply is not None, "an end's process ended"
        assert "failed" not in reply, reply.get("failed")
        return reply

    def __call__(self, do, **arguments):
        self.start(do, **arguments)
        return self.reply()

    def stop(self):
        self.process.kill()
        self.process.wait()
        self.reader.join()
        self.process.stdin.close()
        self.process.stdout.close()
