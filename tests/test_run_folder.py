"""Saving and loading: atomic, exact, tied tensors once, and clear errors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gossamer.errors import RunFolderError, SourceError, WeightsError
from gossamer.plan import Keep, Plan
from gossamer.result import Profile, Result
from gossamer.run_folder import load, load_weights, save_weights, write_text


def _tied() -> nn.ModuleDict:
    net = nn.ModuleDict({"a": nn.Embedding(6, 4), "b": nn.Linear(4, 6, bias=False), "bn": nn.BatchNorm1d(4)})
    net["b"].weight = net["a"].weight
    return net


def test_weights_come_back_bit_for_bit_and_ties_are_stored_once(tmp_path):
    net, other = _tied(), _tied()
    path = save_weights(net, tmp_path / "w.safetensors")
    load_weights(other, path)
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in net.state_dict().items())
    assert other["a"].weight is other["b"].weight
    assert path.stat().st_size < 2 * 6 * 4 * 4 + 1000


def test_the_same_weights_give_the_same_bytes(tmp_path):
    net = _tied()
    assert save_weights(net, tmp_path / "1").read_bytes() == save_weights(net, tmp_path / "2").read_bytes()


def test_weights_that_do_not_fit_name_both_shapes(tmp_path):
    path = save_weights(nn.Linear(3, 2), tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"file \(2, 3\), network \(2, 4\)"):
        load_weights(nn.Linear(4, 2), path)
    with pytest.raises(WeightsError, match="bias: not in the network"):
        load_weights(nn.Linear(3, 2, bias=False), path)


def test_a_torn_file_is_one_line(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{half")
    with pytest.raises(WeightsError, match="cannot read"):
        load_weights(nn.Linear(3, 2), tmp_path / "w.safetensors")


def test_write_replaces_whole_files_and_leaves_nothing_beside_them(tmp_path):
    write_text(tmp_path / "a" / "f.txt", "one")
    write_text(tmp_path / "a" / "f.txt", "two")
    assert (tmp_path / "a" / "f.txt").read_text() == "two"
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["f.txt"]


def test_writing_below_a_file_is_a_run_folder_error(tmp_path):
    (tmp_path / "f").write_text("")
    with pytest.raises(RunFolderError, match="cannot write"):
        write_text(tmp_path / "f" / "g.txt", "x")


def test_save_and_load_a_result(tmp_path):
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    edits = (
        Keep(tensor="0.weight", dim=0, index=(0, 2)),
        Keep(tensor="0.bias", dim=0, index=(0, 2)),
        Keep(tensor="2.weight", dim=1, index=(0, 2)),
    )
    plan = Plan(edits=edits)
    cut = plan.apply(net)
    with torch.no_grad():
        cut[0].weight.mul_(1.1)  # as training would
    profile = Profile(params=1, macs=1, weight_bytes=4, peak_activation_bytes=4)
    folder = Result(model=cut, plan=plan, before=profile, after=profile).save(tmp_path / "run")
    x = torch.randn(5, 4)
    assert torch.equal(load(folder, net)(x), cut(x))
    with pytest.raises(RunFolderError, match="already holds"):
        Result(model=cut, plan=plan, before=profile, after=profile).save(tmp_path / "run")
    with pytest.raises(SourceError, match="network in memory"):
        load(folder)


def test_loading_from_an_empty_folder_says_what_is_missing(tmp_path):
    with pytest.raises(RunFolderError, match="no finished run"):
        load(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(RunFolderError, match="--resume"):
        load(tmp_path)
