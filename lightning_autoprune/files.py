"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["replacing"]


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write to in place of another, which it replaces if nothing is raised.

    Raises:
        OSError: if there is no such folder, or it can't be written to.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory, replacing(f"{directory}/a") as temporary:
        ...     _ = temporary.write_text("whole")
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        try:
            temporary.touch()
        except OSError as error:
            error.filename = str(path)  # the name that the caller knows
            raise
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # some libraries make files that no one else may read
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
