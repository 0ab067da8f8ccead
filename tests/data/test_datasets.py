"""Data sets of every layout to examples, and one-line errors for damaged ones."""

import csv
import dataclasses
import json
import os
import pathlib

import numpy as np
import pytest
import soundfile

from ast_jax.audio.io import decode
from ast_jax.config import FrontendConfig
from ast_jax.data.datasets import DataError, DatasetConfig, Example, _hold_out, load_example, read_dataset
from ast_jax.labels import audioset_ids, label_set, read_label_ids

FRONTEND = FrontendConfig(max_length=8)  # 95 ms
SPEECH, MAN, WOMAN = "/m/09x0r", "/m/05zppz", "/m/02zsn"  # AudioSet's classes 0, 1 and 2
LABEL_CSV = 'index,mid,display_name\n0,/m/c,"Third, or C"\n1,/m/a,First\n2,/m/b,Second\n3,/m/d,Never\n'


def write(path, number=0, seconds=0.1, rate=16000, **settings):
    """Write noise seeded with `number`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = 0.1 * np.random.default_rng(number).standard_normal(round(seconds * rate))
    soundfile.write(path, samples, rate, **settings)
    return path


def write_all(folder, *names):
    for number, name in enumerate(names):
        write(folder / name, number)


def listed(dataset, folder):
    """Return {relative path: (split, label names)}."""
    return {
        example.path.relative_to(folder).as_posix(): (split, *(dataset.labels[target] for target in example.targets))
        for split, examples in dataset.splits.items()
        for example in examples
    }


def sizes(dataset):
    return {split: len(examples) for split, examples in dataset.splits.items()}


def test_folders_of_splits(tmp_path):
    write_all(tmp_path, "train/a/1.wav", "train/a/deep/2.flac", "train/b/3.wav", "Val/a/4.wav", "test/b/5.wav")
    (tmp_path / "train" / "loose.wav").touch()
    (tmp_path / "README.md").touch()
    (tmp_path / ".git").mkdir()
    dataset = read_dataset(tmp_path)
    assert listed(dataset, tmp_path) == {
        "train/a/1.wav": ("train", "a"),
        "train/a/deep/2.flac": ("train", "a"),
        "train/b/3.wav": ("train", "b"),
        "Val/a/4.wav": ("validation", "a"),
        "test/b/5.wav": ("test", "b"),
    }
    assert dataset.ignored == (tmp_path / "README.md", tmp_path / "train" / "loose.wav")
    assert dataset.notes == dataset.folds == ()


def test_a_class_may_be_called_like_a_split(tmp_path):
    """ESC-50 has a class `train`."""
    write_all(tmp_path, "train/1.wav", "train/2.wav", "ship/3.wav", "ship/4.wav")
    assert read_dataset(tmp_path).labels == ("ship", "train")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("train/a/1.wav", "test/b/1.wav", "extra/c/1.wav"), "got both, 'extra' among the splits; move it away"),
        (("train/a/1.wav", "val/b/1.wav", "valid/b/1.wav"), "one folder per split, got several for 'validation'"),
        (("train/1.wav", "test/2.wav"), "test: expected folders of sound files, one for each class, or a manifest"),
    ],
)
def test_invalid_folders_of_splits(names, message, tmp_path):
    write_all(tmp_path, *names)
    with pytest.raises(DataError, match=message):
        read_dataset(tmp_path)


def test_an_unreadable_folder_is_an_error(tmp_path, monkeypatch):
    write_all(tmp_path, "a/1.wav", "b/2.wav")
    real = os.scandir

    def refuse(path):
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(PermissionError):
        read_dataset(tmp_path)


AUDIOFOLDER = {
    "metadata.csv": "file_name,label,transcription\ntrain/1.wav,a,x\nsounds/2.wav,b,y\nval/3.wav,a,z\n",
    "metadata.jsonl": '{"file_name": "train/1.wav", "label": "a"}\n\n{"file_name": "sounds/2.wav", "labels": ["b"]}\n'
    '{"file_name": "val/3.wav", "label": "a", "extra": [1]}\n',
}


@pytest.mark.parametrize("name", AUDIOFOLDER)
def test_audiofolder_with_metadata(name, tmp_path):
    write_all(tmp_path, "train/1.wav", "sounds/2.wav", "val/3.wav")
    (tmp_path / name).write_text(AUDIOFOLDER[name])
    assert listed(read_dataset(tmp_path), tmp_path) == {
        "train/1.wav": ("train", "a"), "sounds/2.wav": ("train", "b"), "val/3.wav": ("validation", "a"),
    }  # fmt: skip


def test_audiofolder_with_metadata_in_each_split(tmp_path):
    for number, split in enumerate(("train", "dev")):
        write_all(tmp_path / split, "x.wav", "y.wav")
        text = "file_name,label\nx.wav,a\ny.wav,b\n"
        (tmp_path / split / "metadata.csv").write_text(text if number else text.replace(",", "\t"))
    assert listed(read_dataset(tmp_path), tmp_path) == {
        "train/x.wav": ("train", "a"), "train/y.wav": ("train", "b"),
        "dev/x.wav": ("validation", "a"), "dev/y.wav": ("validation", "b"),
    }  # fmt: skip


ROWS = [
    {"path": "1.wav", "label": "Beep, bleep;low", "split": "train", "start": "0.03", "end": "0.08", "group": "g1"},
    {"path": "2.wav", "label": "low", "split": "Valid", "start": "", "end": "0.06", "group": ""},
    {"path": "sub/3.wav", "label": "", "split": "", "start": "0.02", "end": "", "group": "g 2"},
]


def write_manifest(path):
    if path.suffix == ".jsonl":
        lists = [{**row, "label": row["label"].split(";")} for row in ROWS]
        lists[0] |= {"start": 0.03, "end": 0.08}
        lists[1] |= {"start": None, "group": None}
        lists[2]["label"] = []
        path.write_text("".join(json.dumps(row) + "\n" for row in lists))
        return
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ROWS[0], delimiter="," if path.suffix == ".csv" else "\t")
        writer.writeheader()
        writer.writerows(ROWS)


@pytest.mark.parametrize("name", ["manifest.csv", "manifest.tsv", "manifest.jsonl", "list.tab", "list.txt"])
def test_all_manifest_formats_are_equivalent(name, tmp_path):
    write_all(tmp_path, "1.wav", "2.wav", "sub/3.wav")
    write_manifest(tmp_path / name)
    dataset = read_dataset(tmp_path if name.startswith("manifest") else tmp_path / name)
    assert dataset.labels == ("Beep, bleep", "low")
    assert dataset.splits == {
        "train": [
            Example(tmp_path / "1.wav", (0, 1), 0.03, 0.08, group="g1"),
            Example(tmp_path / "sub" / "3.wav", (), 0.02, group="g 2"),
        ],
        "validation": [Example(tmp_path / "2.wav", (1,), 0.0, 0.06)],
        "test": [],
    }
    assert dataset.multi_label


def test_the_first_of_several_manifests_is_read_with_a_note(tmp_path):
    write_all(tmp_path, "1.wav", "2.wav")
    (tmp_path / "manifest.csv").write_text("path,label\n1.wav,a\n2.wav,b\n")
    (tmp_path / "metadata.csv").write_text("nothing of the kind")
    assert read_dataset(tmp_path).notes == (f"{tmp_path / 'manifest.csv'} is read; metadata.csv beside it is ignored",)


BAD_MANIFESTS = [
    ("m.csv", "path,name\n1.wav,a\n", r"m\.csv: expected the columns path, label; missing label$"),
    ("m.csv", "path,file_name,label\n1.wav,1.wav,a\n", r"m\.csv: expected path or file_name, got both$"),
    ("m.csv", "", r"m\.csv: expected the columns path, label; missing path, label$"),
    ("m.csv", "path,label,start\n1.wav,a,\n1.wav,a,soon\n", r"line 3: expected start in seconds, .* got 'soon'$"),
    ("m.csv", "path,label,start\n1.wav,a,-1\n", r"line 2: expected start in seconds, 0 or more, got '-1'$"),
    ("m.csv", "path,label,start\n1.wav,a,nan\n", r"line 2: expected start in seconds, 0 or more, got 'nan'$"),
    ("m.csv", "path,label,start,end\n1.wav,a,2,2.01\n", r"line 2: .* at least 25 ms after the start 2 s, got 2.01 s$"),
    ("m.csv", "path,label,split\n1.wav,a,holdout\n", r"line 2: expected split train, validation, test, got 'holdout'$"),
    (
        "m.tsv",
        "path\tlabel\n1.wav\ta\tb\n",
        r"line 2: expected 2 fields as in the header, got 3; quote values that contain '\\t'$",
    ),
    ("m.csv", b"path,label\n\xff.wav,a\n", r"m\.csv: expected a CSV manifest in UTF-8"),
    ("m.jsonl", b'{"path": "\xff"}', r"m\.jsonl: expected JSON lines in UTF-8"),
    ("m.jsonl", '{"path": "1.wav", "label": "a"}\n{"path"\n', r"line 2: expected a JSON object \("),
    ("m.jsonl", "[]", r"line 1: expected a JSON object, got list$"),
    ("m.jsonl", '{"label": "a"}', r"line 1: expected path or file_name, got neither$"),
    ("m.jsonl", '{"path": "1.wav"}', r"line 1: expected label or labels, got neither$"),
    ("m.jsonl", '{"path": "1.wav", "label": "a", "labels": ["a"]}', r"line 1: expected label or labels, got both$"),
    ("m.jsonl", '{"path": 3, "label": "a"}', r"line 1: expected a path, got 3$"),
    ("m.jsonl", '{"path": "1.wav", "label": 3}', r"line 1: expected labels as a string or a list of strings, got 3$"),
    ("m.jsonl", '{"path": "1.wav", "label": ["a", 3]}', r"line 1: expected labels as a string or a list of strings"),
    ("m.jsonl", '{"path": "1.wav", "label": "a", "start": true}', r"line 1: expected start in seconds, .* got True$"),
    ("m.jsonl", '{"path": "1.wav", "label": "a", "end": [1]}', r"line 1: expected end in seconds, .* got \[1\]$"),
    ("m.jsonl", '{"path": "1.wav", "label": "a", "group": 1.5}', r"line 1: expected a string as group, got 1\.5$"),
    ("m.json", "{", r"m\.json: expected JSON in UTF-8 \("),
    ("m.json", '{"data": 3}', r'm\.json: expected \{"data": \[.*\]\}, got other JSON$'),
    ("m.json", "[]", r"got other JSON$"),
    ("m.json", '{"data": []}', r"m\.json: expected .*; found none$"),
    ("m.json", '{"data": [{"wav": "1.wav", "labels": "a"}, {"wav": "1.wav"}]}', r"entry 2: expected .* got \{'wav'"),
    ("m.json", '{"data": ["1.wav"]}', r"entry 1: expected .* got 1\.wav$"),
    ("m.json", '{"data": [{"wav": "1.wav", "labels": "/m/xyz"}]}', r"ids such as '/m/xyz', .* with --labels$"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_MANIFESTS)
def test_bad_manifests_are_one_line(name, content, message, tmp_path):
    write(tmp_path / "1.wav")
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message) as caught:
        read_dataset(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def write_original(path, *entries):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"data": [{"wav": wav, "labels": labels} for wav, labels in entries]}))


@pytest.mark.parametrize("place", ["given", "beside", "above"])
def test_the_originals_json_with_its_label_csv(place, tmp_path):
    write_all(tmp_path, "1.wav", "2.wav", "3.wav")
    files = tmp_path / "datafiles"
    write_original(files / "train.json", ("../1.wav", "/m/a,/m/c"), (str(tmp_path / "2.wav"), "/m/b"))
    write_original(files / "eval.json", ("../3.wav", "/m/c"))
    folder = {"given": tmp_path / "elsewhere", "beside": files, "above": tmp_path}[place]
    folder.mkdir(exist_ok=True)
    (folder / "esc_class_labels_indices.csv").write_text(LABEL_CSV)
    given = folder / "esc_class_labels_indices.csv" if place == "given" else None
    dataset = read_dataset(DatasetConfig(files / "train.json", validation=files / "eval.json", label_file=given))
    assert dataset.labels == ("Third, or C", "First", "Second", "Never")
    found = [[example.targets for example in dataset.splits[split]] for split in ("train", "validation", "test")]
    assert found == [[(0, 1), (2,)], [(0,)], []]
    assert [example.path.resolve() for example in dataset.splits["train"]] == [tmp_path / "1.wav", tmp_path / "2.wav"]


def test_the_originals_json_without_a_label_csv(tmp_path):
    """AudioSet's ids are in the package; several label files beside the JSON file are an error."""
    write_all(tmp_path, *(f"{number}.wav" for number in range(4)))
    write_original(
        tmp_path / "x.json", *((f"{number}.wav", f"{SPEECH},{MAN}") for number in range(3)), ("3.wav", WOMAN)
    )
    dataset = read_dataset(tmp_path / "x.json")
    assert dataset.labels == label_set("audioset").labels
    assert {example.targets for one in dataset.splits.values() for example in one} == {(0, 1), (2,)}
    for name in ("a", "b"):
        (tmp_path / f"{name}_class_labels_indices.csv").write_text(LABEL_CSV)
    with pytest.raises(DataError, match=r"expected one label file, found .*a_class_labels.*; choose one with --labels"):
        read_dataset(tmp_path / "x.json")


