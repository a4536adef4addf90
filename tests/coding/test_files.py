"""Coded files: read like plain ones, written whole or not at all, and every damage is one line."""

from __future__ import annotations

import json
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
import zstandard
from safetensors.torch import load_file, save_file
from torch import nn

import gossamer as gs
from gossamer.coding import decode, encode, read_state, save_coded
from gossamer.errors import RunFolderError, WeightsError
from gossamer.plan import Mask, Plan, Share, input_specs, pack_mask
from gossamer.result import Profile, Result
from gossamer.run_folder import load_weights, save_weights
from gossamer.sources.weights import read_state as read_source


def _state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sparse = torch.randn(100, 80, generator=generator) * (torch.rand(100, 80, generator=generator) < 0.1)
    shared = torch.randint(0, 5, (64, 80), generator=generator).float()
    very = torch.zeros(300, 300)
    very[::50, ::60] = 1.5
    rows = torch.randint(0, 16, (16, 1000), generator=generator) + 100.0 * torch.arange(16)[:, None]
    return {
        "sparse": sparse,
        "shared": shared,
        "very": very,
        "rows": rows,
        "bias": torch.randn(9, generator=generator),
        "n": torch.tensor(3),
    }


def _same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    bits = [{k: (v.dtype, v.shape, v.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()) for k, v in s.items()} for s in (a, b)]
    return bits[0] == bits[1]


def test_plain_and_coded_files_read_the_same(tmp_path):
    state = _state()
    save_file(state, tmp_path / "plain.safetensors")
    save_coded(state, tmp_path / "new" / "coded.safetensors")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["coded.safetensors"]
    assert _same(read_state(tmp_path / "plain.safetensors"), state)
    assert _same(read_state(tmp_path / "new" / "coded.safetensors"), state)
    assert _same(dict(read_source(tmp_path / "new" / "coded.safetensors")), state)
    assert (tmp_path / "new" / "coded.safetensors").stat().st_size < (tmp_path / "plain.safetensors").stat().st_size / 10


def test_a_plain_file_whose_tensors_are_named_like_those_of_a_coded_one_is_plain(tmp_path):
    state = {"coded": torch.zeros(3, dtype=torch.uint8), "index": torch.zeros(3, dtype=torch.uint8)}
    save_file(state, tmp_path / "w.safetensors")
    assert _same(read_state(tmp_path / "w.safetensors"), state)
    assert _same(decode(encode(state)), state)


def test_a_file_that_exists_is_replaced_and_a_place_that_cannot_be_written_is_one_line(tmp_path):
    save_coded({"a": torch.ones(3)}, tmp_path / "w.safetensors")
    save_coded({"b": torch.ones(3)}, tmp_path / "w.safetensors")
    assert list(read_state(tmp_path / "w.safetensors")) == ["b"]
    with pytest.raises(RunFolderError, match=r"^cannot write .*[^\n]*$"):
        save_coded({"a": torch.ones(3)}, tmp_path / "w.safetensors" / "below")


def _attempt(function, argument) -> tuple[dict[str, torch.Tensor], str | None]:
    try:
        return function(argument), None
    except WeightsError as e:
        return {}, str(e)


def _one_line(error: str | None, path) -> bool:
    return error is not None and error.startswith(f"cannot read {path}: ") and "\n" not in error and len(error) < 500


