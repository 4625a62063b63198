"""The CIFAR reader and its download, on miniatures in the official format and, where they are, on the real files."""

import dataclasses
import hashlib
import http.server
import io
import os
import pickle
import re
import struct
import tarfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cbl import config, data, longtail
from cbl.data import augment, cifar
from cbl.errors import UserError

REAL = Path(os.environ.get("CBL_DATA", Path(__file__).parents[1] / "data"))
PER_FILE = {"cifar10": 60, "cifar100": 200}  # images in a miniature file


def python2_pickle(value: object) -> bytes:
    """As Python 2 pickled the official files: byte strings everywhere, numpy under its old module name."""

    def dump(v: object) -> bytes:
        if isinstance(v, bytes):
            return b"T" + struct.pack("<i", len(v)) + v
        if isinstance(v, int):
            return b"J" + struct.pack("<i", v)
        if isinstance(v, list):
            return b"](" + b"".join(map(dump, v)) + b"e"
        if isinstance(v, dict):
            return b"}(" + b"".join(dump(k) + dump(w) for k, w in v.items()) + b"u"
        empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(" + dump(0) + b"t" + dump(b"b") + b"tR"
        dtype = b"cnumpy\ndtype\n(" + dump(b"u1") + dump(0) + dump(1) + b"tR("
        dtype += dump(3) + dump(b"|") + b"NNN" + dump(-1) + dump(-1) + dump(0) + b"tb"
        shape = b"(" + b"".join(map(dump, v.shape)) + b"t"
        return empty + b"(" + dump(1) + shape + dtype + b"\x89" + dump(v.tobytes()) + b"tb"

    return b"\x80\x02" + dump(value) + b"."


def miniature(key: str, seed: int = 0) -> dict[str, bytes]:
    """File name → content, with random images; every class has images in every training file."""
    archive, rng, n = cifar.ARCHIVES[key], np.random.RandomState(seed), PER_FILE[key]
    files = {}
    for name in (*archive.train, archive.test):
        fields = {b"data": rng.randint(0, 256, (n, 3072)).astype(np.uint8), b"batch_label": b"a miniature"}
        if key == "cifar10":
            fields[b"labels"] = [int(c) for c in rng.permutation(n) % 10]
        else:
            fields[b"fine_labels"] = [int(c) for c in rng.permutation(n) % 100]
            fields[b"coarse_labels"] = [c // 5 for c in fields[b"fine_labels"]]
        files[name] = python2_pickle(fields)
    names = {b"label_names": 10} if key == "cifar10" else {b"fine_label_names": 100, b"coarse_label_names": 20}
    files[archive.meta] = python2_pickle({k: [b"class %d" % c for c in range(count)] for k, count in names.items()})
    return files


def tar_of(files: dict[str, bytes], folder: str) -> bytes:
    """The archive, with members that nobody asked for and that must not be written."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        link = tarfile.TarInfo(f"{folder}/readme.html")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        for name, content in {"../../escaped": b"x", **{f"{folder}/{k}": v for k, v in files.items()}}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return out.getvalue()


def publish(monkeypatch, key: str, files: dict[str, bytes], tar: bytes = b"", url: str = "http://127.0.0.1:9/") -> None:
    """From here on the reader takes `files` for the published ones."""
    archive = dataclasses.replace(
        cifar.ARCHIVES[key],
        url=url,
        md5=hashlib.md5(tar).hexdigest(),
        files={name: hashlib.md5(content).hexdigest() for name, content in files.items()},
    )
    monkeypatch.setitem(cifar.ARCHIVES, key, archive)


@pytest.fixture
def unpacked(monkeypatch, tmp_path):
    """Root folder with both miniatures in place."""
    for key in cifar.ARCHIVES:
        files = miniature(key)
        publish(monkeypatch, key, files)
        folder = tmp_path / cifar.ARCHIVES[key].folder
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
    return tmp_path


@pytest.fixture
def server():
    """Serves `server.content`; `server.asked` counts the requests, `server.cut` ends the answer too early."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            httpd.asked += 1
            self.send_response(200)
            self.send_header("Content-Length", str(len(httpd.content)))
            self.end_headers()
            time.sleep(httpd.delay)
            self.wfile.write(httpd.content[: len(httpd.content) // 2] if httpd.cut else httpd.content)

        def log_message(self, *_):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.content, httpd.asked, httpd.cut, httpd.delay = b"", 0, False, 0.0  # delay in seconds
    httpd.url = f"http://127.0.0.1:{httpd.server_port}/cifar.tar.gz"
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield httpd
    httpd.shutdown()
    thread.join()
    httpd.server_close()


@pytest.fixture
def online(monkeypatch, server):
    """The CIFAR-10 miniature is published on `server`; gives its files."""
    files = miniature("cifar10")
    server.content = tar_of(files, cifar.ARCHIVES["cifar10"].folder)
    publish(monkeypatch, "cifar10", files, server.content, server.url)
    return files


def left_behind(root: Path) -> list[str]:
    """What is under root besides the lock."""
    return sorted(path.name for path in root.iterdir() if not path.name.endswith(".lock"))


def files_under(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (root / "cifar-10-batches-py").iterdir()}


# ---------------------------------------------------------------------------------------------- reading


def test_planes_become_pixels_and_files_are_joined_in_order(unpacked):
    source = cifar.read("cifar10_lt", str(unpacked), download=False)
    n = PER_FILE["cifar10"]
    rng = np.random.RandomState(0)
    stored, labels = [], []
    for _ in range(6):  # as `miniature` draws them
        stored.append(rng.randint(0, 256, (n, 3072)).astype(np.uint8))
        labels += (rng.permutation(n) % 10).tolist()
    stored = np.concatenate(stored)
    images = torch.cat([source.train_images, source.test_images]).numpy()
    assert images.shape == (6 * n, 32, 32, 3) and images.dtype == np.uint8
    for i, y, x, c in np.random.RandomState(1).randint(0, (6 * n, 32, 32, 3), (200, 4)):
        assert images[i, y, x, c] == stored[i, 1024 * c + 32 * y + x]
    assert torch.cat([source.train_labels, source.test_labels]).tolist() == labels
    assert source.train_file.tolist() == [k for k in range(5) for _ in range(n)]
    assert source.class_names == tuple(f"class {c}" for c in range(10))


def test_cifar20_is_cifar100_with_coarse_labels(unpacked):
    fine = cifar.read("cifar100_lt", str(unpacked), download=False)
    coarse = cifar.read("cifar20_lt", str(unpacked), download=False)
    assert coarse.train_images.data_ptr() == fine.train_images.data_ptr()
    assert torch.equal(coarse.train_labels, fine.train_labels // 5)
    assert torch.equal(coarse.test_labels, fine.test_labels // 5)
    assert (len(fine.class_names), len(coarse.class_names)) == (100, 20)


def test_images_are_read_once_per_process(unpacked, monkeypatch):
    first = cifar.read("cifar10_lt", str(unpacked), download=False)
    monkeypatch.chdir(unpacked.parent)
    again = cifar.read("cifar10_lt", unpacked.name, download=True)
    assert again.train_images.data_ptr() == first.train_images.data_ptr()


def test_a_missing_file_is_named_with_its_source(unpacked):
    gone = unpacked / "cifar-100-python" / "test"
    gone.unlink()
    url = cifar.ARCHIVES["cifar100"].url
    with pytest.raises(UserError, match=f"looked for {re.escape(str(gone))}; set dataset.download=true.*{url}"):
        cifar.read("cifar20_lt", str(unpacked), download=False)
    with pytest.raises(UserError, match="cifar-10-batches-py/data_batch_1 and 6 more files"):
        cifar.read("cifar10_lt", str(unpacked / "elsewhere"), download=False)


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
def test_one_changed_byte_is_found(unpacked, name):
    path = unpacked / "cifar-10-batches-py" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    md5s = f"{hashlib.md5(content).hexdigest()}.*{cifar.ARCHIVES['cifar10'].files[name]}"
    with pytest.raises(UserError, match=f"{re.escape(str(path))} is damaged.*{md5s}.*delete it"):
        cifar.read("cifar10_lt", str(unpacked), download=False)


def test_a_pickle_that_wants_to_run_code_may_not(monkeypatch, unpacked):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(unpacked / "owned"),)

    files = miniature("cifar10") | {"batches.meta": pickle.dumps(Evil())}
    (unpacked / "cifar-10-batches-py" / "batches.meta").write_bytes(files["batches.meta"])
    publish(monkeypatch, "cifar10", files)
    with pytest.raises(pickle.UnpicklingError, match="mkdir"):
        cifar.read("cifar10_lt", str(unpacked), download=False)
    assert not (unpacked / "owned").exists()


def test_pickles_of_todays_numpy_are_read_too():
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    got = cifar._Unpickler(io.BytesIO(pickle.dumps({b"data": array})), encoding="bytes").load()
    np.testing.assert_array_equal(got[b"data"], array)


# ------------------------------------------------------------------------------------------- downloading


def test_download_brings_the_files_and_nothing_else(online, server, tmp_path, capsys):
    root = tmp_path / "not" / "there" / "yet"
    source = cifar.read("cifar10_lt", str(root), download=True)
    assert len(source.train_labels) == 5 * PER_FILE["cifar10"]
    assert files_under(root) == online and left_behind(root) == ["cifar-10-batches-py"]
    assert not list(tmp_path.rglob("escaped"))
    told = capsys.readouterr()
    assert told.out == "" and server.url in told.err and told.err.endswith(" 100%\n")
    cifar.read("cifar10_lt", str(root), download=True)
    assert server.asked == 1


def test_a_deleted_file_is_fetched_again_and_the_others_stay(online, tmp_path):
    cifar.read("cifar10_lt", str(tmp_path), download=True)
    folder = tmp_path / "cifar-10-batches-py"
    before = {path.name: path.stat().st_ino for path in folder.iterdir()}
    (folder / "data_batch_2").unlink()
    cifar.read("cifar10_lt", str(tmp_path), download=True)
    assert files_under(tmp_path) == online
    after = {path.name: path.stat().st_ino for path in folder.iterdir()}
    assert {name for name in before if before[name] != after[name]} <= {"data_batch_2"}


def test_a_download_cut_short_leaves_nothing_and_can_be_repeated(online, server, tmp_path):
    server.cut = True
    with pytest.raises(UserError, match=re.escape(server.url)):
        cifar.read("cifar10_lt", str(tmp_path), download=True)
    assert left_behind(tmp_path) == []
    server.cut = False
    cifar._in_vain.clear()  # as a minute later
    cifar.read("cifar10_lt", str(tmp_path), download=True)
    assert files_under(tmp_path) == online


def test_another_file_than_the_published_one_is_refused(online, server, tmp_path):
    server.content = b"<html>please log in</html>"
    with pytest.raises(UserError, match="not the published file: 26 bytes with md5"):
        cifar.read("cifar10_lt", str(tmp_path), download=True)
    assert left_behind(tmp_path) == []


def test_what_a_killed_process_left_is_no_obstacle_and_not_taken_as_good(online, tmp_path):
    stale = tmp_path / ".cifar-10-batches-py.download"
    stale.mkdir()
    (stale / "archive.tar.gz").write_bytes(b"half")
    (stale / "data_batch_1").write_bytes(b"half")
    cifar.read("cifar10_lt", str(tmp_path), download=True)
    assert files_under(tmp_path) == online and left_behind(tmp_path) == ["cifar-10-batches-py"]


def test_two_at_once_download_once(online, server, tmp_path):
    server.delay = 0.3
    sources, errors = [], []

    def read() -> None:
        try:
            sources.append(cifar.read("cifar10_lt", str(tmp_path), download=True))
        except Exception as error:
            errors.append(error)

    # flock tells two openings of a file apart, so threads exclude each other as processes do
    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(sources) == 2
    assert server.asked == 1 and files_under(tmp_path) == online


def test_a_download_in_vain_is_not_tried_again_at_once(monkeypatch, tmp_path):
    """Nor for long where it failed at once: then it costs nothing."""
    publish(monkeypatch, "cifar10", miniature("cifar10"))
    asked, clock = [], [100.0]
    monkeypatch.setattr(cifar, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def fetch(archive, root):
        asked.append(clock[0])
        clock[0] += 3
        raise UserError("no network")

    monkeypatch.setattr(cifar, "_fetch", fetch)
    for later in (0, 1, 28, 2, 0):
        clock[0] += later
        with pytest.raises(UserError, match=r"^no network$"):
            cifar.read("cifar10_lt", str(tmp_path), download=True)
    assert asked == [100, 134]  # 3 s in vain: 30 s


def test_without_network_one_line_within_seconds(monkeypatch, tmp_path):
    publish(monkeypatch, "cifar10", miniature("cifar10"))  # nobody listens on port 9
    started = time.monotonic()
    with pytest.raises(
        UserError, match=r"could not be downloaded from http://127.0.0.1:9/ .*refused.*unpack"
    ) as caught:
        cifar.read("cifar10_lt", str(tmp_path), download=True)
    assert time.monotonic() - started < 5 and "\n" not in str(caught.value)
    assert left_behind(tmp_path) == []


def test_a_root_that_is_a_file_is_one_line_too(online, tmp_path):
    (tmp_path / "root").write_text("no folder")
    with pytest.raises(UserError, match="root"):
        cifar.read("cifar10_lt", str(tmp_path / "root"), download=True)


# --------------------------------------------------------------------------------------------- subsets


def test_records_go_file_by_file_and_class_by_class(unpacked):
    dataset = config.Dataset(name="cifar10_lt", imbalance_factor=10.0, root=str(unpacked), download=False)
    d = data.load(dataset)
    assert d.counts.tolist() == longtail.class_counts(10, 10.0, 30).tolist()  # 5 files, 6 of each class in each
    n = PER_FILE["cifar10"]
    want = [
        position
        for file in range(5)
        for label in range(10)
        for position, i in enumerate(d.subset)
        if i // n == file and d.train_labels[i] == label
    ]
    assert d.record_order.tolist() == want
    balanced = data.load(dataclasses.replace(dataset, imbalance_factor=1.0))
    assert balanced.record_order.tolist() == balanced.subset.tolist() == list(range(5 * n))


# ---------------------------------------------------------------------------------- the published files


def real(name: str, factor: float, subset_seed: int = 0) -> data.Data:
    dataset = config.Dataset(
        name=name, imbalance_factor=factor, subset_seed=subset_seed, root=str(REAL), download=False
    )
    return data.load(dataset)


class TestPublishedFiles:
    pytestmark = pytest.mark.data

    def test_labels_and_names(self):
        ten, hundred, twenty = (real(name, 1.0) for name in ("cifar10_lt", "cifar100_lt", "cifar20_lt"))
        for d, per_class in ((ten, 5000), (hundred, 500), (twenty, 2500)):
            assert d.train_images.shape == (50_000, 32, 32, 3) and d.test_images.shape == (10_000, 32, 32, 3)
            assert set(d.train_labels.bincount().tolist()) == {per_class}
            assert set(d.test_labels.bincount().tolist()) == {per_class // 5}
        assert ten.class_names[0] == "airplane" and ten.class_names[9] == "truck"
        assert ten.train_labels[:5].tolist() == [6, 9, 9, 4, 1] and ten.test_labels[:4].tolist() == [3, 8, 8, 0]
        assert hundred.class_names[hundred.train_labels[0]] == "cattle"
        assert twenty.class_names[twenty.train_labels[0]] == "large_omnivores_and_herbivores"

    @pytest.mark.parametrize(
        ("name", "mean", "std"),
        [
            ("cifar10_lt", [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
            ("cifar100_lt", [0.5071, 0.4865, 0.4409], [0.2673, 0.2564, 0.2762]),
        ],
    )
    def test_channel_statistics_are_the_well_known_ones(self, name, mean, std):
        got = augment.channel_statistics(real(name, 1.0).train_images)
        torch.testing.assert_close(got, (torch.tensor(mean), torch.tensor(std)), rtol=0, atol=6e-5)

    @pytest.mark.parametrize(("name", "num_classes"), [("cifar10_lt", 10), ("cifar100_lt", 100)])
    @pytest.mark.parametrize("factor", [10, 100, 200])
    def test_seed_0_is_the_subset_that_later_papers_use(self, name, num_classes, factor):
        d = real(name, float(factor))
        targets = d.train_labels.tolist()
        np.random.seed(0)  # their code: the global generator, seeded once, classes in label order
        kept = set()
        for c in range(num_classes):
            members = np.array([i for i, target in enumerate(targets) if target == c])
            np.random.shuffle(members)
            kept |= set(members[: int(50_000 / num_classes * (1 / factor) ** (c / (num_classes - 1)))].tolist())
        assert set(d.subset.tolist()) == kept and len(d.subset) == len(kept)

    def test_hashes_of_the_subsets_stay_what_they_are(self):
        assert real("cifar10_lt", 100.0).subset_hash == "f7669c469c9ddf9a"
        assert real("cifar100_lt", 200.0).subset_hash == "270547597b0f832b"
        assert real("cifar10_lt", 100.0, subset_seed=1).subset_hash != "f7669c469c9ddf9a"
