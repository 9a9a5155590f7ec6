"""vLLM's example through LMCache's own server, as a user runs it."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.servers,
    pytest.mark.slow,  # four processes boot, one after the other
    pytest.mark.timeout(400),
    pytest.mark.skipif(importlib.util.find_spec("lmcache") is None, reason="lmcache is not installed"),
]

EXAMPLE = Path(__file__).parents[2] / "examples/disaggregated_prefill_lmcache.py"


@pytest.mark.parametrize("server", ["lm", "mp"])
def test_every_whole_chunk_comes_from_the_server_and_the_tokens_are_the_same(server):
    command = [sys.executable, str(EXAMPLE), "--server", server, "--prompt-tokens", "760", "--compare"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=380)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert re.findall(r"^(\d+) of \d+ prompt tokens were not computed again", ran.stdout, re.MULTILINE) == ["768"] * 2
    # What the second prompt shares with the first one may be in vLLM's own cache by then, where it has come from there.
    (loaded,) = re.findall(r"^(\d+) tokens came from the LMCache server", ran.stdout, re.MULTILINE)
    assert 768 <= int(loaded) <= 1536
    assert "the same tokens as without a connector" in ran.stdout