def test_a_missing_or_torn_file_is_one_line(tmp_path):
    assert _one_line(_attempt(read_state, tmp_path / "none.safetensors")[1], tmp_path / "none.safetensors")
    whole = save_coded(_state(), tmp_path / "w.safetensors").read_bytes()
    for length in [0, 7, 8, 50, *range(100, len(whole), len(whole) // 20)]:
        (tmp_path / "torn.safetensors").write_bytes(whole[:length])
        assert _one_line(_attempt(read_state, tmp_path / "torn.safetensors")[1], tmp_path / "torn.safetensors")


def test_a_changed_byte_is_found_wherever_it_is(tmp_path):
    state = _state()
    whole = bytearray(save_coded(state, tmp_path / "w.safetensors").read_bytes())
    start = 8 + int.from_bytes(whole[:8], "little")
    rng, path = np.random.default_rng(0), tmp_path / "bad.safetensors"
    for at in rng.integers(start, len(whole), 300).tolist():
        bad = bytearray(whole)
        bad[at] ^= int(rng.integers(1, 256))
        path.write_bytes(bad)
        back, error = _attempt(read_state, path)
        assert _same(back, state) if error is None else _one_line(error, path), (
            at
        )  # some bits, as the padding of streams, no reader looks at


def test_values_changed_within_a_valid_stream_fail_the_checksum():
    coded = encode({"w": torch.arange(4000, dtype=torch.int32)[torch.randperm(4000)] * 7919})
    raw = coded["coded"].clone()
    raw[len(raw) // 3] ^= 1  # low bytes do not compress: they are stored as they are
    with pytest.raises(WeightsError, match="checksum"):
        decode({"coded": raw, "index": coded["index"]})


def _with_index(coded: dict[str, torch.Tensor], **changes) -> dict[str, torch.Tensor]:
    index = json.loads(zstandard.decompress(coded["index"].numpy().tobytes())) | changes
    packed = zstandard.compress(json.dumps(index).encode())
    return {"coded": coded["coded"], "index": torch.frombuffer(bytearray(packed), dtype=torch.uint8)}


def test_an_index_that_lies_is_one_line():
    """No shape, form, count or length in the index may end in anything but a WeightsError, or in huge memory."""
    coded = encode(_state())
    index = json.loads(zstandard.decompress(coded["index"].numpy().tobytes()))
    rng = np.random.default_rng(0)
    for key in ("numbers", "sizes", "dims", "dtype", "group"):
        for at in range(len(index[key])):
            for value in (-1, 0, 255, 2**70, None, int(rng.integers(1, 1000))):
                changed = list(index[key])
                if changed[at] == value:
                    continue
                changed[at] = value
                back, error = _attempt(decode, _with_index(coded, **{key: changed}))
                if error is None:  # the bytes agree with their checksum: only how they are cut into shapes can differ
                    assert sum(t.nbytes for t in back.values()) == sum(t.nbytes for t in _state().values())
                else:
                    assert error.startswith("coded weights are damaged") and "\n" not in error
    for changes in ({"names": ["a"]}, {"crc": 1}, {"dtypes": ["object"]}, {"numbers": []}, {"sizes": []}):
        with pytest.raises(WeightsError, match="damaged"):
            decode(_with_index(coded, **changes))


def test_newer_versions_say_so(tmp_path):
    coded = encode({"a": torch.ones(3)})
    save_file(coded, tmp_path / "w.safetensors", {"format": "gossamer-coded 2"})
    with pytest.raises(WeightsError, match=r"version 2.*reads version 1, install a newer"):
        read_state(tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"version 9.*reads version 1, install a newer"):
        decode(_with_index(coded, version=9))
    with pytest.raises(WeightsError, match="not coded weights"):
        decode({"a": torch.ones(3)})


def test_the_checksum_is_crc32_of_all_tensors_in_order():
    state = _state()
    index = json.loads(zstandard.decompress(encode(state)["index"].numpy().tobytes()))
    assert index["crc"] == zlib.crc32(b"".join(t.numpy().tobytes() for t in state.values()))


NETWORK = "nn.Sequential(nn.Linear(64, 200), nn.BatchNorm1d(200), nn.ReLU(), nn.Linear(200, 10)).eval()"


def _compressed() -> tuple[nn.Module, Result]:
    torch.manual_seed(0)
    net: nn.Module = eval(NETWORK)
    edits: list[Mask | Share] = []
    for name in ("0.weight", "3.weight"):
        w = net.state_dict()[name]
        kept = w.abs() > w.abs().quantile(0.9)
        book = tuple(float(v) for v in torch.linspace(float(w.min()), float(w.max()), 16))
        edits.append(Mask(tensor=name, shape=tuple(w.shape), nonzeros=int(kept.sum()), kept=pack_mask(kept)))
        edits.append(Share(tensors=(name,), bits=4, codebooks=(book,), zeros=True))
    plan = Plan(edits=tuple(edits), inputs=input_specs((torch.zeros(4, 64),)))
    profile = Profile(params=1, macs=1, weight_bytes=4, peak_activation_bytes=4)
    return net, Result(model=plan.apply(net), plan=plan, before=profile, after=profile)


def test_a_sparse_shared_result_is_saved_coded_and_loads_in_a_fresh_process(tmp_path):
    net, result = _compressed()
    folder = result.save(tmp_path / "run")
    plain = save_weights(result.model, tmp_path / "plain.safetensors")
    assert (folder / "model.safetensors").stat().st_size < plain.stat().st_size / 6
    script = (
        f"import sys, torch, gossamer as gs; from torch import nn; torch.save(gs.load(sys.argv[1], {NETWORK}).state_dict(), sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", script, str(folder), str(tmp_path / "back.pt")], check=True)
    assert _same(torch.load(tmp_path / "back.pt", weights_only=True), dict(result.model.state_dict()))
    x = torch.randn(4, 64)
    assert torch.equal(gs.load(folder, net)(x), result.model(x))


def test_a_sparse_shared_result_that_is_quantised_is_saved_coded_and_loads(tmp_path):
    net, result = _compressed()
    x = torch.randn(4, 64)
    quantised = gs.quantize(result.model, (x,), calibration=[x])
    whole = quantised.with_(plan=result.plan + quantised.plan)
    folder = whole.save(tmp_path / "run")
    assert set(load_file(folder / "model.safetensors")) == {"coded", "index"}
    back = gs.load(folder, net)
    assert _same(dict(back.state_dict()), dict(whole.model.state_dict()))
    assert torch.equal(back(x), whole.model(x))


def test_a_result_without_masks_is_saved_plain(tmp_path):
    net, result = _compressed()
    plain = Result(model=net, plan=Plan(), before=result.before, after=result.after)
    assert set(load_file(plain.save(tmp_path / "run") / "model.safetensors")) == set(net.state_dict())


def test_tied_tensors_are_coded_once(tmp_path):
    def tied() -> nn.ModuleDict:
        net = nn.ModuleDict({"a": nn.Embedding(60, 40), "b": nn.Linear(40, 60, bias=False)})
        net["b"].weight = net["a"].weight
        return net

    net, other = tied(), tied()
    load_weights(other, save_weights(net, tmp_path / "w.safetensors", coded=True))
    assert list(read_state(tmp_path / "w.safetensors")) == ["a.weight"]
    assert torch.equal(other["b"].weight, net["a"].weight) and other["a"].weight is other["b"].weight


def test_the_same_weights_give_the_same_bytes(tmp_path):
    state = {"w": torch.tensor([[0.0, 1.0], [0.0, 2.0]])}
    assert len({save_coded(state, tmp_path / f"{i}.safetensors").read_bytes() for i in range(8)}) == 1
