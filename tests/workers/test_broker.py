"""A worker goes on listening after an acknowledgement that Redis did not take."""

from __future__ import annotations

import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from kombu import Connection
from kombu.transport import redis as transport

from tests.helpers.servers import redis_server
from workers.broker import ListeningQoS


def test_a_failed_acknowledgement_is_counted_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport.Channel, "QoS", ListeningQoS)
    server = redis_server(tmp_path)
    server.start()
    with Connection(server.url, transport_options={"socket_connect_timeout": 1.0}) as connection:
        channel = connection.channel()
        channel.basic_qos(0, 1, False)
        message = SimpleNamespace(_raw={}, delivery_info={"exchange": "", "routing_key": "cpu"}, serializable=dict)
        channel.qos.append(message, "tag-1")
        assert not channel.qos.can_consume()
        server.stop(signal.SIGKILL)
        with pytest.raises(connection.connection_errors):
            channel.qos.ack("tag-1")
        assert channel.qos.can_consume()
