"""PyTorch files without PyTorch: the tensors of torch.save bit by bit, and no code of malicious pickles."""

import argparse
import collections
import copy
import io
import json
import os
import pathlib
import pickle
import pickletools
import re
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import warnings
import zipfile

import numpy as np
import pytest
import torch

from ast_jax.checkpoints.pytorch import files
from ast_jax.checkpoints.pytorch.files import read_torch_file, write_torch_file
from ast_jax.checkpoints.tree import CheckpointError

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
          torch.int8, torch.uint8, torch.bool]  # fmt: skip
FORMATS = {"zip": {}, "old": {"_use_new_zipfile_serialization": False}}
VARIANTS = FORMATS | {f"{name} {n}": way | {"pickle_protocol": n} for name, way in FORMATS.items() for n in range(2, 6)}
BOTH = pytest.mark.parametrize("way", FORMATS.values(), ids=FORMATS)


def random_bits(dtype, *shape, seed=0):
    data = torch.from_numpy(np.frombuffer(np.random.default_rng(seed).bytes(8 * 999), np.uint8).copy())
    data = (data % 2 == 0) if dtype is torch.bool else data.view(dtype)
    return data[: int(np.prod(shape))].clone().reshape(shape)


def a_state():
    base = torch.arange(60.0).reshape(3, 4, 5) + 0.1
    return {f"all.{dtype}": random_bits(dtype, 3, 7) for dtype in DTYPES} | {
        "base": base, "tied": base, "rows": base[1:, :2], "transposed": base.permute(2, 0, 1),
        "stepped": base[:, ::2, 1::3], "parameter": torch.nn.Parameter(base[0]), "scalar": torch.tensor(7),
        "expanded": torch.tensor([1.0, 2.0]).view(2, 1).expand(2, 3), "empty": torch.zeros(0, 3), "größe": base[2, 1],
    }  # fmt: skip


def assert_same(got, want):
    assert list(got) == list(want)
    for name, tensor in want.items():
        assert str(got[name].dtype) == str(tensor.dtype).removeprefix("torch."), name
        assert got[name].shape == tuple(tensor.shape), name
        bits = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert got[name].tobytes() == bits, name
        assert not (got[name].size and got[name].flags.writeable), name


def is_plain(text):  # one short line without control characters
    return text.isprintable() and len(text) < 600


