"""Finding KV by prompt: prefix keys, the lookup buffer, its server and its client."""

from kvsdk.buffer.client import BufferClient, PeerState, Pending, PendingType, RemoteClaim, Unheard, UnheardType
from kvsdk.buffer.curve import ClientCurve, ServerCurve
from kvsdk.buffer.keys import PrefixKeys, prefix_keys, separator
from kvsdk.buffer.lookup import BufferFull, Claim, EndedOffer, LookupBuffer, Offer
from kvsdk.buffer.server import BufferServer
from kvsdk.buffer.wire import BUFFER_WIRE, Field, VersionError, Wire

__all__ = [
    "BUFFER_WIRE",
    "BufferClient",
    "BufferFull",
    "BufferServer",
    "Claim",
    "ClientCurve",
    "EndedOffer",
    "Field",
    "LookupBuffer",
    "Offer",
    "PeerState",
    "Pending",
    "PendingType",
    "PrefixKeys",
    "RemoteClaim",
    "ServerCurve",
    "Unheard",
    "UnheardType",
    "VersionError",
    "Wire",
    "prefix_keys",
    "separator",
]
