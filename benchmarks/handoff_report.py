"""What the samples of `benchmarks.handoff` say: which of them count, medians, ratios, the report and the plot."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import percentile, plots
from benchmarks.hooks import HOOKS, Step, histogram
from benchmarks.legs import by_source

STATES = ("alone", "transfers", "own cache")
FLOORS = {"nixl": "nixl floor", "kvsdk": "kvsdk floor", "early": "kvsdk floor"}
TARGETS = {1024: 0.4, 8192: 0.25, 30000: 0.15}
"""The largest ratio that is aimed at: kvsdk's handoff less its floor to NIXL's less its own, on aged pools."""
EARLY_TARGET_MS, STEP_TARGET_US, INTER_TOKEN_TARGET = 10.0, 1000.0, 1.10
BUNCHED_MS = 0.2
"""Tokens of one stream that come in a shorter time have waited for each other in vLLM's API server."""
COUNTED_ENDS = ("kvsdk_loads_failed_total", "kvsdk_loads_expired_total", "kvsdk_corrupt_blocks_total",
                "vllm:nixl_num_failed_transfers_total", "vllm:nixl_num_failed_notifications_total")  # fmt: skip


def fault_of(way: str, length: int, block_size: int, change: Mapping[str, float]) -> str | None:
    """Why a sample does not count, from what the decode server counted meanwhile; None if it does.

    vLLM computes a loaded prompt's last token again, and its releases differ in where they count it.
    """
    for name in COUNTED_ENDS:
        if change.get(name, 0):
            return f"{name} rose by {change[name]:.0f}"
    tokens = by_source(change)
    if sum(tokens.values()) != length:
        return f"{sum(tokens.values())} prompt tokens were counted, not {length}"
    external, local, computed = tokens.values()
    if way.endswith("floor"):
        return None if not external and computed <= block_size else f"not from the decode server's cache: {tokens}"
    return None if external >= length - 1 and not local else f"not all came over: {tokens}"


