"""Which server takes the next request: the one with the fewest requests in flight, in turn among equals."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass


@dataclass(eq=False)
class Server:
    """One vLLM server as the proxy sees it.

    Attributes:
        url: `http://host:port`.
        in_flight: requests that it works on now.
        aside_until: time on the pool's clock until which it is left alone.
        last_pick: ordinal of its last pick, so that equals take turns.
    """

    url: str
    in_flight: int = 0
    aside_until: float = float("-inf")
    last_pick: int = -1


class ServerPool:
    """The prefill servers, or the decode servers, of a proxy. For one event loop; not for threads.

    Args:
        urls: the servers.
        set_aside: seconds for which a server that could not be connected to is left alone.
        clock: monotonic seconds.
    """

    def __init__(self, urls: Iterable[str], *, set_aside: float, clock: Callable[[], float]):
        self.servers = [Server(url) for url in urls]
        self._set_aside = set_aside
        self._clock = clock
        self._picks = itertools.count()

    def pick(self, *, tried: Collection[Server] = (), last_resort: bool = False) -> Server | None:
        """The next server outside `tried`, or None if there is none.

        Args:
            tried: servers not to pick again.
            last_resort: whether a server that is set aside may be picked when no other is left. It costs a refused
                connection at worst, and finds a restarted server at once.
        """
        now = self._clock()
        left = [server for server in self.servers if server not in tried]
        candidates = [server for server in left if server.aside_until <= now]
        if not candidates and last_resort:
            candidates = left
        if not candidates:
            return None
        server = min(candidates, key=lambda server: (server.in_flight, server.last_pick))
        server.last_pick = next(self._picks)
        return server

    def failed(self, server: Server) -> None:
        """`server` could not be connected to: leave it alone for a while."""
        server.aside_until = self._clock() + self._set_aside

    def answered(self, server: Server) -> None:
        """`server` accepted a connection."""
        server.aside_until = float("-inf")

    def is_aside(self, server: Server) -> bool:
        """Whether `server` is left alone now."""
        return server.aside_until > self._clock()
