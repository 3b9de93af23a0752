from collections.abc import Iterator
from uuid import uuid4

import pytest

from pipeline.storage.objects import ObjectStore
from tests.support.s3_server import S3Server, serving


@pytest.fixture(scope="package")
def s3() -> Iterator[S3Server]:
    with serving() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture(params=[pytest.param("s3", marks=pytest.mark.processes), "memory"])
def store(request: pytest.FixtureRequest) -> ObjectStore:
    """An empty store of each kind."""
    if request.param == "s3":
        return ObjectStore(f"{request.getfixturevalue('s3').new_bucket()}/some/folder", retry_s=5)
    return ObjectStore(f"memory://{uuid4().hex}", retry_s=5)
