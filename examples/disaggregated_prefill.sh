#!/usr/bin/env bash
# Disaggregated prefilling with kvsdk: a prefill server on port 8100 computes the KV cache of a prompt, a decode server
# on port 8200 takes it over and answers, and a proxy on port 8000 sends every prompt to the one and then to the other.
#
#   examples/disaggregated_prefill.sh
#   MODEL=meta-llama/Llama-3.1-8B-Instruct examples/disaggregated_prefill.sh
#
# Where there are two GPUs, the servers take them; otherwise they run on the CPU. Without MODEL, a small model with
# random weights is made: its answers mean nothing, but depend on all of the prompt. Needs vLLM, kvsdk[demo] and curl on
# PATH, as after `make venv` and `. .venv/bin/activate`. It ends only processes that it started.
set -euo pipefail

PREFILL_PORT=8100 DECODE_PORT=8200 PROXY_PORT=8000
BOOT_SECONDS=${BOOT_SECONDS:-600}
work=$(mktemp -d "${TMPDIR:-/tmp}/kvsdk-XXXXXX")
declare -A pids=()

cleanup() {
    trap '' INT TERM
    # Each server leads a process group of its own, which holds its engine and workers as well.
    for name in "${!pids[@]}"; do kill -TERM -- "-${pids[$name]}" 2>/dev/null || true; done
    local end=$((SECONDS + 20))
    for name in "${!pids[@]}"; do
        while kill -0 "${pids[$name]}" 2>/dev/null && [ $SECONDS -lt $end ]; do sleep 0.2; done
        kill -KILL -- "-${pids[$name]}" 2>/dev/null || true
        wait "${pids[$name]}" 2>/dev/null || true
    done
    rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# start NAME COMMAND...: in the background, in a process group of its own, with its output in a file
start() {
    local name=$1
    shift
    set -m
    "$@" >"$work/$name.log" 2>&1 </dev/null &
    pids[$name]=$!
    set +m
}

# wait_for NAME PORT: until it is healthy; ends the script when it has died or takes too long
wait_for() {
    local end=$((SECONDS + BOOT_SECONDS))
    until curl --silent --fail --max-time 5 --output /dev/null "http://127.0.0.1:$2/health"; do
        if ! kill -0 "${pids[$1]}" 2>/dev/null || [ $SECONDS -ge $end ]; then
            echo "$1 did not come up; the end of its log:" >&2
            tail -n 30 "$work/$1.log" >&2
            exit 1
        fi
        sleep 1
    done
    echo "$1 is ready after $SECONDS s"
}

for port in $PREFILL_PORT $DECODE_PORT $PROXY_PORT; do
    if curl --silent --max-time 2 --output /dev/null "http://127.0.0.1:$port/"; then
        echo "port $port is in use" >&2
        exit 1
    fi
done

args=(--host 127.0.0.1 --max-model-len "${MAX_MODEL_LEN:-2048}" --served-model-name example)
prefill_env=() decode_env=()
if command -v nvidia-smi >/dev/null && [ "$(nvidia-smi --list-gpus | wc -l)" -ge 2 ]; then
    prefill_env=(CUDA_VISIBLE_DEVICES=0) decode_env=(CUDA_VISIBLE_DEVICES=1)
    args+=(--gpu-memory-utilization 0.8)
else
    export VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind OMP_NUM_THREADS=1
    args+=(--dtype float32 --enforce-eager --block-size 32)
fi
if [ -z "${MODEL:-}" ]; then
    MODEL=$work/model
    python -c 'import sys; from kvsdk.demo.models import make_tiny_llama; make_tiny_llama(sys.argv[1])' "$MODEL"
    export HF_HUB_OFFLINE=1
fi

# `kvsdk config` turns the JSON of vLLM's old examples into what the installed vLLM accepts.
common='"kv_connector": "PyNcclConnector", "kv_parallel_size": 2, "kv_buffer_size": 5e9'
prefill_config=$(kvsdk config "{$common, \"kv_role\": \"kv_producer\", \"kv_rank\": 0}")
decode_config=$(kvsdk config "{$common, \"kv_role\": \"kv_consumer\", \"kv_rank\": 1}")

echo "starting the servers ..."
start prefill env "${prefill_env[@]}" vllm serve "$MODEL" "${args[@]}" \
    --port $PREFILL_PORT --kv-transfer-config "$prefill_config"
start decode env "${decode_env[@]}" vllm serve "$MODEL" "${args[@]}" \
    --port $DECODE_PORT --kv-transfer-config "$decode_config"
start proxy kvsdk proxy --port $PROXY_PORT \
    --prefill http://127.0.0.1:$PREFILL_PORT --decode http://127.0.0.1:$DECODE_PORT
wait_for prefill $PREFILL_PORT
wait_for decode $DECODE_PORT
wait_for proxy $PROXY_PORT

for prompt in "San Francisco is a" "Santa Clara is a"; do
    echo "== $prompt"
    curl --silent --show-error --fail --max-time 120 "http://127.0.0.1:$PROXY_PORT/v1/completions" \
        -H "Content-Type: application/json" \
        -d "{\"model\": \"example\", \"prompt\": \"$prompt\", \"max_tokens\": 10, \"temperature\": 0}"
    echo
done

echo "== tokens that the decode server took over from the prefill server"
curl --silent --fail --max-time 10 "http://127.0.0.1:$DECODE_PORT/metrics" |
    grep '^vllm:external_prefix_cache_hits_total'
