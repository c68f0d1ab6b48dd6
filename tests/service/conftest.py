"""What tests of the service share: an API for those of its routes; database and stores for those whose `world` is a `World`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from service.infra.stores import ServiceStore, Stores
from tests.helpers.databases import Database, database
from tests.helpers.http_world import HttpWorld, http_world
from tests.helpers.store_world import World


@pytest.fixture(scope="module")
def world() -> Iterator[HttpWorld]:
    """The API with the settings' defaults, and drills switched on; a module that wants others makes its own."""
    with http_world(enable_redteam=True) as made:
        yield made


@pytest.fixture
def db(world: World) -> Iterator[Database]:
    """The database of a world of stores."""
    world.settings().folder.mkdir(parents=True)
    with database(world.settings()) as found:
        yield found


@pytest.fixture
def stores(world: World, db: Database) -> Stores:
    """Its stores."""
    return world.stores(engine=db.engine)


@pytest.fixture
def store(stores: Stores) -> ServiceStore:
    """That of the project `default`."""
    return stores.project("default")
