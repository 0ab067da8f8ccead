"""Folders saved by Hugging Face's `datasets` to examples and audio, and one-line errors for damaged ones."""

import pickle
import shutil
import subprocess
import sys

import datasets as hf
import numpy as np
import pytest
import soundfile

from ast_jax.audio.io import AudioError, decode
from ast_jax.config import FrontendConfig
from ast_jax.data import hf_folder
from ast_jax.data.datasets import DataError, DatasetConfig, Example, load_example, read_dataset

FRONTEND = FrontendConfig(max_length=8)  # 95 ms
hf.disable_progress_bars()


def write(path, number):
    """Write noise seeded with `number`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.1 * np.random.default_rng(number).standard_normal(1600), 16000)
    return path


def saved(folder, columns, **features):
    """Save columns with `datasets`, whose audio encoders are not installed: audio is given as bytes, then cast."""
    dataset = hf.Dataset.from_dict(columns)
    for name, feature in features.items():
        dataset = dataset.cast_column(name, feature)
    if folder is not None:
        dataset.save_to_disk(folder)
    return dataset


def sounds(folder, count, kind="WAV"):
    paths = [write(folder / f"{number}.{kind.lower()}", number) for number in range(count)]
    return [{"bytes": path.read_bytes(), "path": path.name} for path in paths]


@pytest.fixture
def saved_dict(tmp_path):
    names = hf.ClassLabel(names=["z", "a", "never"])
    splits = {}
    for split, targets in {"train": [0, 1, 0, 1], "valid": [1, 0]}.items():
        columns = {"audio": sounds(tmp_path, len(targets), "FLAC"), "label": targets, "other": [3.5] * len(targets)}
        splits[split] = saved(None, columns, audio=hf.Audio(), label=names)
    hf.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_saved_dataset_dict(saved_dict):
    dataset = read_dataset(saved_dict)
    assert dataset.labels == ("z", "a", "never")
    assert dataset.splits == {
        "train": [Example(saved_dict / "train", (target,), row=row) for row, target in enumerate([0, 1, 0, 1])],
        "validation": [Example(saved_dict / "valid", (target,), row=row) for row, target in enumerate([1, 0])],
        "test": [],
    }
    for row, example in enumerate(dataset.splits["train"]):
        want = decode(saved_dict.parent / f"{row}.flac").samples
        np.testing.assert_array_equal(load_example(example, FRONTEND), want[: FRONTEND.max_samples])


def test_a_row_is_read_in_another_process_from_its_example(saved_dict):
    example = read_dataset(saved_dict).splits["train"][2]
    program = (
        "import pickle, sys; from ast_jax.data.datasets import load_example; from ast_jax.config import FrontendConfig;"
        "example = pickle.load(sys.stdin.buffer);"
        "sys.stdout.buffer.write(load_example(example, FrontendConfig(max_length=8)).tobytes())"
    )
    done = subprocess.run([sys.executable, "-c", program], input=pickle.dumps(example), capture_output=True, check=True)
    np.testing.assert_array_equal(np.frombuffer(done.stdout, np.float32), load_example(example, FRONTEND))


def test_a_saved_dataset_without_splits(tmp_path):
    columns = {
        "sound": sounds(tmp_path, 6),
        "labels": [["b", "a"], ["a"], [], ["b"], ["a"], ["b"]],
        "fold": [1, 1, 2, 2, 3, 3],
        "group": ["p", "q", "p", "q", "r", None],
    }
    saved(tmp_path / "saved", columns, sound=hf.Audio())
    dataset = read_dataset(DatasetConfig(tmp_path / "saved", fold="2"))
    assert dataset.labels == ("a", "b")
    assert dataset.folds == ("1", "2", "3")
    assert [example.targets for example in dataset.splits["train"]] == [(0, 1), (0,), (0,), (1,)]
    assert [example.group for example in dataset.splits["train"]] == ["p", "q", "r", ""]
    assert [example.row for example in dataset.splits["validation"]] == [2, 3]
    assert [example.targets for example in dataset.splits["validation"]] == [(), (1,)]


def test_a_saved_dataset_with_lists_of_classes_and_paths(tmp_path):
    path = write(tmp_path / "far" / "1.wav", 3)

    lists = hf.List(hf.ClassLabel(names=["z", "a"]))
    values = [{"bytes": None, "path": str(path)}, {"bytes": path.read_bytes(), "path": None}]
    columns = {"audio": values, "tags": [[0, 1], [1]]}
    dataset = saved(None, columns, tags=lists, audio=hf.Audio())
    folder = tmp_path / "saved"
    with pytest.MonkeyPatch.context() as patched:  # files are put in by save_to_disk; older versions did not
        patched.setattr(hf.Audio, "embed_storage", lambda self, storage, *_, **__: storage)
        dataset.save_to_disk(folder)
    found = read_dataset(DatasetConfig(folder, validation=folder))
    assert [example.targets for example in found.splits["train"]] == [(0, 1), (1,)]
    assert hf_folder.read_row(folder, 0) == path
    for example in found.splits["train"]:
        np.testing.assert_array_equal(load_example(example, FRONTEND), decode(path).samples[: FRONTEND.max_samples])


@pytest.mark.parametrize(
    ("change", "features", "message"),
    [
        ({"audio": [1, 2]}, {}, "expected one column of type Audio, got none of audio, label; use cast_column"),
        ({"more": [None, None]}, {"more": hf.Audio()}, "expected one column of type Audio, got audio, more of"),
        ({"label": [1, 2]}, {}, r"expected names in the column 'label' \(ClassLabel or string\), got Value\('int64'\)"),
        ({"label": None, "kind": ["a", "b"]}, {}, "expected a column label or labels, or one of type ClassLabel, got"),
        ({"label": ["a", None]}, {}, "row 1: expected labels, got None"),
        ({"label": [0, -1]}, {"label": hf.ClassLabel(names=["a"])}, "row 1: expected labels, got -1"),
    ],
)
def test_saved_datasets_with_other_columns_are_one_line(change, features, message, tmp_path):
    columns = {"audio": sounds(tmp_path, 2), "label": ["a", "b"], **change}
    columns = {name: values for name, values in columns.items() if values is not None}
    if "audio" not in change:
        features = {**features, "audio": hf.Audio()}
    saved(tmp_path / "saved", columns, **features)
    with pytest.raises(DataError, match=message) as caught:
        read_dataset(tmp_path / "saved")
    assert "\n" not in str(caught.value)


def test_damaged_saved_datasets_are_one_line(saved_dict, tmp_path, monkeypatch):
    shutil.copytree(saved_dict / "train", saved_dict / "folds")
    with pytest.raises(DataError, match=r"saved: expected split train, validation, test, got 'folds'"):
        read_dataset(saved_dict)
    shutil.rmtree(saved_dict / "folds")
    for name, content in (("state.json", "{}"), ("dataset_info.json", "{"), ("data-00000-of-00001.arrow", "no table")):
        copy = tmp_path / name
        shutil.copytree(saved_dict, copy)
        (copy / "train" / name).write_text(content)
        with pytest.raises(
            DataError, match=r"train: expected a folder written by save_to_disk, got a damaged one"
        ) as got:
            read_dataset(copy)
        assert "\n" not in str(got.value)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"needs that library: pip install datasets$"):
        read_dataset(saved_dict)


def test_a_row_without_audio(tmp_path):
    values = [*sounds(tmp_path, 1), None, {"bytes": b"no sound", "path": None}]
    saved(tmp_path / "saved", {"audio": values, "label": ["a", "b", "b"]}, audio=hf.Audio())
    _, empty, text = [Example(tmp_path / "saved", (0,), row=row) for row in range(3)]
    with pytest.raises(DataError, match=r"saved, row 1: expected audio, got none$"):
        load_example(empty, FRONTEND)
    with pytest.raises(AudioError, match=r"saved, row 2: not a readable sound file"):
        load_example(text, FRONTEND)
