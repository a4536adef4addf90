"""Degrees: what the command line gives, what does not multiply to the number of processes, and the parts of batches."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

from gossamer.errors import UsageError
from gossamer.parallel import Parallel
from gossamer.parallel.data import Shared, part_of
from gossamer.training.feeding import seed_epoch


@pytest.mark.parametrize(
    ("text", "world", "expected"),
    [
        ("ddp", 4, Parallel(data=4)),
        ("fsdp", 2, Parallel(data=2, shard=True)),
        ("ddp,2+tp,2", 4, Parallel(data=2, tensor=2)),
        ("tp + ddp,2", 6, Parallel(data=2, tensor=3)),
        ("pp", 3, Parallel(pipeline=3)),
        ("fsdp", 1, Parallel()),
    ],
)
def test_parse(text, world, expected):
    assert Parallel.parse(text, world) == expected


@pytest.mark.parametrize(
    ("text", "world", "says"),
    [
        ("dpp", 2, "did you mean"),
        ("ddp,0", 2, "ddp,2"),
        ("ddp,x", 2, "ddp,2"),
        ("ddp,3", 2, "torchrun --nproc-per-node 3"),
        ("ddp+tp", 4, "more than one"),
        ("ddp,2+fsdp,2", 4, "twice"),
        ("ddp,2+tp", 3, "multiple of 2"),
        ("", 2, "known are"),
    ],
)
def test_what_cannot_be_read_is_one_line(text, world, says):
    with pytest.raises(UsageError, match=says) as caught:
        Parallel.parse(text, world)
    assert "\n" not in str(caught.value)


def test_without_torchrun_the_command_is_named(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(UsageError, match="torchrun --nproc-per-node 4 -m gossamer"):
        Parallel.parse("ddp,4")


@pytest.mark.parametrize("wrong", [{"data": 0}, {"schedule": "2f2b"}, {"microbatches": 0}, {"shard": True}, {"timeout_s": 0}])
def test_values_out_of_range(wrong):
    with pytest.raises(UsageError):
        Parallel(**wrong)


class Noisy(Dataset):
    def __len__(self):
        return 23

    def __getitem__(self, index):
        return torch.tensor([float(index)]), index


def epochs_of(data, ranks, epochs=2):
    """For each epoch the samples of each batch, joined over processes, and the sizes of the parts."""
    shares = [Shared(data(), rank, ranks) for rank in range(ranks)]
    for epoch in range(epochs):
        found = []
        for share in shares:
            share.seed(5, epoch, torch.device("cpu"))
            found.append(list(share))
            assert len(found[-1]) == len(share)
        yield [[i for part in parts for i in part.raw[1].tolist()[: part.n]] for parts in zip(*found, strict=True)], found


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("generator", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_parts_of_a_loader_are_the_batches_of_one_process(ranks, generator, workers):
    if workers and (ranks != 2 or not generator):
        pytest.skip("one case with workers is enough")

    def loader():
        own = torch.Generator().manual_seed(3) if generator else None
        return DataLoader(Noisy(), batch_size=4, shuffle=True, generator=own, num_workers=workers)

    alone = loader()
    for epoch, (joined, found) in enumerate(epochs_of(loader, ranks)):
        seed_epoch(alone, 5, epoch, torch.device("cpu"))
        assert joined == [labels.tolist() for _, labels in alone]
        assert sorted(i for batch in joined for i in batch) == list(range(23))
        for parts in zip(*found, strict=True):
            assert sum(p.n for p in parts) == parts[0].total
            assert max(p.n for p in parts) - min(p.n for p in parts) <= 1
            assert all(len(p.raw[1]) >= 1 for p in parts)  # where none are its own, one stands in


def test_a_list_of_batches_is_cut_and_random_numbers_of_reading_are_common():
    class Augmented:
        def __iter__(self):
            for i in range(3):
                yield torch.randn(5, 2), torch.arange(5) + 5 * i

    wholes = []
    for _ in range(2):
        shares = [Shared(Augmented(), rank, 2) for rank in range(2)]
        parts = []
        for share in shares:
            share.seed(1, 0, torch.device("cpu"))
            mine = []
            for part in share:
                torch.rand(share.rank + 1)  # what a network draws between batches
                mine.append(part)
            parts.append(mine)
        wholes.append([torch.cat([a.raw[0], b.raw[0]]) for a, b in zip(*parts, strict=True)])
    seed_epoch(None, 1, 0, torch.device("cpu"))
    for a, b, (x, _) in zip(*wholes, list(Augmented()), strict=True):
        assert torch.equal(a, x) and torch.equal(b, x)


def test_what_is_no_row_a_sample_is_left_whole():
    part = part_of(({"x": torch.arange(6.0).view(3, 2), "scale": torch.ones(2)}, torch.arange(3)), 0, 2)
    assert part.raw[0]["x"].tolist() == [[0, 1], [2, 3]]
    assert part.raw[0]["scale"].shape == (2,)
    assert (part.n, part.total) == (2, 3)


def test_a_loader_that_divides_already_is_refused():
    data = TensorDataset(torch.zeros(4, 1))
    loader = DataLoader(data, sampler=DistributedSampler(data, num_replicas=2, rank=0))
    with pytest.raises(UsageError, match="plain DataLoader"):
        Shared(loader, 0, 2)
