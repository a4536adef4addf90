"""Data specifications on tiny files made here, and on the real Fashion-MNIST where it is installed."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gossamer.errors import SourceError
from gossamer.sources import Data, load_data
from gossamer.sources.images import CIFAR_RECORD, FASHION_MNIST


def idx(array: np.ndarray) -> bytes:
    return b"\0\0\x08" + bytes([array.ndim]) + b"".join(int(s).to_bytes(4, "big") for s in array.shape) + array.astype(np.uint8).tobytes()


@pytest.fixture
def fashion(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {}
    for part, n in (("train", 12), ("t10k", 5)):
        arrays[f"{part}-images-idx3"] = rng.integers(0, 256, (n, 28, 28))
        arrays[f"{part}-labels-idx1"] = rng.integers(0, 10, n)
    for name, array in arrays.items():
        (tmp_path / f"{name}-ubyte").write_bytes(idx(array))
    return tmp_path, arrays


def save_image(path: Path, color: tuple[int, int, int] = (255, 0, 0), size: tuple[int, int] = (40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


def plain(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.resize((4, 4)), dtype=np.float32)).permute(2, 0, 1) / 255


def test_digits_are_stratified_normalised_and_always_the_same():
    pytest.importorskip("sklearn")
    from sklearn.datasets import load_digits

    data = load_data("digits", seed=1)
    assert (len(data.train), len(data.val), data.num_classes, data.input_shape) == (1437, 360, 10, (1, 1, 8, 8))
    counts = np.bincount([data.val[i][1] for i in range(360)])
    assert np.abs(counts - np.bincount(load_digits().target) / 5).max() < 1
    x = torch.stack([data.train[i][0] for i in range(len(data.train))])
    assert abs(x.mean()) < 0.01
    assert abs(x.std() - 1) < 0.01
    raw = np.unique(np.round((x.numpy() * 0.376 + 0.305) * 16, 3))
    assert raw.tolist() == list(range(17))
    again = load_data("digits", seed=2)
    assert torch.equal(again.val[7][0], data.val[7][0])
    rows = {x_.numpy().tobytes() for x_ in x} & {data.val[i][0].numpy().tobytes() for i in range(360)}
    assert not rows  # no image is in both splits


@pytest.mark.parametrize("zipped", [False, True])
def test_fashion_mnist_files(fashion, zipped):
    folder, arrays = fashion
    if zipped:
        for path in list(folder.iterdir()):
            (folder / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    data = load_data(f"fashion-mnist:{folder}")
    assert (len(data.train), len(data.val), data.input_shape) == (12, 5, (1, 1, 28, 28))
    image, label = data.val[3]
    want = (arrays["t10k-images-idx3"][3] / 255 - 0.2860) / 0.3530
    np.testing.assert_allclose(image[0].numpy(), want, atol=1e-5)
    assert label == arrays["t10k-labels-idx1"][3]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train-images-idx3-ubyte", idx(np.zeros((12, 28, 28)))[:-5], "should hold 9408 values"),
        ("train-images-idx3-ubyte", b"nonsense", "not an IDX file"),
        ("train-labels-idx1-ubyte", idx(np.zeros(11)), "do not belong together"),
        ("t10k-labels-idx1-ubyte", idx(np.full(5, 10)), "label 10"),
        ("t10k-labels-idx1-ubyte", gzip.compress(idx(np.zeros(5)), mtime=0)[:-9], "cannot read"),
    ],
)
def test_broken_idx_files_are_named(fashion, name, content, message):
    folder, _ = fashion
    (folder / name).write_bytes(content)
    with pytest.raises(SourceError, match=message):
        load_data(f"fashion-mnist:{folder}")


def test_missing_idx_file(fashion):
    folder, _ = fashion
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(SourceError, match="t10k-labels-idx1-ubyte"):
        load_data(f"fashion-mnist:{folder}")
    with pytest.raises(SourceError, match="no folder"):
        load_data(f"fashion-mnist:{folder}/nowhere")


def test_the_real_fashion_mnist():
    if not Path(FASHION_MNIST).is_dir():
        pytest.skip(f"{FASHION_MNIST} is not there (Debian package dataset-fashion-mnist)")
    data = load_data("fashion-mnist")
    assert (len(data.train), len(data.val)) == (60000, 10000)
    x = torch.cat([b[0] for b in data.loader("train", batch_size=500)])
    assert abs(x.mean()) < 1e-3
    assert abs(x.std() - 1) < 1e-3


@pytest.fixture
def cifar(tmp_path):
    rng = np.random.default_rng(1)
    records = {}
    for i, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        record = rng.integers(0, 256, (3 + i, CIFAR_RECORD)).astype(np.uint8)
        record[:, 0] %= 10
        records[name] = record
        (tmp_path / f"{name}.bin").write_bytes(record.tobytes())
    return tmp_path, records


def test_cifar10_binary(cifar, tmp_path):
    folder, records = cifar
    data = load_data(f"cifar10:{folder}")
    assert (len(data.train), len(data.val), data.input_shape, data.num_classes) == (25, 8, (1, 3, 32, 32), 10)
    image, label = data.train[3]  # the first image of the second file
    record = records["data_batch_2"][0]
    assert label == record[0]
    red = record[1 : 1 + 1024].reshape(32, 32) / 255
    np.testing.assert_allclose(image[0].numpy(), (red - 0.4914) / 0.2470, atol=1e-5)
    blue = record[1 + 2048 :].reshape(32, 32) / 255
    np.testing.assert_allclose(image[2].numpy(), (blue - 0.4465) / 0.2616, atol=1e-5)
    inner = tmp_path / "outer" / "cifar-10-batches-bin"
    inner.parent.mkdir()
    inner.symlink_to(folder)
    assert len(load_data(f"cifar10:{tmp_path}/outer").val) == 8


def test_cifar10_as_pickles_is_refused_with_the_fix(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(SourceError, match=r"pickles.*binary version"):
        load_data(f"cifar10:{tmp_path}")


def test_cifar10_cut_off(cifar):
    folder, records = cifar
    (folder / "test_batch.bin").write_bytes(records["test_batch"].tobytes()[:-1])
    with pytest.raises(SourceError, match=r"test_batch\.bin has \d+ bytes"):
        load_data(f"cifar10:{folder}")
    (folder / "data_batch_3.bin").unlink()
    with pytest.raises(SourceError, match="data_batch_3"):
        load_data(f"cifar10:{folder}")


def test_folders_named_by_integers_are_class_indices(tmp_path):
    for name in ("0002", "0010", "7"):
        save_image(tmp_path / name / "a.png")
    data = load_data(f"imagefolder:{tmp_path}", transform=plain)
    assert [data.val[i][1] for i in range(3)] == [2, 7, 10]
    assert data.num_classes == 11
    assert data.train is None
    assert data.input_shape == (1, 3, 4, 4)


def test_other_folder_names_are_numbered_in_sorted_order(tmp_path):
    for name in ("zebra", "ant", "10"):
        save_image(tmp_path / name / "a.jpg")
    (tmp_path / "ant" / "notes.txt").write_text("not an image")
    data = load_data(f"imagefolder:{tmp_path}", transform=plain)
    assert {p.parent.name: c for p, c in data.val.samples} == {"10": 0, "ant": 1, "zebra": 2}


def test_train_and_val_share_their_classes(tmp_path):
    for name in ("a", "b", "c"):
        save_image(tmp_path / "train" / name / "x.png")
    for name in ("a", "c"):
        save_image(tmp_path / "val" / name / "x.png")
    data = load_data(f"imagefolder:{tmp_path}", transform=plain)
    assert [data.val[i][1] for i in range(2)] == [0, 2]  # not 0, 1
    assert len(data.train) == 3
    save_image(tmp_path / "val" / "d" / "x.png")
    with pytest.raises(SourceError, match="train does not have: d"):
        load_data(f"imagefolder:{tmp_path}", transform=plain)


def test_the_default_transform_is_imagenets(tmp_path):
    Image.fromarray(np.full((300, 400, 3), 128, np.uint8)).save(tmp_path / "x.png")
    (tmp_path / "3").mkdir()
    (tmp_path / "x.png").rename(tmp_path / "3" / "x.png")
    data = load_data(f"imagefolder:{tmp_path}")
    image, label = data.val[0]
    assert (label, image.shape) == (3, (3, 224, 224))
    want = (128 / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(image.mean((1, 2)).numpy(), want, atol=1e-4)


def test_images_in_other_modes_become_rgb(tmp_path):
    for i, mode in enumerate(("L", "P", "RGBA", "CMYK")):
        (tmp_path / str(i)).mkdir()
        Image.new(mode, (8, 8)).save(tmp_path / str(i) / f"x.{'tif' if mode == 'CMYK' else 'png'}")
    data = load_data(f"imagefolder:{tmp_path}", transform=plain)
    assert all(x.shape == (3, 4, 4) for x, _ in (data.val[i] for i in range(4)))


def test_a_corrupt_image_is_named_when_it_is_read(tmp_path):
    save_image(tmp_path / "0" / "good.png")
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)).save(buffer, "PNG")
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "cut.png").write_bytes(buffer.getvalue()[:2000])
    (tmp_path / "2").mkdir()
    (tmp_path / "2" / "no_image.jpg").write_text("hello")
    data = load_data(f"imagefolder:{tmp_path}", transform=plain)
    assert data.val[0][1] == 0
    for index, name in ((1, r"cut\.png"), (2, r"no_image\.jpg")):
        with pytest.raises(SourceError, match=name) as e:
            data.val[index]
        assert "\n" not in str(e.value)


def test_bad_folders(tmp_path):
    with pytest.raises(SourceError, match="no folder"):
        load_data(f"imagefolder:{tmp_path}/nowhere")
    with pytest.raises(SourceError, match="empty"):
        load_data(f"imagefolder:{tmp_path}")
    (tmp_path / "cat").mkdir()
    with pytest.raises(SourceError, match="holds no images"):
        load_data(f"imagefolder:{tmp_path}")
    save_image(tmp_path / "flat" / "x.png")
    with pytest.raises(SourceError, match="no folder for each class"):
        load_data(f"imagefolder:{tmp_path}/flat")
    (tmp_path / "file").write_text("")
    with pytest.raises(SourceError, match="not a folder"):
        load_data(f"imagefolder:{tmp_path}/file")
    save_image(tmp_path / "half" / "train" / "a" / "x.png")
    with pytest.raises(SourceError, match="no class folders in val"):
        load_data(f"imagefolder:{tmp_path}/half")
    save_image(tmp_path / "twice" / "01" / "x.png")
    save_image(tmp_path / "twice" / "1" / "x.png")
    with pytest.raises(SourceError, match="same index"):
        load_data(f"imagefolder:{tmp_path}/twice")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("digts", "did you mean 'digits'"),
        ("imagefolder", "needs a path"),
        ("cifar10:", "needs a path"),
        ("imagefoldr:there", "did you mean 'imagefolder'"),
        ("digits:there", "unknown data"),
        ("nowhere.nothing:make", "no module 'nowhere'"),
    ],
)
def test_bad_data_specs(spec, message):
    with pytest.raises(SourceError, match=message):
        load_data(spec)


FACTORY = """
import torch
from torch.utils.data import TensorDataset
from gossamer.sources import Data
def sets(n=6):
    d = TensorDataset(torch.zeros(n, 2, 5), torch.arange(n))
    return d, d
