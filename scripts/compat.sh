#!/usr/bin/env bash
# Run the contract tests and the conformance suite against the Python sources of other vLLM releases:
# compat.sh VENV VERSION...
#
# The scheduler, the block manager and the connector base class are Python, so a release's source distribution is
# enough; everything it imports comes from VENV, which holds vLLM 0.32.0 and what that needs.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1
shift
python=$PWD/$venv/bin/python
cache=$PWD/.cache

fetch() { # VERSION: leaves the unpacked sources in .cache/vllm-VERSION
    local tree=$cache/vllm-$1 partial=$cache/partial-$1
    [ -d "$tree" ] && return
    echo "fetching the sources of vLLM $1 ..."
    rm -rf "$partial"
    mkdir -p "$partial"
    # pip asks a source distribution for its metadata before it hands it over, and that takes vLLM's build tools.
    # They stay out of VENV. The target `empty` means that there is nothing to compile.
    "$python" -m pip --disable-pip-version-check install --quiet --progress-bar off --upgrade --no-deps \
        --target "$cache/build-tools" -r requirements/compat.txt
    PYTHONPATH=$cache/build-tools VLLM_VERSION_OVERRIDE=$1 VLLM_TARGET_DEVICE=empty \
        "$python" -m pip --disable-pip-version-check download --quiet --progress-bar off --no-deps \
        --no-build-isolation --no-binary=:all: --dest "$partial" "vllm==$1"
    tar -xzf "$partial/vllm-$1.tar.gz" -C "$partial"
    # vLLM looks for "cpu" in the version of the distribution `vllm` to choose its platform. The one installed in VENV
    # says so; these sources' own metadata would come first and does not.
    rm -rf "$partial/vllm-$1/vllm.egg-info"
    mv "$partial/vllm-$1" "$tree"
    rm -rf "$partial"
}

# Versions are tested side by side, each by a process of its own that uses one core.
declare -A tests
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
for version in "$@"; do
    fetch "$version"
    PYTHONPATH=$cache/vllm-$version KVSDK_COMPAT=$version "$python" -m pytest -m "compat and not slow" \
        -o cache_dir="$cache/pytest-$version" tests/contract tests/testing >"$cache/tests-$version.log" 2>&1 &
    tests[$version]=$!
done
failed=()
for version in "$@"; do
    wait "${tests[$version]}" || failed+=("$version")
    echo "== contract tests and the conformance suite against the sources of vLLM $version"
    cat "$cache/tests-$version.log"
done
echo "== vLLM's toy proxies, from these sources, in front of two servers of the installed vLLM"
"$python" -m pytest tests/servers/test_toy_proxies.py || failed+=("toy proxies")
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi
