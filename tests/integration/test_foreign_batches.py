"""Batches that only the user's code understands: the default holds samples out of each, and prunes to the target."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import trainer
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_autoprune import AutoPruneCallback, prunable_weights, sparsity

TARGET, BATCH, FEATURES = 0.8, 16, 12
HELD_OUT = BATCH // 4


class Samples(Dataset[Any]):
    """Sequences of different lengths with a label and their number, which tells which samples a batch holds."""

    def __init__(self, count: int = 128) -> None:
        generator = torch.Generator().manual_seed(0)
        lengths = torch.randint(1, 9, (count,), generator=generator).tolist()
        self.sequences = [torch.randn(length, FEATURES, generator=generator) for length in lengths]

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        sequence = self.sequences[index]
        return sequence, int(sequence[0, :4].argmax()), index


class Graph:
    """Joins its samples to one tensor of nodes, and knows where each begins: no class that torch or Lightning knows."""

    def __init__(self, samples: list[tuple[Tensor, int, int]]) -> None:
        sequences, labels, self.numbers = zip(*samples, strict=True)
        self.nodes, self.labels = torch.cat(sequences), torch.tensor(labels)
        self.graph_of_node = torch.arange(len(samples)).repeat_interleave(torch.tensor([len(s) for s in sequences]))


@dataclass
class Counted:
    """A dataclass with a count that must agree with its tensors."""

    x: Tensor
    y: Tensor
    count: int
    numbers: list[int]


class AttributeDict(dict[str, Any]):
    """The usual recipe for a dictionary with attributes, whose copies keep the attributes of the first."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.__dict__ = self


class Net(LightningModule):
    """Records the numbers of the samples of each batch, also in held-out passes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(FEATURES, 16), nn.ReLU(), nn.Linear(16, 4))
        self.seen: list[tuple[int, ...]] = []

    def numbers_and_loss(self, batch: Any) -> tuple[Any, Tensor]:
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        numbers, loss = self.numbers_and_loss(batch)
        self.seen.append(tuple(int(number) for number in numbers))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.01)


class GraphNet(Net):
    def numbers_and_loss(self, batch):
        nodes = self.layers(batch.nodes)
        sums = nodes.new_zeros(len(batch.labels), 4).index_add(0, batch.graph_of_node, nodes)
        return batch.numbers, F.cross_entropy(sums, batch.labels)


class PackedNet(Net):
    def __init__(self):
        super().__init__()
        self.lstm, self.layers = nn.LSTM(FEATURES, 12, batch_first=True), nn.Linear(12, 4)

    def numbers_and_loss(self, batch):
        packed, labels, numbers = batch
        out, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        return numbers, F.cross_entropy(self.layers(out.sum(1)), labels)


class ListNet(Net):
    def numbers_and_loss(self, batch):
        sequences, targets = batch
        losses = [
            F.cross_entropy(self.layers(sequence).mean(0), target["label"])
            for sequence, target in zip(sequences, targets, strict=True)
        ]
        return [target["number"] for target in targets], torch.stack(losses).mean()


class TextNet(Net):
    def numbers_and_loss(self, batch):
        x = torch.stack([torch.eye(FEATURES)[len(text)] for text in batch["text"]])
        return batch["number"], F.cross_entropy(self.layers(x), batch["label"])


class AttributeNet(Net):
    def numbers_and_loss(self, batch):
        assert not hasattr(batch, "count") or batch.count == len(batch.x)
        return batch.numbers, F.cross_entropy(self.layers(batch.x), batch.y)


def pack(samples):
    sequences, labels, numbers = zip(*samples, strict=True)
    return pack_sequence(sequences, enforce_sorted=False), torch.tensor(labels), numbers


def lists(samples):
    targets = [{"label": torch.tensor(label), "number": number} for _, label, number in samples]
    return [sequence for sequence, *_ in samples], targets


def text(samples):
    words = ["x" * len(sequence) for sequence, *_ in samples]
    labels, numbers = (torch.tensor([sample[i] for sample in samples]) for i in (1, 2))
    return {"text": words, "label": labels, "number": numbers}


def first_rows(samples):
    x = torch.stack([sequence[0] for sequence, *_ in samples])
    return x, torch.tensor([label for _, label, _ in samples]), [number for *_, number in samples]


def counted(samples):
    x, y, numbers = first_rows(samples)
    return Counted(x, y, len(x), numbers)


def attribute_dict(samples):
    x, y, numbers = first_rows(samples)
    return AttributeDict(x=x, y=y, numbers=numbers)


def model_output(samples):
    generic = pytest.importorskip("transformers.utils").ModelOutput

    @dataclass
    class Output(generic):
        x: Tensor | None = None
        y: Tensor | None = None
        numbers: list[int] | None = None

    x, y, numbers = first_rows(samples)
    return Output(x=x, y=y, numbers=numbers)


def fit_default(model: LightningModule, loader: Any, epochs: int = 5, **options: Any) -> tuple[Trainer, list[str]]:
    """Fit with the default callback; return the trainer, and the warnings about held-out data."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = trainer(epochs=epochs, callbacks=[AutoPruneCallback(TARGET)], **options)
        run.fit(model, loader)
    return run, [str(warning.message) for warning in caught if "held" in str(warning.message)]


def assert_pruned(model: nn.Module) -> None:
    total = sum(weight.numel() for weight in prunable_weights(model).values())
    assert sparsity(model) == pytest.approx(TARGET, abs=2 / total)


