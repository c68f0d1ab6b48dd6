"""Requests from the service to addresses that it did not choose itself: callbacks that clients name, a model registry.

An address is resolved once; every answer must be public, or in a network the operator allows; and the connection goes to
the very address that was checked, so that a name which answers differently a moment later gains nothing. Redirects are not
followed, proxies of the environment not used. Of the answer to a callback only the status is read.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urlsplit

from service.errors import SourceNotAllowed, Unavailable

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_UNICAST = ipaddress.IPv6Network("2000::/3")
_MAX_URL = 2000
_CHUNK = 1 << 20
_WHOLE = 3.0
"""How many times `Outbound`'s seconds a head, or a body that is read whole, may take where it comes drop by drop."""


@dataclass(frozen=True)
class Target:
    """A checked URL: where to connect, and what to ask for."""

    url: SplitResult
    address: str
    port: int

    @property
    def path(self) -> str:
        """Path and query, as sent."""
        return (self.url.path or "/") + (f"?{self.url.query}" if self.url.query else "")


class Outbound:
    """Checks URLs, and sends to those that pass.

    Args:
        allowed_networks: CIDR notation; what else is not public is refused.
        seconds: for connecting, and again for each wait for the answer.
    """

    def __init__(self, allowed_networks: tuple[str, ...] = (), seconds: float = 10.0) -> None:
        self._allowed = tuple(ipaddress.ip_network(network, strict=False) for network in allowed_networks)
        self._seconds = seconds

    def check(self, url: str) -> Target:
        """Where a URL leads.

        Raises:
            SourceNotAllowed: not http(s), with credentials, malformed, or leading to an address that is not allowed.
            Unavailable: its name cannot be resolved now.
        """
        parts, host, port = _split(url)
        addresses = _resolve(host, port)
        self._require(host, addresses)
        return Target(parts, str(addresses[0]), port)

    def _require(self, host: str, addresses: list[Address]) -> None:
        if not all(map(self.permits, addresses)):
            raise SourceNotAllowed(
                f"{host} leads to an address that is not public",
                "the operator may allow a private network in SAFER_ALLOWED_NETWORKS",
            )

    def precheck(self, url: str) -> None:
        """Refuse early what needs no look-up of a name: a wrong URL, and one whose host is an address or `localhost`.

        Raises:
            SourceNotAllowed: see `check`.
        """
        _parts, host, port = _split(url)
        local = host == "localhost" or host.endswith(".localhost")
        try:
            addresses = [ipaddress.ip_address("127.0.0.1")] if local else _resolve(host, port, socket.AI_NUMERICHOST)
        except Unavailable:
            return
        self._require(host, addresses)

    def permits(self, address: Address) -> bool:
        """Whether an address may be connected to. An IPv4 address inside an IPv6 one counts as itself."""
        inner = _embedded(address)
        if any(address.version == network.version and address in network for network in self._allowed):
            return True
        if inner is not None:
            return self.permits(inner)
        if isinstance(address, ipaddress.IPv6Address) and address not in _UNICAST:
            return False
        return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)

    def post(self, url: str, document: dict[str, Any], sign: Callable[[bytes], Mapping[str, str]] | None = None) -> int:
        """Send JSON; the answer's status.

        Args:
            sign: gives headers for the very bytes that are sent.

        Raises:
            SourceNotAllowed: see `check`, which is made anew.
            Unavailable: no connection, or no answer in time.
        """
        body = json.dumps(document, ensure_ascii=False, allow_nan=False).encode()
        with self.ask("POST", url, {"Content-Type": "application/json", **(sign(body) if sign else {})}, body) as answer:
            return answer.status

    @contextmanager
    def ask(self, method: str, url: str, headers: Mapping[str, str], body: bytes | None = None) -> Iterator[Answer]:
        """Send a request; the answer can be read while the context is open.

        Raises:
            SourceNotAllowed: see `check`, which is made anew.
            Unavailable: no connection, or no answer in time.
        """
        target = self.check(url)
        connection = _Pinned(target, self._seconds)
        try:
            try:
                with _no_longer_than(self._seconds * _WHOLE, connection):
                    connection.request(method, target.path, body, {"User-Agent": "safer-audit", **headers})
                    response = connection.getresponse()
            except (OSError, http.client.HTTPException) as error:
                raise _silent(target, error) from None
            yield Answer(response, target, self._seconds * _WHOLE)
        finally:
            connection.close()