def test_a_label_file_fixes_the_order_of_any_layout(tmp_path):
    write_all(tmp_path, "b/1.wav", "b/2.wav", "a/3.wav", "a/4.wav")
    (tmp_path / "labels.txt").write_text("z\nb\na\n")
    dataset = read_dataset(DatasetConfig(tmp_path, label_file=tmp_path / "labels.txt"))
    assert dataset.labels == ("z", "b", "a")
    assert {example.path.parent.name: example.targets for example in dataset.splits["train"]} == {"a": (2,), "b": (1,)}
    (tmp_path / "labels.txt").write_text("z\nb\n")
    with pytest.raises(DataError, match=r"3\.wav has the label 'a', which is not in .*labels\.txt$"):
        read_dataset(DatasetConfig(tmp_path, label_file=tmp_path / "labels.txt"))


def test_ids_of_classes(tmp_path):
    assert len(audioset_ids()) == 527
    assert audioset_ids()[MAN] == "Male speech, man speaking"
    (tmp_path / "l.csv").write_text(LABEL_CSV)
    assert read_label_ids(tmp_path / "l.csv")["/m/c"] == "Third, or C"
    (tmp_path / "l.csv").write_text("display_name\na\n")
    (tmp_path / "l.txt").write_text("a\n")
    assert read_label_ids(tmp_path / "l.csv") == read_label_ids(tmp_path / "l.txt") == {}
    (tmp_path / "l.csv").write_text("mid,display_name\nx,a\nx,b\n")
    with pytest.raises(ValueError, match=r"expected each mid once, got 1 different ones in 2 rows"):
        read_label_ids(tmp_path / "l.csv")


@pytest.fixture
def three(tmp_path):
    """Three sources: without splits, a manifest with one split, and one with all three."""
    for source, names in {"classes": "ab", "more": "ab", "all": "ab"}.items():
        write_all(tmp_path / source, *(f"{name}/{number}.wav" for name in names for number in range(6)))
    lines = [f"../more/{name}/{number}.wav,{name},test" for name in "ab" for number in range(6)]
    (tmp_path / "more.csv").write_text("\n".join(["path,label,split", *lines]).replace("../", ""))
    lines = [f"all/{name}/{n}.wav,{name},{('train', 'val', 'test')[n % 3]}" for name in "ab" for n in range(6)]
    (tmp_path / "all.csv").write_text("\n".join(["path,label,split", *lines]))
    return tmp_path


def test_other_sources_for_validation_and_test(three):
    plain = three / "classes"
    assert sizes(read_dataset(DatasetConfig(plain, validation=three / "more.csv"))) == {
        "train": 12,
        "validation": 12,
        "test": 0,
    }
    assert sizes(read_dataset(DatasetConfig(plain, validation=three / "more"))) == {
        "train": 12,
        "validation": 12,
        "test": 0,
    }
    assert sizes(read_dataset(DatasetConfig(plain, test=three / "more"))) == {"train": 10, "validation": 2, "test": 12}
    both = read_dataset(DatasetConfig(plain, validation=three / "all.csv", test=three / "all.csv"))
    assert sizes(both) == {"train": 12, "validation": 4, "test": 4}
    assert {example.path.stem for example in both.splits["validation"]} == {"1", "4"}
    assert {example.path.stem for example in both.splits["test"]} == {"2", "5"}
    with pytest.raises(DataError, match=r"all\.csv: names a test split already"):
        read_dataset(DatasetConfig(three / "all.csv", test=plain))
    (three / "two.csv").write_text((three / "all.csv").read_text().replace(",test", ",train"))
    with pytest.raises(DataError, match=r"two\.csv: expected a split 'test', got train, validation"):
        read_dataset(DatasetConfig(plain, test=three / "two.csv"))
    with pytest.raises(FileNotFoundError, match="none: no such file or folder"):
        read_dataset(DatasetConfig(plain, test=three / "none"))


