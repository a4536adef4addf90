"""An interrupted and resumed training ends in the weights of an uninterrupted one, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gossamer.errors import RunFolderError
from gossamer.models import resnet8
from gossamer.training import fit
from gossamer.training.checkpoint import FILE, PREVIOUS, checksum

EPOCHS, STEPS = 3, 5


class Net(nn.Module):
    """Dropout, batch statistics, tied weights, and convolutions: everything that a resumed run could get wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.body = resnet8(width=4, in_channels=1, num_classes=12)
        self.drop, self.one, self.two = nn.Dropout(0.4), nn.Linear(12, 12), nn.Linear(12, 12)
        self.two.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.drop(torch.relu(self.one(self.drop(self.body(x))))))


class Noisy(TensorDataset):
    """Augmentation from torch's random numbers."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + 0.1 * torch.randn(x.shape), y


def loader() -> DataLoader:
    g = torch.Generator().manual_seed(0)
    data = Noisy(torch.randn(36, 1, 8, 8, generator=g), torch.randint(12, (36,), generator=g))
    return DataLoader(data, batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(1))


def train(folder: Path | None, **options):
    torch.manual_seed(0)
    model = Net()
    log = folder.parent / "log.jsonl" if folder else None
    defaults = {"epochs": EPOCHS, "lr": 1e-2, "val": list(loader())[:1], "seed": 3}
    return fit(model, loader(), checkpoint=folder, log=log, **(defaults | options))


class Interrupt(Exception):
    """What a user's Ctrl-C or a full disk would be."""


def stop_at(step: int):
    def progress(done: int, total: int) -> None:
        assert total == EPOCHS * STEPS
        if done == step:
            raise Interrupt

    return progress


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


def timeless(history):
    return [{k: v for k, v in record.items() if k != "seconds"} for record in history]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("stop", [2, STEPS, STEPS + 1, 2 * STEPS - 1, 2 * STEPS + 3])
@pytest.mark.parametrize("every", [None, 2])
def test_resumed_equals_uninterrupted(tmp_path, optimizer, stop, every):
    whole = train(None, optimizer=optimizer)
    folder = tmp_path / "checkpoints"
    with pytest.raises(Interrupt):
        train(folder, optimizer=optimizer, checkpoint_every=every, progress=stop_at(stop))
    torch.manual_seed(1234)  # a fresh process has another global state
    resumed = train(folder, optimizer=optimizer, checkpoint_every=every, resume=True)
    assert_same(whole.model, resumed.model)
    assert timeless(whole.history) == timeless(resumed.history)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert lines == list(resumed.history)


def test_interrupted_twice(tmp_path):
    whole, folder = train(None), tmp_path / "checkpoints"
    for stop, resume in ((4, False), (9, True)):
        with pytest.raises(Interrupt):
            train(folder, checkpoint_every=1, progress=stop_at(stop), resume=resume)
    assert_same(whole.model, train(folder, checkpoint_every=1, resume=True).model)


def test_only_the_remaining_steps_are_trained(tmp_path):
    folder = tmp_path / "checkpoints"
    with pytest.raises(Interrupt):
        train(folder, checkpoint_every=2, progress=stop_at(STEPS + 4))
    seen: list[int] = []
    train(folder, checkpoint_every=2, resume=True, progress=lambda done, total: seen.append(done))
    assert seen == list(range(STEPS + 5, EPOCHS * STEPS + 1))


def test_resuming_a_finished_run_trains_nothing(tmp_path):
    first = train(tmp_path / "c")
    seen: list[int] = []
    again = train(tmp_path / "c", resume=True, progress=lambda done, total: seen.append(done))
    assert not seen
    assert_same(first.model, again.model)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == EPOCHS


def test_checkpointing_changes_no_weight(tmp_path):
    assert_same(train(None).model, train(tmp_path / "c", checkpoint_every=1).model)


def test_lines_of_others_stay_in_the_log(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": "prune"}\n')
    with pytest.raises(Interrupt):
        train(tmp_path / "c", progress=stop_at(STEPS + 2))
    with (tmp_path / "log.jsonl").open("a") as f:
        f.write('{"epoch": 2, "half a li')  # killed while writing
    train(tmp_path / "c", resume=True)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[0] == {"step": "prune"}
    assert [line["epoch"] for line in lines[1:]] == [1, 2, 3]


def test_resume_without_a_checkpoint_starts_from_the_beginning(tmp_path):
    assert_same(train(None).model, train(tmp_path / "c", resume=True).model)


def test_the_files_are_safetensors_and_the_last_two_are_kept(tmp_path):
    train(tmp_path / "c")
    assert {p.name for p in (tmp_path / "c").iterdir()} == {FILE, PREVIOUS}
    with safe_open(tmp_path / "c" / FILE, "pt") as f:
        names = set(f.keys())
        progress = json.loads(f.metadata()["gossamer"])["progress"]
    assert "model.one.weight" in names
    assert "optimizer.model.one.weight/exp_avg" in names
    assert progress["epoch"] == EPOCHS


def test_an_old_checkpoint_is_not_overwritten(tmp_path):
    train(tmp_path / "c")
    with pytest.raises(RunFolderError, match="resume=True"):
        train(tmp_path / "c")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"epochs": 4}, "epochs is 3 there and 4 here"), ({"lr": 0.5}, "lr is"), ({"seed": 4}, "seed"), ({"optimizer": "sgd"}, "optimizer")],
)
def test_other_settings_cannot_be_resumed(tmp_path, options, message):
    train(tmp_path / "c")
    with pytest.raises(RunFolderError, match=message):
        train(tmp_path / "c", resume=True, **options)


def test_another_network_cannot_be_resumed(tmp_path):
    train(tmp_path / "c")
    with pytest.raises(RunFolderError, match="another network"):
        fit(resnet8(width=4, in_channels=1), loader(), epochs=EPOCHS, lr=1e-2, seed=3, checkpoint=tmp_path / "c", resume=True)


def test_a_broken_or_unwritable_checkpoint_is_named(tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / FILE).write_bytes(b"broken")
    with pytest.raises(RunFolderError, match=FILE):
        train(tmp_path / "c", resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot write"):
        fit(nn.Linear(2, 2), [(torch.zeros(1, 2), torch.tensor([0]))], checkpoint=tmp_path / "file" / "c")


def test_a_checkpoint_of_an_earlier_version_is_one_line(tmp_path):
    """Optimiser state was numbered before it was named."""
    train(tmp_path / "c")
    with safe_open(tmp_path / "c" / FILE, "pt") as f:
        header = f.metadata()["gossamer"]
        tensors = {n: f.get_tensor(n) for n in f.keys()}  # noqa: SIM118
    old = {n.replace("optimizer.model.one.weight/", "optimizer.3."): t for n, t in tensors.items()}
    save_file(old, tmp_path / "c" / FILE, metadata={"gossamer": header, "checksum": checksum(header, old)})
    with pytest.raises(RunFolderError, match="of another version or network") as e:
        train(tmp_path / "c", resume=True)
    assert "\n" not in str(e.value)
