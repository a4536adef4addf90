"""Model specifications: what they build, and what is said where they cannot be used."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from safetensors.torch import save_file

from gossamer.errors import SourceError, UsageError, WeightsError
from gossamer.models import resnet8
from gossamer.sources import complete, is_spec, load_model
from gossamer.sources.factory import format_options, parse_options

FACTORIES = """
import torch
from helper_beside_it import WIDTH
def plain(width=WIDTH):
    return torch.nn.Linear(width, 2)
def with_inputs():
    return torch.nn.Linear(4, 2), (torch.zeros(3, 4),)
def with_dict():
    return torch.nn.Linear(4, 2), {"input": torch.zeros(3, 4)}
def broken():
    raise RuntimeError("no such thing")
def text():
    return "a network"
NOT_CALLABLE = 3
"""


@pytest.fixture
def factories(tmp_path):
    (tmp_path / "helper_beside_it.py").write_text("WIDTH = 4\n")
    path = tmp_path / "mynets.py"
    path.write_text(FACTORIES)
    yield path
    sys.modules.pop("helper_beside_it", None)


def test_torchvision_with_its_own_transform():
    loaded = load_model("torchvision:mobilenet_v2")
    assert loaded.input_shape == (1, 3, 224, 224)
    assert not loaded.model.training
    assert not loaded.pretrained
    assert loaded.transform.crop_size == [224]
    assert loaded.transform.resize_size == [256]
    assert load_model("torchvision:lraspp_mobilenet_v3_large").transform is None


def test_options_of_torchvision_models_are_in_the_spec():
    loaded = load_model("torchvision:mobilenet_v2?width_mult=0.35", num_classes=7)
    assert loaded.spec == "torchvision:mobilenet_v2?width_mult=0.35&num_classes=7"
    again = load_model(loaded.spec).model
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in loaded.model.state_dict().items()}


def test_pretrained_weights_classify_as_torchvision_does(mobilenet_weights):
    import torchvision

    loaded = load_model("torchvision:mobilenet_v2", weights=mobilenet_weights)
    own = load_model("gossamer:mobilenet_v2", weights=mobilenet_weights)
    reference = torchvision.models.mobilenet_v2()
    reference.load_state_dict(torch.load(mobilenet_weights, weights_only=True))
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(loaded.model(x), reference.eval()(x))
        assert torch.equal(own.model(x), reference(x))
    assert loaded.pretrained


def test_the_transform_follows_the_weights_file_by_its_published_name(tmp_path):
    from torchvision.models import ResNet50_Weights

    file = tmp_path / ResNet50_Weights.IMAGENET1K_V2.url.rpartition("/")[2]
    torch.save(load_model("torchvision:resnet50").model.state_dict(), file)
    assert load_model("torchvision:resnet50", weights=file).transform.resize_size == [232]
    assert load_model("torchvision:resnet50").transform.resize_size == [256]


def test_own_models_with_options():
    loaded = load_model("gossamer:resnet8?width=4&in_channels=1&num_classes=5")
    assert loaded.model(torch.zeros(2, 1, 8, 8)).shape == (2, 5)
    assert loaded.input_shape == (1, 1, 32, 32)
    assert load_model("gossamer:mobilenet_v2?small=true").input_shape == (1, 3, 32, 32)


def test_the_seed_decides_random_weights_and_the_global_state_stays():
    before = torch.get_rng_state()
    a, b, c = (load_model("gossamer:resnet8", seed=s).model.head.weight for s in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(before, torch.get_rng_state())


def test_factory_in_a_file(factories):
    assert load_model(f"{factories}:plain").model.in_features == 4
    assert load_model(f"{factories}:plain?width=6").model.in_features == 6
    loaded = load_model(f"{factories}:with_inputs")
    assert loaded.input_shape == (3, 4)
    assert loaded.pretrained
    assert set(load_model(f"{factories}:with_dict").example_inputs) == {"input"}


def test_factory_in_a_module_of_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "nets_of_mine.py").write_text("import torch\ndef make():\n    return torch.nn.Linear(2, 2)\n")
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    assert load_model("nets_of_mine:make").model.in_features == 2
    assert sys.path == path
    sys.modules.pop("nets_of_mine")


@pytest.mark.parametrize(
    ("tail", "message"),
    [
        (":plian", "did you mean 'plain'"),
        (":NOT_CALLABLE", "is not callable"),
        (":broken", "RuntimeError: no such thing"),
        (":text", "returned a str"),
        (":plain?depth=3", "unexpected keyword"),
        (":", "write package.module:factory"),
    ],
)
def test_bad_factories(factories, tail, message):
    with pytest.raises(SourceError, match=message) as e:
        load_model(f"{factories}{tail}")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("torchvision:mobilnet_v2", "did you mean 'mobilenet_v2'"),
        ("torchvision:resnet18?clases=2", "clases"),
        ("torchvision:resnet18?in_channels=1", "3 channels"),
        ("gossamer:mobilnet_v2", "did you mean 'mobilenet_v2'"),
        ("mobilenet_v2", "'gossamer:mobilenet_v2' or 'torchvision:mobilenet_v2'"),
        ("torchvison:resnet18", "did you mean 'torchvision'"),
        ("nowhere.nothing:make", "no module 'nowhere'"),
        ("no/such/file.py:make", "no file"),
        ("gossamer:resnet8?width", "cannot read option"),
    ],
)
def test_bad_specs(spec, message):
    with pytest.raises(SourceError, match=message) as e:
        load_model(spec)
    assert "\n" not in str(e.value)


def test_a_file_that_fails_to_import_is_named(tmp_path):
    (tmp_path / "bad_file.py").write_text("1 / 0\n")
    with pytest.raises(SourceError, match=r"bad_file\.py failed with ZeroDivisionError"):
        load_model(f"{tmp_path}/bad_file.py:make")
    assert not any(name.startswith("bad_file") for name in sys.modules)


def test_without_timm_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(SourceError, match=r"gossamer\[timm\]"):
        load_model("timm:resnet18")


def test_timm_models_come_with_their_own_transform(monkeypatch):
    made = {}

    def create_model(name, pretrained, **options):
        made.update(name=name, pretrained=pretrained, **options)
        return resnet8(in_channels=options.get("in_chans", 3))

    data = types.SimpleNamespace(
        resolve_data_config=lambda args, model: {"input_size": (3, 160, 160), "mean": (0.5,)},
        create_transform=lambda is_training, **config: ("transform", is_training, config["mean"]),
    )
    fake = types.SimpleNamespace(list_models=lambda: ["tiny_net"], create_model=create_model, data=data)
    monkeypatch.setitem(sys.modules, "timm", fake)
    loaded = load_model("timm:tiny_net", num_classes=5)
    assert made == {"name": "tiny_net", "pretrained": False, "num_classes": 5}
    assert loaded.input_shape == (1, 3, 160, 160)
    assert loaded.transform == ("transform", False, (0.5,))
    assert load_model("timm:tiny_net", in_channels=1).input_shape == (1, 1, 160, 160)
    with pytest.raises(SourceError, match="did you mean 'tiny_net'"):
        load_model("timm:tinynet")


def test_spec_or_run_folder(tmp_path):
    assert is_spec("gossamer:resnet8")
    assert not is_spec(str(tmp_path))
    (tmp_path / "a:b").mkdir()
    assert not is_spec(str(tmp_path / "a:b"))


def test_options_round_trip():
    text = "net?a=1&b=0.5&c=true&d=wide"
    name, options = parse_options(text)
    assert options == {"a": 1, "b": 0.5, "c": True, "d": "wide"}
    assert format_options(name, options) == text


# Weights


@pytest.fixture
def net():
    torch.manual_seed(3)
    return resnet8(width=4)


def load(path):
    return load_model("gossamer:resnet8?width=4", weights=path).model


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_torch_files_wrapped_and_prefixed(net, tmp_path, wrap, prefix):
    state = {prefix + k: v for k, v in net.state_dict().items()}
    torch.save(wrap(state), tmp_path / "w.pth")
    assert all(torch.equal(a, b) for a, b in zip(load(tmp_path / "w.pth").state_dict().values(), net.state_dict().values(), strict=True))


def test_safetensors_by_ending_or_content(net, tmp_path):
    for name in ("w.safetensors", "w.bin"):
        save_file(net.state_dict(), tmp_path / name)
        assert torch.equal(load(tmp_path / name).head.weight, net.head.weight)


def test_what_save_weights_writes_loads_with_tied_tensors(tmp_path, monkeypatch):
    from gossamer.run_folder import save_weights

    (tmp_path / "tied_net.py").write_text(
        "from torch import nn\n"
        "def make():\n    m = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))\n    m[1].weight = m[0].weight\n    return m\n"
    )
    net = load_model(f"{tmp_path}/tied_net.py:make", seed=5).model
    save_weights(net, tmp_path / "w.safetensors")
    again = load_model(f"{tmp_path}/tied_net.py:make", weights=tmp_path / "w.safetensors").model
    assert torch.equal(again[1].weight, net[0].weight)


def test_wrong_weights_list_names_and_both_shapes(net, tmp_path):
    state = net.state_dict()
    state["head.weight"] = torch.zeros(3, 16)
    state["extra.weight"] = torch.zeros(2)
    del state["head.bias"]
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(WeightsError) as e:
        load(tmp_path / "w.pth")
    text = str(e.value)
    for part in ("w.pth", "3 tensors", "head.weight is (3, 16) in the file and (10, 16)", "head.bias", "missing", "extra.weight (2,)"):
        assert part in text
    assert "\n" not in text


def test_many_differences_are_counted_not_listed(tmp_path):
    torch.save(resnet8(width=8).state_dict(), tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"and \d\d more") as e:
        load(tmp_path / "w.pth")
    assert len(str(e.value)) < 600


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(net, tmp_path, bad):
    net.head.bias.data[3] = bad
    torch.save(net.state_dict(), tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"head\.bias holds 1 values"):
        load(tmp_path / "w.pth")


class Payload:
    """Would write a file if it were unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_is_refused_and_never_run(tmp_path, net):
    torch.save({"state_dict": net.state_dict(), "hook": Payload(tmp_path / "ran")}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="safetensors"):
        load(tmp_path / "w.pth")
    torch.save(net, tmp_path / "whole.pth")
    with pytest.raises(WeightsError, match="safetensors"):
        load(tmp_path / "whole.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("w.pth", b"hello world, no weights"),
        ("w.safetensors", b"\x10"),
        ("w.pth", b"\x80\x02h\x65."),
        ("w.pth", b""),
        ("w.pth", b"PK\x03\x04broken"),
    ],
)
def test_broken_files(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=name) as e:
        load(tmp_path / name)
    assert "\n" not in str(e.value)


