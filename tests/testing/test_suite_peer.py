from kvsdk.testing.capabilities import PYNCCL as capabilities
from kvsdk.testing.suite import *  # noqa: F403
connector = "PyNcclConnector"
def options(place):
    common = {"pipe": "peer"}
    if place.role == "kv_producer":
        return {"kv_port": place.ports[place.index], **common}
    return {"producers": [f"127.0.0.1:{port}" for port in place.producer_ports], **common}
def ready(engines):
    for engine in engines:
        client = engine.connector._scheduler._half._client
        assert client is None or client.wait_ready(10.0), client.peers()
