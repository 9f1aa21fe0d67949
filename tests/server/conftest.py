"""A live server with everything open, shared by the tests that only ask."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.server.live import live, service


@pytest.fixture(scope="session")
def base(pilot) -> Iterator[str]:
    """Address of a server of the bundled model: requests may choose any steering, `honest` is the default."""
    with live(service(pilot)) as address:
        yield address
