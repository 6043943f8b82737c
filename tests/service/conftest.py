"""One PostgreSQL server for all service tests, with a fresh database for each."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import pytest
from postgres_server import NoServer, Server, running_server

_numbers = count()


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    pytest.importorskip("psycopg", reason="no PostgreSQL driver: pip install 'kvplan[postgres]'")
    opened = running_server("fsync=off")  # a crash of the machine is not tested
    try:
        found = opened.__enter__()
    except NoServer as error:
        pytest.skip(str(error))
    try:
        yield found
    finally:
        opened.__exit__(None, None, None)


@pytest.fixture
def url(server: Server) -> str:
    name = f"test{next(_numbers)}"
    server.create_database(name)
    return server.url(database=name)
