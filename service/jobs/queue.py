"""Messages to the workers, by Celery over Redis: a task's name and a unit's id, nothing else.

Messages are hints. One that is lost is sent again by the dispatcher; one that comes late or twice does nothing. Every call
here takes a bounded time and raises `Unavailable` when the broker does not answer.
"""

from __future__ import annotations

import time
from typing import Any
from urllib.parse import urlsplit

from celery import Celery
from kombu.exceptions import OperationalError
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as BrokenConnection
from redis.exceptions import RedisError
from redis.retry import Retry

from service.errors import Unavailable
from service.infra.settings import Settings
from service.jobs.model import QUEUES

TASK = "safer.unit"
WAKE = "safer:wake"
_CONNECT_SECONDS = 2.0
_ANSWER_SECONDS = 2.0
_LONGEST_QUEUE = 1000


class Sender:
    """The sending side of the queue; safe for threads. Connects when it is first used."""

    def __init__(self, settings: Settings) -> None:
        url = settings.broker_url.get_secret_value()
        self._app = sender_app(url)
        self._url = redis_url(url)
        self._redis = _connect(self._url)

    def send(self, unit_id: int, queue: str) -> None:
        """Tell the workers of a queue to look at a unit. Raises Unavailable."""
        try:
            # By the queue alone, Celery takes the default exchange: a plain list in Redis, with no binding that could be lost.
            self._app.send_task(TASK, args=(unit_id,), queue=queue, retry=False, ignore_result=True)
        except (OperationalError, RedisError, OSError) as error:
            raise _away(error) from error

    def wake(self) -> None:
        """Make the dispatcher look at once. Loses nothing when the broker is away: the dispatcher looks now and then anyway."""
        try:
            with self._redis.pipeline(transaction=False) as pipe:
                pipe.lpush(WAKE, 1)
                pipe.ltrim(WAKE, 0, 0)
                pipe.execute()
        except (RedisError, OSError):
            return

    def wait_for_wake(self, seconds: float) -> bool:
        """Wait until somebody calls `wake`, at most so long. Returns whether somebody did."""
        began = time.monotonic()
        try:
            # 0 would wait for ever, and longer than the connection waits for an answer would be an error.
            found = self._redis.blpop([WAKE], timeout=min(max(seconds, 0.01), _ANSWER_SECONDS / 2))
        except (RedisError, OSError):
            time.sleep(max(0.0, seconds - (time.monotonic() - began)))
            return False
        return found is not None

    def ping(self) -> None:
        """Raises Unavailable when the broker does not answer."""
        try:
            self._redis.ping()
        except (RedisError, OSError) as error:
            raise _away(error) from error

    def queued(self, queue: str) -> int:
        """How many messages lie in a queue; asked on a new connection, since an old one may be no good. Raises Unavailable."""
        try:
            with _connect(self._url) as client:
                return int(client.llen(queue))
        except (RedisError, OSError) as error:
            raise _away(error) from error

    def trim(self) -> None:
        """Drop the oldest messages of a long queue: workers that take units from SQL leave theirs. Raises Unavailable."""
        try:
            for queue in QUEUES:
                self._redis.ltrim(queue, 0, _LONGEST_QUEUE - 1)
        except (RedisError, OSError) as error:
            raise _away(error) from error

    def close(self) -> None:
        """Close all connections."""
        self._app.close()
        self._redis.close()


def _connect(url: str) -> Redis:
    """A client that waits for bounded times; it connects when it is first used."""
    return Redis.from_url(
        url,
        socket_connect_timeout=_CONNECT_SECONDS,
        socket_timeout=_ANSWER_SECONDS,
        retry=Retry(NoBackoff(), 1, (BrokenConnection,)),  # a connection that the server closed since
    )


def sender_app(url: str) -> Celery:
    """A Celery application that only sends."""
    app = Celery("safer", broker=url, set_as_current=False)
    app.conf.update(common_options())
    app.conf.broker_transport_options |= {
        "socket_connect_timeout": _CONNECT_SECONDS,
        "socket_timeout": _ANSWER_SECONDS,
        "max_retries": 0,
    }
    return app


def common_options() -> dict[str, Any]:
    """Celery options that sender and workers share."""
    return {
        "task_serializer": "json",
        "accept_content": ["json"],
        "task_ignore_result": True,
        "task_create_missing_queues": True,
        "broker_transport_options": {"socket_keepalive": True},
    }


def redis_url(broker: str) -> str:
    """The broker's URL as the redis package writes it: only that of a unix socket differs."""
    parts = urlsplit(broker)
    if parts.scheme != "redis+socket":
        return broker
    query = "&".join(item.replace("virtual_host=", "db=") for item in parts.query.split("&") if item)
    return f"unix://{parts.netloc}{parts.path}" + (f"?{query}" if query else "")


def _away(error: Exception) -> Unavailable:
    return Unavailable(
        f"the broker does not answer ({type(error).__name__})", "see that Redis runs and SAFER_BROKER_URL names it"
    )