class Answer:
    """An answer whose body may be read, once."""

    def __init__(self, response: http.client.HTTPResponse, target: Target, seconds: float) -> None:
        self.status = response.status
        self._response = response
        self._target = target
        self._seconds = seconds

    def chunks(self, size: int = _CHUNK) -> Iterator[bytes]:
        """The body as it comes. Raises Unavailable where it breaks off before the length that was announced."""
        left = self._response.length
        while left != 0 and (chunk := self._read(size if left is None else min(size, left))):
            left = left if left is None else left - len(chunk)
            yield chunk
        if left:
            raise Unavailable(f"{self._target.url.hostname} broke off with {left} bytes to come")

    def read(self, limit: int) -> bytes:
        """The whole body. Raises Unavailable, also where it has over `limit` bytes or takes too long."""
        found, until = bytearray(), time.monotonic() + self._seconds
        for chunk in self.chunks():
            found += chunk
            if time.monotonic() > until:
                raise Unavailable(f"{self._target.url.hostname} took too long to answer")
            if len(found) > limit:
                raise Unavailable(f"{self._target.url.hostname} answered with over {limit} bytes")
        return bytes(found)

    def _read(self, size: int) -> bytes:
        try:
            return self._response.read1(size)  # what is there: who waits for more is told of every drop
        except (OSError, http.client.HTTPException) as error:
            raise _silent(self._target, error) from None


class _Pinned(http.client.HTTPConnection):
    """Connects to the checked address while it speaks to the host by name (Host header, certificate)."""

    def __init__(self, target: Target, seconds: float) -> None:
        super().__init__(target.url.hostname or "", target.port, timeout=seconds)
        self._target = target
        self._tls = ssl.create_default_context() if target.url.scheme == "https" else None
        if self._tls is not None:
            self.default_port = 443

    def connect(self) -> None:
        """Connect to the address, with TLS for https."""
        plain = socket.create_connection((self._target.address, self._target.port), self.timeout)
        self.sock = self._tls.wrap_socket(plain, server_hostname=self._target.url.hostname) if self._tls else plain


@contextmanager
def _no_longer_than(seconds: float, connection: _Pinned) -> Iterator[None]:
    """Break a connection off after so long, however busy it is. Raises TimeoutError: it was."""
    over = threading.Event()

    def break_off() -> None:
        over.set()
        if (plain := connection.sock) is not None:
            with suppress(OSError):
                socket.socket.shutdown(plain, socket.SHUT_RDWR)

    timer = threading.Timer(seconds, break_off)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    if over.is_set():  # what came looks like an answer that ended
        raise TimeoutError


def _silent(target: Target, error: Exception) -> Unavailable:
    return Unavailable(f"{target.url.hostname} did not answer: {type(error).__name__}")


def _split(url: str) -> tuple[SplitResult, str, int]:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise _refused("it is malformed") from None
    if parts.scheme not in ("http", "https"):
        raise _refused("only http and https are possible")
    if parts.username is not None or parts.password is not None:
        raise _refused("it carries credentials")
    if not parts.hostname or len(url) > _MAX_URL or not url.isascii() or any(ord(letter) <= 32 for letter in url):
        raise _refused("it is malformed")
    return parts, parts.hostname, port or (443 if parts.scheme == "https" else 80)


def _refused(why: str) -> SourceNotAllowed:
    return SourceNotAllowed(f"the URL is refused: {why}", "give http://host/path or https://host/path")


def _resolve(host: str, port: int, flags: int = 0) -> list[Address]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    except (socket.gaierror, UnicodeError):
        raise Unavailable(f"{host} cannot be resolved", "check the name") from None
    return [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]


def _embedded(address: Address) -> ipaddress.IPv4Address | None:
    if isinstance(address, ipaddress.IPv4Address):
        return None
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
    return address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
