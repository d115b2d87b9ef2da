"""Writes files atomically: the whole file, or nothing."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["atomic_write"]


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path to write to, and move it to ``path`` unless an error is raised.

    An existing file keeps its mode. A link stays a link, and the file that it points to is replaced.

    Raises:
        OSError: if the folder does not exist or can't be written to, or if the path is not a regular file but a folder,
            a pipe or a device.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory, atomic_write(f"{directory}/a") as temporary:
        ...     _ = temporary.write_text("whole")
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")  # another process may write the same file
    try:
        try:
            temporary.touch()
        except OSError as error:
            error.filename = str(path)  # the name that the caller knows
            raise
        mode = (target if target.exists() else temporary).stat().st_mode
        temporary.chmod(mode | stat.S_IWUSR)
        yield temporary
        temporary.chmod(mode)  # some libraries make files that no one else may read
        os.replace(temporary, target)
    finally:
        with suppress(OSError):  # the folder may not exist
            temporary.unlink(missing_ok=True)