def one():
    return sets()[1]
def whole():
    return Data("x", None, one(), 6, (1, 2, 5))
def nothing():
    return 3
def empty():
    return sets(0)[1]
"""


def test_factories(tmp_path):
    file = tmp_path / "mydata.py"
    file.write_text(FACTORY)
    assert len(load_data(f"{file}:sets?n=4").train) == 4
    assert load_data(f"{file}:one").train is None
    data = load_data(f"{file}:whole", seed=9)
    assert (data.num_classes, data.input_shape, data.seed, data.name) == (6, (1, 2, 5), 9, f"{file}:whole")
    for name, message in (("nothing", "returned a int"), ("empty", "no samples")):
        with pytest.raises(SourceError, match=message):
            load_data(f"{file}:{name}")


def small_data() -> Data:
    dataset = torch.utils.data.TensorDataset(torch.arange(20.0)[:, None], torch.arange(20))
    return Data("small", dataset, dataset, 20, (1, 1))


def test_loaders_are_shuffled_by_the_seed_alone():
    def order(seed: int) -> list[int]:
        return torch.cat([y for _, y in small_data().loader("train", batch_size=6, shuffle=True, seed=seed)]).tolist()

    torch.manual_seed(1)
    first = order(3)
    torch.manual_seed(2)
    assert order(3) == first
    assert order(4) != first
    assert sorted(first) == list(range(20))
    assert [len(y) for _, y in small_data().loader("train", batch_size=6, drop_last=True)] == [6, 6, 6]


def test_splits_and_labels_are_checked():
    data = small_data()
    data.check(20)
    with pytest.raises(SourceError, match="num_classes=20"):
        data.check(10)
    with pytest.raises(SourceError, match="did you mean 'train'"):
        data.loader("trian")
    with pytest.raises(SourceError, match="no training split"):
        Data("x", None, data.val, 20, (1, 1)).loader("train")


def test_the_photographs(photos):
    data = load_data(f"imagefolder:{photos / 'val'}")
    assert (len(data.val), data.num_classes, data.input_shape) == (400, 999, (1, 3, 224, 224))
    path, label = data.val.samples[0]
    assert int(path.parent.name) == label
