"""Keys for ZMQ's own encryption (CURVE), and who may connect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import zmq
import zmq.utils.z85

from kvsdk.errors import ConfigError

ZAP_DOMAIN = b"kvsdk"
ZAP_ENDPOINT = "inproc://zeromq.zap.01"


@dataclass(frozen=True)
class ServerCurve:
    """A server's keys, in the 40 characters of Z85 that `zmq.curve_keypair()` makes.

    Attributes:
        public_key: what clients must know.
        secret_key: this server's own.
        clients: public keys of the clients that may connect; None for every client that knows `public_key`.
    """

    public_key: bytes
    secret_key: bytes = field(repr=False)
    clients: frozenset[bytes] | None = None

    def apply(self, socket: zmq.Socket) -> None:
        """Before `bind`. Raises ConfigError if a key is not one, or this libzmq has no CURVE."""
        _check(self.public_key, self.secret_key, *(self.clients or ()))
        socket.curve_server = True
        socket.curve_publickey, socket.curve_secretkey = self.public_key, self.secret_key
        socket.zap_domain = ZAP_DOMAIN

    def answer(self, request: Sequence[bytes]) -> list[bytes]:
        """The reply to a request that libzmq makes on `ZAP_ENDPOINT` (RFC 27) for each client that connects."""
        version, request_id = [*request, b"", b""][:2]
        allowed = False
        if version == b"1.0" and len(request) == 7 and request[5] == b"CURVE" and len(request[6]) == 32:
            allowed = self.clients is None or zmq.utils.z85.encode(request[6]) in self.clients
        status = (b"200", b"OK") if allowed else (b"400", b"unknown client key")
        return [b"1.0", request_id, *status, b"", b""]


@dataclass(frozen=True)
class ClientCurve:
    """A client's keys, and its servers' public key; all in Z85.

    Attributes:
        public_key: this client's.
        secret_key: this client's own.
        server_key: the public key of every server that this client connects to.
    """

    public_key: bytes
    secret_key: bytes = field(repr=False)
    server_key: bytes

    def apply(self, socket: zmq.Socket) -> None:
        """Before `connect`. Raises ConfigError if a key is not one, or this libzmq has no CURVE."""
        _check(self.public_key, self.secret_key, self.server_key)
        socket.curve_publickey, socket.curve_secretkey = self.public_key, self.secret_key
        socket.curve_serverkey = self.server_key


def _check(*keys: bytes) -> None:
    if not zmq.has("curve"):
        raise ConfigError("CURVE keys are configured, but this libzmq was built without CURVE")
    if any(type(key) is not bytes or len(key) != 40 for key in keys):
        raise ConfigError("a CURVE key is not 40 bytes of Z85, as zmq.curve_keypair() makes them")
