"""Bring the state of a run home from the processes that a Trainer starts (``ddp_spawn``, ``ddp_notebook``).

Lightning's launcher pickles what ``get_extra_results`` returns in the first of these processes, and unpickles it in the
main process. It calls no hook there, so the state is handed over when it is unpickled.
"""

from __future__ import annotations

import io
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import torch

from lightning_autoprune.training.lightning_package import Trainer

__all__ = ["Mailbox"]


class Mailbox:
    """Gets what its copies in other processes send.

    Attributes:
        content: what was received last; None before.

    Example:
        >>> import pickle
        >>> mailbox = Mailbox()
        >>> letter = pickle.dumps(mailbox.write_letter({"step": 3}))  # by a copy, in another process
        >>> _ = pickle.loads(letter)
        >>> mailbox.content
        {'step': 3}
    """

    def __init__(self) -> None:
        self.content: dict[str, Any] | None = None
        self._address = uuid.uuid4().hex
        _MAILBOXES[self._address] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self._address in _MAILBOXES:  # a copy in the same process
            self._address = uuid.uuid4().hex
        _MAILBOXES[self._address] = self

    def write_letter(self, content: Mapping[str, Any]) -> _Letter:
        """Return an object that hands over plain data and tensors where it is unpickled."""
        buffer = io.BytesIO()
        torch.save(dict(content), buffer)  # as bytes, since tensors would stay in memory that this process shares
        return _Letter(self._address, buffer.getvalue())

    def send_from(self, trainer: Trainer, content: Mapping[str, Any]) -> None:
        """Send plain data and tensors to the main process with the Trainer's results, if it started this process."""
        launcher: Any = trainer.strategy.launcher
        if hasattr(launcher, "get_extra_results"):
            results = partial(_add_letter, type(launcher).get_extra_results, launcher, self.write_letter(content))
            launcher.get_extra_results = results


class _Letter:
    """Hands its content over when it is unpickled."""

    def __init__(self, address: str, content: bytes) -> None:
        self._address, self._content = address, content

    def __reduce__(self) -> Any:
        return _deliver, (self._address, self._content)


_MAILBOXES: WeakValueDictionary[str, Mailbox] = WeakValueDictionary()
"""The mailboxes of this process, by address. A copy in another process has the same address."""


def _deliver(address: str, content: bytes) -> None:
    """Put a letter's content into its mailbox, if that is in this process."""
    if (mailbox := _MAILBOXES.get(address)) is not None:
        mailbox.content = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")


def _add_letter(
    get_results: Callable[[Any, Trainer], dict[str, Any]], launcher: Any, letter: _Letter, trainer: Trainer
) -> dict[str, Any]:
    """Return the results that a launcher sends to the main process, and a letter among them."""
    return {**get_results(launcher, trainer), "autoprune": letter}
