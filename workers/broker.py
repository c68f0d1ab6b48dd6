"""One mending of the Redis transport: an acknowledgement that could not be sent must not make a worker deaf.

With one message prefetched, a worker listens again only when that message counts as acknowledged. Where Redis is away at that
moment the transport raises and goes on counting it, so that the worker, whose socket nobody reads any more, never notices
that Redis is back. Here the message is counted out first: the next look at the queue finds the connection broken and makes
a new one. What becomes of the message does not matter: SQL says whether its unit is still to be done.
"""

from __future__ import annotations

from kombu.transport import redis, virtual


class ListeningQoS(redis.QoS):  # type: ignore[misc]
    """Counts a message out although Redis could not be told."""

    def ack(self, delivery_tag: str) -> None:
        """Acknowledge. Raises what Redis raises."""
        try:
            super().ack(delivery_tag)
        except BaseException:
            virtual.QoS.ack(self, delivery_tag)
            raise


def keep_listening() -> None:
    """Let all Redis channels of this process count so."""
    redis.Channel.QoS = ListeningQoS