def test_missing_file_lists_near_names(tmp_path, net):
    torch.save(net.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match=r"weights\.pth'\?"):
        load(tmp_path / "wieghts.pth")


@pytest.mark.parametrize("content", [{}, {"lr": 0.1}, [torch.zeros(2)], torch.zeros(3)])
def test_files_that_hold_something_else(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="state dict"):
        load(tmp_path / "w.pth")


def test_weights_errors_are_usage_errors():
    assert issubclass(WeightsError, UsageError)


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("resnet18", "gossamer:resnet18"),
        ("resnet8?width=8&in_channels=1", "gossamer:resnet8?width=8&in_channels=1"),
        ("vgg11", "torchvision:vgg11"),
        ("shufflenet_v2_x1_0", "torchvision:shufflenet_v2_x1_0"),
        ("timm:resnet18", "timm:resnet18"),
    ],
)
def test_bare_names_are_completed(text, spec):
    assert complete(text) == spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mobilenet_v3", "may be mobilenet_v3_large, mobilenet_v3_small: name one of them"),
        ("resnet", "and more"),
        ("mobilnet_v2", "did you mean 'gossamer:mobilenet_v2'"),
        ("no-such-thing-at-all", "neither a file, a run folder nor a model$"),
        ("", "neither a file"),
        ("resnet18?width", "cannot read option"),
    ],
)
def test_bare_names_that_mean_nothing_or_several_things(text, message):
    with pytest.raises(SourceError, match=message):
        complete(text)


@pytest.mark.parametrize(
    ("name", "side"), [("resnet18", 224), ("resnet18?small=true", 32), ("resnet20", 32), ("resnet20?small=false", 224)]
)
def test_networks_know_the_size_of_their_images(name, side):
    assert load_model(f"gossamer:{name}").input_shape == (1, 3, side, side)