def summarize(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each state of the pools, prompt length and way: medians in ms, what is above the floor, and its ratio
    to NIXL's (None where one of them has no sample that counts)."""
    groups: dict[tuple[str, int, str], list[Mapping[str, Any]]] = {}
    for sample in samples:
        groups.setdefault((sample["pools"], sample["tokens"], sample["way"]), []).append(sample)
    rows = []
    for (pools, tokens, way), group in groups.items():
        counted = [sample["handoff_ms"] for sample in group if sample["fault"] is None]
        row = {
            "pools": pools,
            "tokens": tokens,
            "way": way,
            "samples": len(counted),
            "faults": len(group) - len(counted),
        }
        rows.append(
            row | {"median_ms": statistics.median(counted), "p90_ms": percentile(counted, 90)} if counted else row
        )
    medians = {(row["pools"], row["tokens"], row["way"]): row.get("median_ms") for row in rows}
    for row in rows:
        of = (row["pools"], row["tokens"])
        row["above_floor_ms"] = above = _difference(row.get("median_ms"), medians.get((*of, FLOORS.get(row["way"]))))
        theirs = _difference(medians.get((*of, "nixl")), medians.get((*of, "nixl floor")))
        row["to_nixl"] = above / theirs if above is not None and theirs and row["way"] != "nixl" else None
    return rows


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def intervals(times: Sequence[Sequence[float]]) -> tuple[list[float], tuple[float, float]]:
    """Milliseconds between the events of each stream, all streams together, and the window in which all were running:
    from the last first event to the first last one."""
    window = max(stream[0] for stream in times), min(stream[-1] for stream in times)
    found = []
    for stream in times:
        inside = [at for at in stream if window[0] <= at <= window[1]]
        found += [(b - a) * 1e3 for a, b in itertools.pairwise(inside)]
    return found, window


def step_figures(steps: Sequence[Step]) -> dict[str, Any]:
    """Percentiles of microseconds a step, of the worker's hooks and of both sides' together, and all as a histogram;
    and the longest call of each of the ten steps that took longest."""
    figures: dict[str, Any] = {"steps": len(steps), "calls": sum(step.calls for step in steps)}
    for name, samples in (
        ("worker", [step.worker_us for step in steps if step.worker_us]),
        ("worker and scheduler", [step.worker_us + step.scheduler_us for step in steps]),
    ):
        if samples:
            tails = {f"p{percent}": percentile(samples, percent) for percent in (99, 99.9)}
            figures[name] = {"median": statistics.median(samples), **tails, "max": max(samples)}
            figures[name]["histogram"] = histogram(samples)
    slowest = sorted(steps, key=lambda step: -step.worker_us - step.scheduler_us)[:10]
    figures["slowest"] = [(HOOKS[int(step.longest)], round(step.longest_us, 1)) for step in slowest]
    return figures


def report(result: Mapping[str, Any]) -> str:
    """The result in Markdown."""
    parts = [f"## Handoff, {result['ended']}", "", "Milliseconds, medians; *above* is the median less its floor's.", ""]
    rows = [("pools", "tokens", "way", "samples", "not counted", "median", "p90", "above", "to NIXL's", "aim")]
    for row in sorted(result["summary"]["handoff"], key=lambda row: (row["pools"] != "fresh", -row["tokens"])):
        aim = ""
        if row["pools"] == "aged" and row["way"] == "kvsdk":
            aim = f"≤ {TARGETS[row['tokens']]}" if row["tokens"] in TARGETS else ""
        elif row["pools"] == "aged" and row["way"] == "early" and row["tokens"] == max(TARGETS):
            aim = f"above ≤ {EARLY_TARGET_MS:.0f} ms"
        figures = (row.get("median_ms"), row.get("p90_ms"), row["above_floor_ms"], row["to_nixl"])
        rows.append(
            (row["pools"], row["tokens"], row["way"], row["samples"], row["faults"], *map(_figure, figures), aim)
        )
    parts += [markdown(rows), ""]
    if result["mixed"]:
        said = [f"{name}: {' '.join(f'{key} {value}' for key, value in found.items())}"
                for name, found in result["mixed"].items()]  # fmt: skip
        parts += ["Mixed requests: " + "; ".join(said), ""]
    if result["steps"]:
        cost = result["steps"]["microseconds that timing adds to a call"]
        parts += ["Microseconds a step of kvsdk's hooks while prompts of the longest size come over (aim: p99.9 ≤ "
                  f"{STEP_TARGET_US:.0f}); timing itself adds {cost} to each call.", ""]  # fmt: skip
        rows = [("server", "during", "hooks", "steps", "calls a step", "median", "p99", "p99.9", "max", "longest call")]
        for role, during in itertools.product(("prefill", "decode"), ("samples", "beside decodes", "all")):
            figures = result["steps"][role][during]
            for side in ("worker", "worker and scheduler"):
                if side in figures:
                    tails = [f"{figures[side][name]:.0f}" for name in ("median", "p99", "p99.9", "max")]
                    calls = f"{figures['calls'] / figures['steps']:.0f}"
                    rows.append((role, during, side, figures["steps"], calls, *tails, figures["slowest"][0][0]))
        parts += [markdown(rows), ""]
    if states := result["summary"]["inter_token"]:
        parts += ["Milliseconds between tokens of running decodes, and between steps of the engine "
                  f"(aim: p99 with transfers ≤ {INTER_TOKEN_TARGET} times that alone).", ""]  # fmt: skip
        rows = [
            (
                "state",
                "rounds",
                "intervals",
                "arrivals/s",
                "bunched",
                "median",
                "p99",
                "to alone",
                "steps' p99",
                "to alone",
            )
        ]
        for state, figures in states.items():
            names = ("arrivals_per_second", "bunched", "median", "p99", "to_alone", "steps_p99", "steps_to_alone")
            rows.append((state, figures["rounds"], figures["intervals"], *(_figure(figures[name]) for name in names)))
        parts += [markdown(rows), ""]
    faults = sum(row["faults"] for row in result["summary"]["handoff"])
    parts.append(f"{faults} samples do not count; {len(result['errors'])} errors" + (":" if result["errors"] else "."))
    parts += [f"- {error.splitlines()[0]}" for error in result["errors"][:20]]
    parts += [f"- cut short: {what}" for what in result["cut_short"]]
    parts += ["", "Seconds: " + ", ".join(f"{entry['part']} {entry['seconds']}" for entry in result["timeline"])]
    return "\n".join(parts)


def inter_token_figures(rounds: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each state: percentiles over all its rounds without faults, and their ratio to those of the state `alone`."""
    figures: dict[str, dict[str, Any]] = {}
    for state in STATES:
        chosen = [entry for entry in rounds if entry["state"] == state and not entry["faults"]]
        samples = [sample for entry in chosen for sample in entry["intervals_ms"]]
        if not samples:
            continue
        steps = [gap for entry in chosen for gap in entry.get("step_intervals_ms", ())]
        seconds = sum(entry["window"][1] - entry["window"][0] for entry in chosen)
        found = figures[state] = {
            "rounds": len(chosen), "intervals": len(samples), "median": statistics.median(samples),
            "bunched": sum(sample < BUNCHED_MS for sample in samples) / len(samples),
            "p99": percentile(samples, 99), "steps_p99": percentile(steps, 99) if steps else None,
            "arrivals_per_second": sum(entry.get("arrivals_inside", 0) for entry in chosen) / seconds,
        }  # fmt: skip
        alone = figures.get("alone", {})
        found["to_alone"] = _ratio(found["p99"], alone.get("p99"))
        found["steps_to_alone"] = _ratio(found["steps_p99"], alone.get("steps_p99"))
    return figures


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def markdown(rows: Sequence[Sequence[object]]) -> str:
    """A table of Markdown; the first row is the head."""
    head, *body = rows
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *body))


def plot(result: Mapping[str, Any]) -> str | None:
    """Milliseconds above the floor by tokens of the prompt, as SVG; None if there is nothing to show."""
    series: dict[str, list[tuple[float, float]]] = {}
    names = {"nixl": "NIXL", "kvsdk": "kvsdk", "early": "kvsdk, early"}
    for row in result["summary"]["handoff"]:
        if row["way"] in names and row["above_floor_ms"] is not None and row["above_floor_ms"] > 0:
            series.setdefault(f"{names[row['way']]}, {row['pools']}", []).append((row["tokens"], row["above_floor_ms"]))
    if not series:
        return None
    return plots.lines(
        series, title="Handoff less its floor, medians", x="tokens of the prompt", y="ms", log_x=True, log_y=True,
        x_ticks=sorted({row["tokens"] for row in result["summary"]["handoff"]}),
        dashed=[name for name in series if name.endswith("fresh")],
    )  # fmt: skip
