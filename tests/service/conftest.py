"""The API that tests of its routes share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.http_world import HttpWorld, http_world


@pytest.fixture(scope="module")
def world() -> Iterator[HttpWorld]:
    """The API with the settings' defaults; a module that wants others makes its own."""
    with http_world() as made:
        yield made