BATCHES = {
    "a graph of all samples": (GraphNet, Graph),
    "packed sequences": (PackedNet, pack),
    "lists of sequences and targets": (ListNet, lists),
    "text": (TextNet, text),
    "a dataclass with a count": (AttributeNet, counted),
    "a dictionary with attributes": (AttributeNet, attribute_dict),
    "ModelOutput": (AttributeNet, model_output),
}


@pytest.mark.parametrize("name", BATCHES)
def test_the_default_holds_samples_out_of_batches_of_any_class(name):
    make, collate = BATCHES[name]
    seed_everything(0)
    model = make()
    _, told = fit_default(model, DataLoader(Samples(), BATCH, shuffle=True, collate_fn=collate))
    assert told == []
    assert_pruned(model)
    sizes = [len(numbers) for numbers in model.seen]
    steps = [i for i, size in enumerate(sizes) if size == HELD_OUT]
    assert len(steps) >= 10
    for i in steps[1:]:  # the first is that of the trial
        rest, held_out = model.seen[i - 1], model.seen[i]
        assert len(rest) == BATCH - HELD_OUT
        assert not set(rest) & set(held_out)


def test_workers_collate_the_held_out_samples_too():
    seed_everything(0)
    model = GraphNet()
    _, told = fit_default(model, DataLoader(Samples(), BATCH, shuffle=True, collate_fn=Graph, num_workers=2))
    assert told == []
    assert_pruned(model)
    assert sum(len(numbers) == HELD_OUT for numbers in model.seen) >= 10


class Stream(IterableDataset[Any]):
    def __init__(self, row):
        self.row = row

    def __iter__(self):
        samples = Samples()
        return (self.row(*samples[i]) for i in range(len(samples)))


class StreamNet(Net):
    def numbers_and_loss(self, batch):
        return batch["number"], F.cross_entropy(self.layers(batch["x"]), batch["label"])


def test_batches_of_tensors_from_a_stream_are_split():
    seed_everything(0)
    stream = Stream(lambda x, label, number: {"x": x[0], "label": label, "number": number})
    model = StreamNet()
    _, told = fit_default(model, DataLoader(stream, BATCH), max_steps=40)
    assert told == []
    assert_pruned(model)
    assert sum(len(numbers) == HELD_OUT for numbers in model.seen) >= 10


def test_batches_of_a_stream_that_cannot_be_split_train_the_masks_whole_and_one_warning_says_why():
    seed_everything(0)
    stream = Stream(lambda x, label, number: {"x": x[0], "label": label, "number": number, "text": "some"})
    model = StreamNet()
    _, told = fit_default(model, DataLoader(stream, BATCH), max_steps=40)
    assert len(told) == 1
    assert 'held_out="train"' in told[0]
    assert "str" in told[0]
    assert_pruned(model)
    assert {len(numbers) for numbers in model.seen} == {BATCH}


# Other packages


def test_graphs_of_pytorch_geometric():
    geometric = pytest.importorskip("torch_geometric")
    from torch_geometric.loader import DataLoader as GraphLoader
    from torch_geometric.nn import GATConv, global_mean_pool

    class Attention(Net):
        def __init__(self):
            super().__init__()
            self.attention = GATConv(FEATURES, 6, heads=2)

        def numbers_and_loss(self, batch):
            x = global_mean_pool(self.attention(batch.x, batch.edge_index).relu(), batch.batch)
            return batch.number, F.cross_entropy(self.layers(x), batch.y)

    graphs = []
    for x, label, number in map(Samples().__getitem__, range(128)):
        edges = torch.arange(len(x)).repeat(2, 1)
        graphs.append(geometric.data.Data(x=x, edge_index=edges, y=label, number=number))
    seed_everything(0)
    model = Attention()
    _, told = fit_default(model, GraphLoader(graphs, BATCH, shuffle=True))
    assert told == []
    assert any("attention" in name for name in prunable_weights(model))
    assert_pruned(model)
    assert sum(len(numbers) == HELD_OUT for numbers in model.seen) >= 10


def test_images_of_monai_keep_their_own_metadata():
    monai = pytest.importorskip("monai.data")

    class Images(Net):
        def numbers_and_loss(self, batch):
            images = monai.decollate_batch(batch["image"])
            assert [image.meta["number"] for image in images] == batch["number"].tolist()
            return batch["number"], F.cross_entropy(self.layers(batch["image"].as_tensor()), batch["label"])

    rows = [
        {"image": monai.MetaTensor(x[0], meta={"number": number}), "label": label, "number": number}
        for x, label, number in map(Samples().__getitem__, range(128))
    ]
    seed_everything(0)
    model = Images()
    _, told = fit_default(model, monai.DataLoader(monai.Dataset(rows), batch_size=BATCH, shuffle=True))
    assert told == []
    assert_pruned(model)
    assert sum(len(numbers) == HELD_OUT for numbers in model.seen) >= 10


@pytest.mark.parametrize("kind", ["its own batches", "stacked"])
def test_batches_of_tensordict(kind):
    tensordict = pytest.importorskip("tensordict")
    x, label, number = first_rows([Samples()[i] for i in range(128)])
    table = tensordict.TensorDict({"x": x, "label": label, "number": torch.tensor(number)}, [128])
    rows, collate = (table, lambda batch: batch) if kind == "its own batches" else (list(table), torch.stack)
    seed_everything(0)
    model = StreamNet()
    _, told = fit_default(model, DataLoader(rows, BATCH, shuffle=True, collate_fn=collate))
    assert told == []
    assert_pruned(model)
    assert sum(len(numbers) == HELD_OUT for numbers in model.seen) >= 10
