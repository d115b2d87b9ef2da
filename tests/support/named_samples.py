"""Samples with a number, batches of classes that this package does not know, and a model that notes what it gets."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from helpers import Net, data
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence
from torch.utils.data import DataLoader, Dataset

SAMPLES, BATCH = 64, 16


class NamedSamples(Dataset):
    """Gives the number, the features and the label of each sample of :func:`helpers.data`."""

    def __init__(self, samples: int = SAMPLES) -> None:
        self.x, self.y = data(samples)[:]

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: Any) -> tuple[int, Tensor, Tensor]:
        return int(index), self.x[index], self.y[index]


class Foreign:
    """A batch of which nothing can be told from outside, as those of graph libraries."""

    __slots__ = ("_content",)

    def __init__(self, samples: list[Any]) -> None:
        numbers, x, y = zip(*samples, strict=True)
        self._content = list(numbers), torch.stack(x), torch.stack(y)


class AttributeDict(dict):
    """A dict with attributes, such as the output of a processor."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


class TensorTable:
    """Tensors with a common first dimension, which can be indexed like TensorDict."""

    def __init__(self, columns: dict[str, Tensor]) -> None:
        self._columns = columns
        self.batch_size = next(iter(columns.values())).shape[:1]

    def __len__(self) -> int:
        return self.batch_size[0]

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return self._columns[key]
        return TensorTable({name: column[key] for name, column in self._columns.items()})


class BatchKind(NamedTuple):
    """How samples become a batch, and the numbers, features and labels of one again."""

    collate: Callable[[list[Any]], Any]
    read: Callable[[Any], tuple[list[int], Tensor, Tensor]]


def _columns(samples: list[Any]) -> dict[str, Tensor]:
    numbers, x, y = zip(*samples, strict=True)
    return {"number": torch.tensor(numbers), "x": torch.stack(x), "y": torch.stack(y)}


def _read_columns(batch: Any) -> tuple[list[int], Tensor, Tensor]:
    return batch["number"].tolist(), batch["x"], batch["y"]


def _targets(samples: list[Any]) -> Any:
    images = [x.view(3, 4) for _, x, _ in samples]
    return images, [{"number": number, "boxes": y.float().expand(1 + number % 3, 4)} for number, _, y in samples]


def _read_targets(batch: Any) -> tuple[list[int], Tensor, Tensor]:
    images, targets = batch
    labels = torch.stack([target["boxes"][0, 0].long() for target in targets])
    return [target["number"] for target in targets], torch.stack(images).flatten(1), labels


def _packed(samples: list[Any]) -> tuple[PackedSequence, Tensor]:
    sequences = [x.view(6, 2)[: 2 + number % 5] for number, x, _ in samples]
    rest = torch.tensor([[number, y] for number, _, y in samples])
    return pack_sequence(sequences, enforce_sorted=False), rest


def _read_packed(batch: Any) -> tuple[list[int], Tensor, Tensor]:
    x, _ = pad_packed_sequence(batch[0], batch_first=True, total_length=6)
    return batch[1][:, 0].tolist(), x.flatten(1), batch[1][:, 1]


def _texts(samples: list[Any]) -> list[str]:
    return [f"{number} {int(y)} " + " ".join(map(str, x.tolist())) for number, x, y in samples]


def _read_texts(batch: list[str]) -> tuple[list[int], Tensor, Tensor]:
    table = torch.tensor([list(map(float, text.split())) for text in batch])
    return table[:, 0].long().tolist(), table[:, 2:], table[:, 1].long()


KINDS = {
    "object": BatchKind(Foreign, lambda batch: batch._content),
    "attribute dict": BatchKind(lambda samples: AttributeDict(_columns(samples)), _read_columns),
    "table": BatchKind(lambda samples: TensorTable(_columns(samples)), _read_columns),
    "lists of targets": BatchKind(_targets, _read_targets),
    "packed sequence": BatchKind(_packed, _read_packed),
    "text": BatchKind(_texts, _read_texts),
}


class Pass(NamedTuple):
    """A call of ``training_step``."""

    is_held_out: bool
    epoch: int
    numbers: list[int]


class Recorder(Net):
    """Notes the numbers of the samples that it is given, but not in a trial, which has no effect on the model."""

    def __init__(self, read: Callable[[Any], Any] = KINDS["object"].read) -> None:
        super().__init__()
        self._read = read
        self.passes: list[Pass] = []

    def training_step(self, batch: Any) -> Tensor:
        numbers, x, y = self._read(batch)
        self.passes.append(Pass("log" in vars(self), self.current_epoch, numbers))  # a held-out pass replaces `log`
        return super().training_step((x, y))


def named_loader(kind: str = "object", dataset: Any = None, **options: Any) -> DataLoader[Any]:
    """Return a loader of :class:`NamedSamples`, whose batches are of a kind in :data:`KINDS`."""
    options = {"collate_fn": KINDS[kind].collate, **options}
    if "batch_sampler" not in options:
        options = {"batch_size": BATCH, "shuffle": True, **options}
    return DataLoader(dataset or NamedSamples(), **options)


def check_parts(passes: list[Pass], batch: int = BATCH) -> int:
    """Check that each held-out pass and the training batch before it share no sample; return the number of these.

    Args:
        passes: those of a run.
        batch: number of samples that both have together.
    """
    pairs = [(before, held) for before, held in pairwise(passes) if held.is_held_out]
    for before, held in pairs:
        assert not before.is_held_out
        assert len({*before.numbers, *held.numbers}) == len(before.numbers) + len(held.numbers) == batch
    return len(pairs)
