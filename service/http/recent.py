"""What was last read, by digest: kept for the next page, bounded in number."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Recent(Generic[T]):
    """At most `size` values, those longest unused forgotten. Safe for threads; two at once may both make a value."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._known: OrderedDict[str, T] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, digest: str, make: Callable[[], T]) -> T:
        """The value of a digest, made if it is not known."""
        with self._lock:
            if digest in self._known:
                self._known.move_to_end(digest)
                return self._known[digest]
        made = make()
        with self._lock:
            self._known[digest] = made
            while len(self._known) > self._size:
                self._known.popitem(last=False)
        return made
