"""Whether one process of a test may read another one's memory."""

from pathlib import Path

_CAP_SYS_PTRACE = 19


def _why_not() -> str:
    try:
        scope = int(Path("/proc/sys/kernel/yama/ptrace_scope").read_text())
    except OSError:
        return ""  # no Yama
    status = dict(line.split(":\t") for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
    privileged = int(status["CapEff"], 16) >> _CAP_SYS_PTRACE & 1
    if scope == 0 or (privileged and scope < 3):
        return ""
    return f"kernel.yama.ptrace_scope is {scope}: processes may not read their siblings' memory"


MAY_NOT_READ = _why_not()
"""Why processes may not read the memory of others that a third one has started; empty if they may."""