def refusal(path):
    with pytest.raises(CheckpointError) as caught:
        read_torch_file(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "expected" in text
    assert is_plain(text), text[:1000]
    return text


# ---- hand-made files: any pickle, in either container

Storage = collections.namedtuple("Storage", "key")
FLOATS = np.arange(4, dtype=np.float32).tobytes()


class Tensor:
    """Pickle a tensor like torch.save, with these values for its fields."""

    def __init__(self, offset=0, shape=(4,), strides=(1,), key="0"):
        self.arguments = Storage(key), offset, shape, strides, False, collections.OrderedDict()

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.arguments


class Pickler(pickle.Pickler):
    def persistent_id(self, thing):
        return ("storage", torch.FloatStorage, thing.key, "cuda:0", 4) if isinstance(thing, Storage) else None


def pickled(content):
    Pickler(file := io.BytesIO(), 2).dump(content)
    return file.getvalue()


def zipped(path, data, storages=(FLOATS,), change=lambda archive: None, root="archive", method=0, **records):
    with zipfile.ZipFile(path, "w", method) as archive:
        records = {"data.pkl": data} | records | {f"data/{key}": storage for key, storage in enumerate(storages)}
        for name, record in records.items():
            archive.writestr(f"{root}/{name}", record)
        change(archive)
    return path


def old(path, data, storages=(FLOATS,), keys=None):
    head = pickled(files.LEGACY_MAGIC) + pickled(1001) + pickled({"little_endian": True})
    keys = keys or pickled([str(key) for key in range(len(storages))])
    path.write_bytes(head + data + keys + b"".join(struct.pack("<q", len(each) // 4) + each for each in storages))
    return path


MAKERS = pytest.mark.parametrize("make", [zipped, old])
GOOD = pickled({"w": Tensor()})

# ---- reading in a subprocess: crashes, time and memory

READ = """
import json, os, resource, sys
sys.modules["torch"] = None  # importing it fails
from ast_jax.checkpoints.tree import CheckpointError
from ast_jax.checkpoints.pytorch.files import read_torch_file
def private():
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))
os.chdir(sys.argv[1])
room = 4096 * int(open("/proc/self/statm").read().split()[0]) + (1 << 31)
outcomes = {}
for name in ["missing", *sorted(os.listdir())]:
    there, here = os.pipe()
    if not (child := os.fork()):
        for limit, most in ("RLIMIT_CPU", 10), ("RLIMIT_AS", room), ("RLIMIT_CORE", 0):
            resource.setrlimit(getattr(resource, limit), (most, most))
        before = private()
        try:
            arrays = read_torch_file(name)
            said = ["read", "", private() - before, sum(len(array.tobytes()) for array in arrays.values())]
        except (CheckpointError, OSError) as error:
            said = [type(error).__name__, str(error)[:5000], type(error.__cause__).__name__]
        except BaseException as error:
            said = ["raised", repr(error)[:5000]]
        os.write(here, json.dumps(said).encode())
        os._exit(0)
    os.close(here)
    _, status, use = os.wait4(child, 0)
    said = json.loads(os.read(there, 1 << 16) or '["killed", "by signal %d"]' % status)
    os.close(there)
    outcomes[name] = said, use.ru_utime + use.ru_stime, use.ru_maxrss / 1024
assert not [name for name in sys.modules if name.startswith("torch.")]
print(json.dumps(outcomes))
"""


def read_apart(folder, seconds, megabytes):
    """Return {file: outcome}; no file may crash the process, take long, or give a message of several lines."""
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(files.__file__).parents[3])}
    command = [sys.executable, "-W", "ignore", "-c", READ, folder]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    outcomes = json.loads(run.stdout)
    base, bad = outcomes.pop("missing")[2], {}
    for name, (said, took, peak) in outcomes.items():
        tame = said[0] in ("read", "CheckpointError", "OSError") and is_plain(said[1])
        if not tame or said[-1] in ("MemoryError", "RecursionError") or took > seconds or peak - base > megabytes:
            bad[name] = said[0], said[1][:300], f"{took:.1f} s, {peak - base:.0f} MB"
    assert not bad, "\n".join(f"{name}: {what}" for name, what in bad.items())
    return {name: said for name, (said, _, _) in outcomes.items()}


# ---- files of torch.save


@pytest.mark.parametrize("variant", [*VARIANTS, "without checksums"])
def test_equals_torch(tmp_path, variant):
    path, before = tmp_path / "model.pth", torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(variant in VARIANTS and before)
    try:
        torch.save(a_state(), path, **VARIANTS.get(variant, {}))
    finally:
        torch.serialization.set_crc32_options(before)
    got = read_torch_file(path)
    assert_same(got, torch.load(path, weights_only=False))  # weights_only warns of protocols above 2
    assert all(np.shares_memory(got["base"], got[name]) for name in ("tied", "rows", "transposed", "stepped", "größe"))
    assert not np.shares_memory(got["base"], got["expanded"])
    assert got["expanded"].strides == (4, 0)


def test_big_endian(tmp_path):
    state = {str(dtype): random_bits(dtype, 5, 3) for dtype in DTYPES} | {"base": torch.arange(6.0)}
    state["part"] = state["base"][2:]
    torch.save(state, little := io.BytesIO())
    kinds = [f"u{tensor.dtype.itemsize}" for tensor in state.values()]  # the storages are saved in this order
    with zipfile.ZipFile(little) as source, zipfile.ZipFile(tmp_path / "model.pth", "w") as target:
        for name in source.namelist():
            data = b"big" if name.endswith("/byteorder") else source.read(name)
            if "/data/" in name:
                data = np.frombuffer(data, kinds[int(name.rpartition("/")[2])]).byteswap().tobytes()
            target.writestr(name, data)
    got = read_torch_file(tmp_path / "model.pth")
    assert_same(got, torch.load(tmp_path / "model.pth"))
    assert np.shares_memory(got["base"], got["part"])


def test_old_files_of_big_endian_machines(tmp_path):
    path = tmp_path / "model.pth"
    torch.save(a_state(), path, **FORMATS["old"])
    data, changes = re.subn(rb"(little_endianq.)\x88", b"\\1\x89", path.read_bytes())
    assert changes == 1
    path.write_bytes(data)
    assert_same(read_torch_file(path), torch.load(path))  # PyTorch swaps when it writes this format


@BOTH
@pytest.mark.parametrize("wrapper", ["", "state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("best", [0.9, torch.tensor(0.9)])
def test_training_checkpoints(tmp_path, way, wrapper, best):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.AdamW(model.parameters())  # its state contains tensors too
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    content = {"best": best, wrapper: model.state_dict(), "optimizer": optimizer.state_dict(), "lr": [1, {"x": (2,)}]}
    torch.save(content if wrapper else content[wrapper], tmp_path / "model.pth", **way)
    assert content[wrapper]._metadata  # an attribute of an ordered dict
    assert_same(read_torch_file(tmp_path / "model.pth"), content[wrapper])


def test_allocates_no_memory_and_imports_no_torch(tmp_path):
    for name, way in FORMATS.items():
        torch.save({str(key): torch.ones(1 << 20) for key in range(10)}, tmp_path / name, **way)
    for said in read_apart(tmp_path, seconds=5, megabytes=100).values():
        assert said[2] < 3  # of 40
        assert said[3] == 40 << 20


# ---- refused files


class Call:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@BOTH
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("function", [os.system, eval, exec, subprocess.Popen])
def test_executes_nothing(tmp_path, way, function, protocol):
    path, marker = tmp_path / "model.pth", tmp_path / "marker"
    written = {os.system: f"touch {marker}", subprocess.Popen: ["touch", str(marker)]}
    call = Call(function, written.get(function, f"open({str(marker)!r}, 'w').close()"))
    torch.save({"w": torch.ones(2), "x": call}, path, pickle_protocol=protocol, **way)
    text = refusal(path)
    assert f".{function.__name__} in the pickle, which was not run" in text
    assert "torch.save(model.state_dict(), …)" in text
    assert not marker.exists()
    ran = torch.load(path, weights_only=False)["x"]  # with PyTorch the code would run
    getattr(ran, "wait", int)()
    assert marker.exists()


ORDERED = b"ccollections\nOrderedDict\n"
PICKLES = {
    b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.": "posix.system",
    b"\x80\x02cos\nsystem\n.": "os.system",
    b"\x80\x04\x8c\x03os\n\x8c\x01a\x93.": "got os",  # a line break in a name
    b"\x80\x04\x8c\x03\x1b[2\x8c\x01a\x93.": "[2",  # a name with a terminal escape sequence
    b"\x80\x04X\x20\x4e\0\0" + b"n" * 20000 + b"\x8c\x01a\x93.": "nnn",
    b"\x80\x04(\x8c\x04trueios\nsystem\n.": "INST",
    b"\x80\x02(" + ORDERED + b"o.": "OBJ",
    b"\x80\x02" + ORDERED + b")\x81.": "NEWOBJ",
    b"\x80\x04" + ORDERED + b")}\x92.": "NEWOBJ_EX",
    b"\x80\x02\x82\x01.": "EXT1",
    b"\x80\x02" + ORDERED + b"}b.": "instead of a dict",  # would set attributes of the class
    b"\x80\x02]}b.": "instead of a dict",
    b"\x80\x02]]R.": "instead of a global",
    b"\x80\x02ctorch\nFloatStorage\n)R.": "torch.FloatStorage",
    b"\x80\x02" + ORDERED + b"K\x01\x85R.": "instead of a list",
    b"\x80\x03C\x01a.": "BINBYTES",
    b"\x80\x02P0\n.": "PERSID",
    b"\x80\x02}": "",  # no STOP
    b"\x80\x02.": "",
}  # fmt: skip


@MAKERS
@pytest.mark.parametrize("data", PICKLES, ids=lambda data: repr(data[:40]))
def test_refuses_pickles(tmp_path, make, data):
    assert PICKLES[data] in refusal(make(tmp_path / "model.pth", data))


CONTENTS = [
    (torch.nn.Linear(2, 2), "torch.nn.modules"),
    ({"model": {"w": torch.ones(2)}, "args": argparse.Namespace(lr=1)}, "argparse.Namespace"),
    ({"w": torch.ones(2), "best": np.float64(0.9)}, "multiarray.scalar"),
    ({"w": torch.ones(2, dtype=torch.complex64)}, "torch.ComplexFloatStorage"),
    ({"w": torch._neg_view(torch.ones(2))}, ""),  # the storage has the opposite sign
    ({"w": torch.ones(2), "n\n" * 999: 3}, "int"),
    ({"epoch": 3, "line\nbreak" * 99: None}, "epoch"),
    ({"w": torch.ones(2), 3: torch.ones(2)}, "3"),
    ([torch.ones(2)], "list"),
    ({}, "dict"),
]


@BOTH
@pytest.mark.parametrize(("content", "found"), CONTENTS, ids=range(len(CONTENTS)))
def test_refuses_other_contents(tmp_path, way, content, found):
    torch.save(content, tmp_path / "model.pth", **way)
    text = refusal(tmp_path / "model.pth")
    assert found in text
    assert "torch.save(model.state_dict(), …)" in text


def test_refuses_torchscript(tmp_path):
    with warnings.catch_warnings(action="ignore"):  # deprecated
        torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "model.pt")
    assert "TorchScript" in refusal(tmp_path / "model.pt")


def gigabyte(archive):  # the directory is written after this
    archive.filelist[-1].compress_type, archive.filelist[-1].file_size = zipfile.ZIP_DEFLATED, 1 << 30


def in_one_place(archive, times=1):
    for key in range(1, times + 1):
        archive.filelist.append(copy.copy(archive.filelist[-1]))
        archive.filelist[-1].filename = f"archive/data/{key}"


def twice(archive):  # PyTorch would read the first
    with warnings.catch_warnings(action="ignore"):
        archive.writestr("archive/data/0", FLOATS[::-1])


FOREIGN = {
    "empty": lambda path: path.touch(),
    "text": lambda path: path.write_text("Not a model\n"),
    "text like a zip": lambda path: path.write_text("PK is how this text begins\n" * 9),
    "PNG": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256))),
    "pickle": lambda path: path.write_bytes(pickle.dumps({"w": 1})),
    "tar": lambda path: path.write_bytes(tarfile.TarInfo("storages").tobuf() + bytes(1024)),
    "zip": lambda path: zipped(path, GOOD, root="photos/2021"),
    "empty zip": lambda path: path.write_bytes(b"PK\5\6" + bytes(18)),
    "no directory": lambda path: path.write_bytes(zipped(path, GOOD).read_bytes()[:-22]),
    "headers": lambda path: path.write_bytes(zipped(path, GOOD).read_bytes().replace(b"PK\3\4", b"PK\3\5")),
    "deflated": lambda path: zipped(path, GOOD, method=zipfile.ZIP_DEFLATED),
    "bomb": lambda path: zipped(path, GOOD, change=gigabyte),
    "in one place": lambda path: zipped(path, pickled({"w": Tensor(), "v": Tensor(key="1")}), change=in_one_place),
    "one name twice": lambda path: zipped(path, GOOD, change=twice),
    "byte order": lambda path: zipped(path, GOOD, byteorder=b"bug"),  # PyTorch refuses it too
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_refuses_other_files(tmp_path, kind):
    FOREIGN[kind](tmp_path / "model.pth")
    tracemalloc.start()
    try:
        assert {"deflated": "compressed", "bomb": "compressed"}.get(kind, "") in refusal(tmp_path / "model.pth")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_torch_file(tmp_path / "none.pth")
    with pytest.raises(IsADirectoryError):
        read_torch_file(tmp_path)


IMPOSSIBLE = {
    "beyond": {"shape": (5,)}, "offset": {"offset": 1}, "stride": {"strides": (2,)}, "far": {"offset": 2**40},
    "negative size": {"shape": (-4,)}, "two negative sizes": {"shape": (-2, -2), "strides": (1, 1)},
    "negative stride": {"offset": 3, "strides": (-1,)}, "negative offset": {"offset": -1, "shape": (1,)},
    "no strides": {"strides": ()}, "axes": {"shape": (1,) * 70, "strides": (1,) * 70}, "float": {"shape": (4.0,)},
    "expanded": {"shape": (10**12,), "strides": (0,)}, "huge": {"shape": (2**70,), "strides": (0,)},
    "no storage": {"key": "1"}, "odd name": {"key": "a\nb"}, "empty": {"shape": (0, 2**70), "strides": (1, 1)},
}  # fmt: skip


@MAKERS
@pytest.mark.parametrize("figures", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_refuses_impossible_tensors(tmp_path, make, figures):
    got = read_torch_file(make(tmp_path / "good.pth", pickled({"v": Tensor(), "w": Tensor(1, (2,), (2,))})))
    assert (got["v"].tolist(), got["w"].tolist()) == ([0, 1, 2, 3], [1, 3])
    assert "damaged" in refusal(make(tmp_path / "bad.pth", pickled({"v": Tensor(), "w": Tensor(**figures)})))


@BOTH
def test_refuses_truncated_files(tmp_path, way):
    path = tmp_path / "model.pth"
    torch.save(a_state(), path, **way)
    data = path.read_bytes()
    for length in [*range(0, len(data), 61), len(data) - 1]:
        path.write_bytes(data[:length])
        refusal(path)


def test_refuses_flipped_bits(tmp_path):
    path, weight = tmp_path / "model.pth", random_bits(torch.float32, 50)
    torch.save({"w": weight}, path)
    data = path.read_bytes()
    start = data.index(weight.numpy().tobytes())
    for place in range(start, start + 200, 7):
        path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        assert "checksum" in refusal(path)


# ---- small files that would take very long, or all memory


def shaped(shape):  # from these pickle opcodes
    return pickled({"w": Tensor(shape=None)}).replace(b"K\0N", b"K\0" + shape, 1)


def directory(path, entries):
    data = zipped(path, GOOD).read_bytes()
    start, (size, place) = data.rindex(b"PK\1\2"), struct.unpack("<II", data[-10:-2])
    size += (len(data) - 22 - start) * (entries - 1)
    path.write_bytes(data[:start] + data[start:-22] * entries + data[-22:-10] + struct.pack("<IIH", size, place, 0))


def test_files_that_exhaust_time_or_memory(tmp_path):
    room = files.MAX_PICKLE_BYTES - 300
    equal = [k * (2**61 - 1) for k in range(room // 27)]  # hash values
    big = b"\x8b" + struct.pack("<i", room - 99) + b"\1" * (room - 99)
    names = [b"\x8c\5%05x" % k for k in range(room // 9)]
    for name, data in {
        "sizes": shaped(b"(" + b"K\xff" * (room // 2) + b"t"),
        "big sizes": shaped(b"(" + big + b"q\1" + b"h\1" * 20 + b"t"),
        "doubled sizes": shaped(b"N" + b"q\1h\1\x86" * 40),
        "keys": b"\x80\2}(" + b"".join(b"\x8a\x0b" + k.to_bytes(11, "little") + b"N" for k in equal) + b"u.",
        "memo": b"\x80\2N" + b"".join(b"p%d\n" % k for k in equal) + b".",
        "marks": b"\x80\2" + b"(" * room + b".",
        "dicts": b"\x80\2(" + b"}" * room + b"t.",
        "nested": b"\x80\2N" + b"\x85" * room + b".",
        "often": pickled(Tensor())[:-1] + b"q\1}(" + b"h\1".join(names) + b"h\1u.",
    }.items():
        zipped(tmp_path / name, data)
    for name, keys in {"nested keys": b"\x85" * (room // 2), "doubled keys": b"q\1h\1\x86" * 40}.items():
        old(tmp_path / name, GOOD, keys=b"\x80\2]N" + keys + b"a.")  # tuples, which a dict would hash
    many = pickled({str(key): Tensor(key=str(key)) for key in range(4000)})
    zipped(tmp_path / "one place", many, [bytes(1 << 24)], change=lambda archive: in_one_place(archive, 4000))
    swapped = pickled({str(key): Tensor() for key in range(300)})
    zipped(tmp_path / "swapped", swapped, [bytes(1 << 22)], byteorder=b"big")
    directory(tmp_path / "directory", 600_000)
    read_apart(tmp_path, seconds=8, megabytes=256)


# ---- fuzz

OPCODES = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]
NUMBERS = [0, 1, 2, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, -1, -(2**31), -(2**63)]


def mutate(rng, data, other, start=0, stop=None):
    data = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        at, length = int(rng.integers(start, stop or len(data))), int(rng.integers(1, 20))
        here, there = int(rng.integers(len(data))), int(rng.integers(len(other)))
        number = struct.pack("<q", NUMBERS[rng.integers(len(NUMBERS))])[: 1 << rng.integers(4)]
        opcode = OPCODES[rng.integers(len(OPCODES))]
        new = [b"", rng.bytes(1), rng.bytes(length), data[here:][:length], other[there:][:length], opcode, number]
        new = new[rng.integers(len(new))]
        data[at : at + [0, len(new), len(new), length][rng.integers(4)]] = new
    return bytes(data[: rng.integers(len(data)) if rng.random() < 0.05 else None])


def mutants(seed, count):
    """Yield mutated files of both formats; half of the archives have correct checksums."""
    rng = np.random.default_rng(seed)
    state = {name: tensor for name, tensor in a_state().items() if not name.startswith("all")}
    sources = []
    for protocol, content in {2: state, 4: {"model": state, "epoch": 3}}.items():
        for way in FORMATS.values():
            torch.save(content, file := io.BytesIO(), pickle_protocol=protocol, **way)
            sources.append(file.getvalue())
    for number in range(count):
        archive, older = sources[number // 4 % 2 * 2 :][:2]
        if number % 4 == 0:
            yield mutate(rng, archive, older, rng.choice([0, archive.index(b"PK\1\2")]))
        elif number % 4 == 1:
            yield mutate(rng, older, archive, stop=len(older) - rng.choice([0, 600]))
        else:
            with zipfile.ZipFile(io.BytesIO(archive)) as source, zipfile.ZipFile(file := io.BytesIO(), "w") as target:
                for name in source.namelist():
                    data = source.read(name)
                    target.writestr(name, mutate(rng, data, older) if name.endswith("data.pkl") else data)
            yield file.getvalue()


LONG = [pytest.param(seed, 2000, marks=pytest.mark.slow) for seed in (3, 4, 5)]


@pytest.mark.parametrize(("seed", "count"), [(0, 240), (1, 240), (2, 240), *LONG])
def test_fuzz(tmp_path, seed, count):
    for number, data in enumerate(mutants(seed, count)):
        (tmp_path / f"{number:05}").write_bytes(data)
    outcomes = read_apart(tmp_path, seconds=1, megabytes=16)
    kinds = collections.Counter(said[0] for said in outcomes.values())
    assert kinds.total() == count
    assert kinds["read"] > count / 20  # else the mutations are too strong
    assert len({said[1].partition(": ")[2][:150] for said in outcomes.values()}) > 30  # else all fail in the same way


# ---- writing


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_writes_what_torch_reads(tmp_path, dtype):
    path = tmp_path / "model.pth"
    want = {
        "größe.重み": random_bits(dtype, 5, 7), "one": random_bits(dtype, 1, seed=1), "0-d": random_bits(dtype),
        "empty": random_bits(dtype, 2, 0, 3), "transposed": random_bits(dtype, 3, 4, 5).permute(2, 0, 1),
        "stepped": random_bits(dtype, 9, 9)[1::3, ::2], "expanded": random_bits(dtype, 1, 3).expand(4, 3),
    }  # fmt: skip
    torch.save(want, tmp_path / "torch.pth")
    write_torch_file(path, read_torch_file(tmp_path / "torch.pth"))  # with the same strides
    assert_same(read_torch_file(path), want)
    for mapped in (False, True):
        got = torch.load(path, weights_only=True, mmap=mapped)
        assert type(got) is collections.OrderedDict
        assert_same(read_torch_file(path), got)
        assert all(tensor.is_contiguous() for tensor in got.values())
        places = [tensor.untyped_storage().data_ptr() for tensor in got.values() if tensor.numel()]
        assert len(set(places)) == len(places)
        assert not (mapped and any(place % 64 for place in places))