def test_fields_are_strings_and_of_their_types():
    config = DatasetConfig(pathlib.Path("a"), test=pathlib.Path("b"), fold=3)
    assert config == DatasetConfig("a", test="b", fold="3")
    assert dataclasses.astuple(config) == ("a", None, "b", None, "3")
    for name, value, expected in (
        ("source", None, "a string or a path"), ("validation", 3, "None or a string or a path"),
        ("fold", True, "None or a string or an integer"), ("fold", 1.0, "None or a string or an integer"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{name}: expected {expected}, got {value}$"):
            DatasetConfig(**{"source": "a", name: value})


def test_labels_of_another_source_count_too(tmp_path):
    write_all(tmp_path, "x/a/1.wav", "x/b/2.wav", "y/c/3.wav", "y/a/4.wav")
    dataset = read_dataset(DatasetConfig(tmp_path / "x", validation=tmp_path / "y"))
    assert dataset.labels == ("a", "b", "c")
    assert [example.targets for example in dataset.splits["validation"]] == [(0,), (2,)]


@pytest.fixture
def esc50(tmp_path):
    """The unpacked archive with five folds of three classes, and two clips of each recording."""
    lines = ["filename,fold,target,category,esc10,src_file,take"]
    for fold in range(1, 6):
        for target, category in ((7, "rooster"), (0, "dog"), (42, "siren")):
            for take in "AB":
                name = f"{fold}-{100 + fold}-{take}-{target}.wav"
                write(tmp_path / "ESC-50" / "audio" / name, len(lines), rate=44100)
                lines.append(f"{name},{fold},{target},{category},True,{100 + fold},{take}")
    (tmp_path / "ESC-50" / "meta").mkdir()
    (tmp_path / "ESC-50" / "meta" / "esc50.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "ESC-50" / "README.md").touch()
    return tmp_path / "ESC-50"


def test_esc50_as_downloaded(esc50):
    dataset = read_dataset(esc50)
    assert dataset.labels == ("dog", "rooster", "siren")
    assert dataset.folds == ("1", "2", "3", "4", "5")
    assert dataset.notes == (f"{esc50}: no split is named: fold 5 of 1, 2, 3, 4, 5 is for validation",)
    assert sizes(dataset) == {"train": 24, "validation": 6, "test": 0}
    third = read_dataset(DatasetConfig(esc50, fold="3"))
    assert {example.path.name[0] for example in third.splits["validation"]} == {"3"}
    assert {example.path.name[0] for example in third.splits["train"]} == set("1245")
    assert third.splits["validation"][0] == Example(esc50 / "audio" / "3-103-A-7.wav", (1,), group="103")
    assert third.notes == ()
    assert read_dataset(DatasetConfig(esc50, validation=esc50)).notes == ()


def test_damaged_esc50(esc50):
    with pytest.raises(DataError, match=r"expected a fold of 1, 2, 3, 4, 5, got '6'"):
        read_dataset(DatasetConfig(esc50, fold="6"))
    with pytest.raises(DataError, match="expected either a fold or other data for validation, got both"):
        read_dataset(DatasetConfig(esc50, fold="1", validation=esc50))
    table = esc50 / "meta" / "esc50.csv"
    text = table.read_text()
    for old, new, message in (
        (",42,siren", ",42,car", r"esc50\.csv, line \d+: expected one category per integer target, got '42'"),
        (",42,siren", ",x,siren", r"esc50\.csv, line 6: expected one category per integer target, got 'x'"),
        ("src_file", "source", r"esc50\.csv: expected the columns .*; missing src_file"),
    ):
        table.write_text(text.replace(old, new, 1))
        with pytest.raises(DataError, match=message):
            read_dataset(esc50)
    table.write_text(text.replace("rooster", "dog"))
    with pytest.raises(DataError, match="expected one target per category, got several"):
        read_dataset(esc50)


def test_folds_of_a_manifest(tmp_path):
    """Folds sort as numbers; a test split is kept; rows without a fold are for training."""
    lines = ["path,label,fold,split"]
    for number in range(24):
        write(tmp_path / f"{number}.wav", number)
        split = "test" if number >= 22 else ""
        lines.append(f"{number}.wav,{'ab'[number % 2]},{number // 2 % 12 if number < 22 else 1},{split}")
    lines[1] = "0.wav,a,,"
    (tmp_path / "manifest.csv").write_text("\n".join(lines))
    first = read_dataset(DatasetConfig(tmp_path, fold="1"))
    assert first.folds == tuple(map(str, range(11)))
    assert [example.path.stem for example in first.splits["validation"]] == ["2", "3"]
    assert sizes(first) == {"train": 20, "validation": 2, "test": 2}
    assert sizes(read_dataset(tmp_path)) == {"train": 22, "validation": 0, "test": 2}, "splits are named"
    (tmp_path / "list.csv").write_text("\n".join(lines).replace("fold", "other"))
    with pytest.raises(DataError, match="expected a fold of a data set with folds, got '1'"):
        read_dataset(DatasetConfig(tmp_path / "list.csv", fold="1"))


@pytest.fixture
def commands(tmp_path):
    root = tmp_path / "speech_commands"
    write_all(
        root, "yes/aa_nohash_0.wav", "yes/aa_nohash_1.wav", "yes/bb_nohash_0.wav", "no/bb_nohash_0.wav",
        "no/cc_nohash_0.wav", "_background_noise_/pink_noise.wav", "_background_noise_/running_tap.wav",
    )  # fmt: skip
    for name in ("README.md", "LICENSE", "_background_noise_/README.md", "other.txt"):
        (root / name).touch()
    (root / "validation_list.txt").write_text("yes/bb_nohash_0.wav\nno/bb_nohash_0.wav\n")
    (root / "testing_list.txt").write_text("no/cc_nohash_0.wav\n\n")
    return root


def test_speech_commands_as_downloaded(commands):
    dataset = read_dataset(commands)
    assert listed(dataset, commands) == {
        "yes/aa_nohash_0.wav": ("train", "yes"), "yes/aa_nohash_1.wav": ("train", "yes"),
        "yes/bb_nohash_0.wav": ("validation", "yes"), "no/bb_nohash_0.wav": ("validation", "no"),
        "no/cc_nohash_0.wav": ("test", "no"),
    }  # fmt: skip
    assert dataset.labels == ("no", "yes")
    assert {example.group for example in dataset.splits["validation"]} == {"bb"}
    assert dataset.notes == (f"{commands / '_background_noise_'} is not a class: its 2 files are left out",)
    assert dataset.ignored == (commands / "other.txt",)


def test_damaged_speech_commands(commands):
    (commands / "no" / "cc_nohash_0.wav").unlink()
    with pytest.raises(DataError, match=r"1 of 5 files are missing, the first is .*cc_nohash_0\.wav"):
        read_dataset(commands)
    (commands / "testing_list.txt").write_text("no/bb_nohash_0.wav\ncc.wav\n")
    with pytest.raises(DataError, match=r"testing_list\.txt, line 2: expected word/file, got 'cc\.wav'"):
        read_dataset(commands)
    (commands / "testing_list.txt").write_bytes(b"no/\xff.wav")
    with pytest.raises(DataError, match=r"testing_list\.txt: expected a list of files in UTF-8"):
        read_dataset(commands)


@pytest.mark.parametrize(("start", "end"), [(0.0, None), (0.03, None), (0.0, 0.05), (0.0305, 0.0701), (0.02, 9.0)])
def test_an_example_is_a_segment_of_its_file(start, end, tmp_path):
    path = write(tmp_path / "1.wav", seconds=0.2, subtype="FLOAT")
    whole = decode(path).samples
    got = load_example(Example(path, (), start, end), FRONTEND)
    first = round(start * 16000)
    last = len(whole) if end is None else round(end * 16000)
    want = whole[first:last][: FRONTEND.max_samples]
    np.testing.assert_array_equal(got, want)
    assert len(got) <= FRONTEND.max_samples


def test_names_in_messages():
    path = pathlib.Path("a/b.wav")
    assert Example(path, ()).name == "a/b.wav"
    assert Example(path, (), row=3).name == "a/b.wav, row 3"
    assert Example(path, (), 1.5).name == "a/b.wav, 1.5 s to its end"
    assert Example(path, (), 0, 2.25).name == "a/b.wav, 0 s to 2.25 s"


def test_groups_and_segments_are_held_out_together():
    """Twelve speakers with five clips each, and a recording of ten segments."""
    speakers = [
        Example(pathlib.Path(f"{speaker}-{number}"), (number % 2,), group=f"s{speaker}")
        for speaker in range(12)
        for number in range(5)
    ]
    parts = [Example(pathlib.Path("long"), (2,), start=number) for number in range(10)]
    others = [Example(pathlib.Path(str(number)), (2,)) for number in range(10)]
    examples = speakers + parts + others
    for seed in range(10):
        kept, held = _hold_out(examples, seed)
        assert sorted(kept + held, key=examples.index) == examples
        assert not {example.group or example.path for example in kept} & {
            example.group or example.path for example in held
        }
        for label in range(3):
            share = sum(label in example.targets for example in held)
            assert 1 <= share <= 6, "a tenth, 2 to 4, and what comes along with it; never the long recording"


def test_reordering_keeps_labels_and_notes(esc50):
    dataset = read_dataset(esc50)
    other = dataset.reordered(("siren", "dog", "rooster"))
    assert (other.folds, other.notes, other.ignored) == (dataset.folds, dataset.notes, dataset.ignored)
    assert listed(other, esc50) == listed(dataset, esc50)
    assert other.labels == ("siren", "dog", "rooster")
