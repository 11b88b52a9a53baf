"""The image, built once by the Dockerfile's own steps; and a loud word where that cannot be done."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.image import debian, pipsettings, sandbox
from tests.image.build import Build, Image
from tests.image.context import Context
from tests.image.dockerfile import parse

ROOT = Path(__file__).parents[2]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep all that share the image in one process when pytest runs in several: it is to be built once."""
    for item in items:
        if "image" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("image"))


@pytest.fixture(scope="session")
def image() -> Iterator[Image]:
    """The image. Where it cannot be made tests skip, and fail where CI=true."""
    why = sandbox.missing() or debian.missing()
    if why is not None:
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI must be able to run the Dockerfile: {why}")
        pytest.skip(why)
    settings = pipsettings.found()
    folder = Path(tempfile.mkdtemp(prefix="agentfleet-image-", dir="/var/tmp"))
    folder.chmod(0o755)
    try:
        build = Build(Context(ROOT), folder, debian.unpack, variables=settings.variables, mounts=settings.mounts)
        yield build.run(parse((ROOT / "Dockerfile").read_text()))
    finally:
        shutil.rmtree(folder)
