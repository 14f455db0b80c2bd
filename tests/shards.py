"""WebDataset shards for tests."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable


def shard(
    name: str, members: list[tuple[str, bytes]], change: Callable[[tarfile.TarInfo], None] = lambda info: None
) -> str:
    """Write an archive of members (name, bytes); `change` may make links of them. Returns its name."""
    with tarfile.open(name, "w") as archive:
        for member, data in members:
            info = tarfile.TarInfo(member)
            info.size = len(data)
            change(info)
            archive.addfile(info, io.BytesIO(data) if info.isreg() else None)
    return name
