"""What a connector can do: a property and a sentence for each capability.

Tests ask for capabilities, never for connectors by name: a test that needs one which is not declared is skipped and
says so. The table of connectors in the docs is made of the same declarations, so that the two cannot drift.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


def _can(sentence: str, default: bool = False) -> Any:
    return dataclasses.field(default=default, metadata={"sentence": sentence})


@dataclasses.dataclass(frozen=True)
class Capabilities:
    """Declared by an author beside the connector. What is not declared is not tested, and not promised."""

    loads: bool = _can("Loads KV that another server computed.", True)
    keeps: bool = _can("Hands over: keeps a finished prompt's blocks until a consumer has them.")
    saves: bool = _can("Stores: copies blocks out as they are computed, for any server to load.")
    pull: bool = _can("The consumer asks for the bytes when it has blocks for them.")
    push: bool = _can("The producer sends the bytes to blocks that the consumer announced.")
    early_announcement: bool = _can("The consumer may announce its blocks before the producer has computed any.")
    finds_by_prompt: bool = _can("Finds KV by the prompt alone, with a proxy that only sends the prompt twice.")
    finds_by_params: bool = _can("Finds KV by the `kv_transfer_params` that a proxy passed on.")
    partial_tail: bool = _can("Moves a prompt's last, partly filled block as well.")
    shared_prefixes: bool = _can("Loads the beginning that a prompt shares with another one.")
    block_errors: bool = _can("Names the blocks that failed, so that vLLM recomputes those or ends the request.")
    verifies: bool = _can("Checks every block on arrival: damaged bytes are a failed block, never a token.")
    lossy: bool = _can("Ends a transfer whose messages are lost, or come twice, by its deadline.")
    leases: bool = _can("Gives blocks back that nobody asked for within `lease` seconds.")
    yields: bool = _can("Gives unread blocks back when vLLM needs them, and never those that are being read.")
    tensor_parallel: bool = _can("Works with several tensor-parallel ranks, the same number on both sides.")
    unequal_tensor_parallel: bool = _can("Works with different tensor-parallel sizes on the two sides.")
    mla: bool = _can("Works with latent attention (MLA).")
    hybrid_groups: bool = _can("Works with several KV cache groups (sliding windows, hybrid models).")
    dynamic_peers: bool = _can("Servers join and leave while others serve.")
    survives_restart: bool = _can("Goes on, with no restart of its own, after a peer died and another took its place.")
    restores: bool = _can("What was saved outlives the server that saved it.")

    def names(self) -> list[str]:
        """Names of what is declared."""
        return [field.name for field in dataclasses.fields(self) if getattr(self, field.name)]

    @classmethod
    def sentences(cls) -> dict[str, str]:
        """Capability to sentence, in order."""
        return {field.name: field.metadata["sentence"] for field in dataclasses.fields(cls)}


PYNCCL = Capabilities(
    keeps=True,
    pull=True,
    finds_by_prompt=True,
    finds_by_params=True,
    partial_tail=True,
    shared_prefixes=True,
    block_errors=True,
    verifies=True,
    lossy=True,
    leases=True,
    yields=True,
    tensor_parallel=True,
    mla=True,
    dynamic_peers=True,
    survives_restart=True,
)

LMCACHE_LM = Capabilities(
    saves=True,
    finds_by_prompt=True,
    shared_prefixes=True,
    block_errors=True,
    verifies=True,
    tensor_parallel=True,
    mla=True,
    dynamic_peers=True,
    survives_restart=True,
    restores=True,
)

LMCACHE_MP = LMCACHE_LM

IN_PROCESS_HANDOVER = PYNCCL

IN_PROCESS_STORE = Capabilities(
    saves=True,
    finds_by_prompt=True,
    partial_tail=True,
    shared_prefixes=True,
    block_errors=True,
    verifies=True,
    lossy=True,
    tensor_parallel=True,
    mla=True,
    dynamic_peers=True,
    survives_restart=True,
    restores=True,
)

DECLARED: Mapping[str, Capabilities] = {
    "PyNcclConnector": PYNCCL,
    "LMCacheConnector (lm)": LMCACHE_LM,
    "LMCacheConnector (tcp)": LMCACHE_MP,
    "kvsdk.testing.in_process:HandOverConnector": IN_PROCESS_HANDOVER,
    "kvsdk.testing.in_process:StoreConnector": IN_PROCESS_STORE,
}
"""Connectors of this package, as a `kv_connector` names them; one with each scheme of its `remote_url`."""


def capabilities_table(connectors: Mapping[str, Capabilities] = DECLARED) -> str:
    """A Markdown table: a row for each capability with its sentence, a column for each connector."""
    short = [name.rpartition(":")[2] for name in connectors]
    lines = [f"| capability | {' | '.join(short)} |", "| --- |" + " :-: |" * len(short)]
    for name, sentence in Capabilities.sentences().items():
        marks = ("yes" if getattr(one, name) else "-" for one in connectors.values())
        lines.append(f"| `{name}`: {sentence} | {' | '.join(marks)} |")
    return "\n".join(lines)
