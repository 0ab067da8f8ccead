"""The label sets of the package, and users' label files in every format."""

import csv
import dataclasses
import json
import pathlib
import subprocess
import sys

import pytest

from ast_jax.config import ASTConfig
from ast_jax.labels import LABEL_SETS, LabelSet, label_set, label_set_of_size, read_labels

FOLDER = pathlib.Path(__file__).parent.parent / "ast_jax" / "label_sets"
SIZES = {"audioset": 527, "speech-commands": 35, "esc50": 50}
MULTI, SINGLE = "multi_label_classification", "single_label_classification"


@pytest.fixture
def write(tmp_path):
    """Write a label file and return its path."""

    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def fails(path):
    """Return the error for a file, without its path; it must be one line that begins with the path."""
    with pytest.raises(ValueError, match="expected") as caught:
        read_labels(path)
    assert type(caught.value) is ValueError  # not UnicodeDecodeError, nor JSONDecodeError
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message.removeprefix(str(path))


def test_there_are_three_sets():
    assert LABEL_SETS.keys() == SIZES.keys()


@pytest.mark.parametrize(("name", "size"), SIZES.items())
def test_sets_have_their_sizes_and_no_name_twice(name, size):
    found = label_set(name)
    assert found.name == name
    assert isinstance(found.labels, tuple)
    assert len(found.labels) == len(set(found.labels)) == size
    assert all(label and label == label.strip() for label in found.labels)


@pytest.mark.parametrize(
    ("name", "index", "label"),
    [
        ("audioset", 0, "Speech"),
        ("audioset", 1, "Male speech, man speaking"),
        ("audioset", 74, "Dog"),
        ("audioset", 126, "Insect"),
        ("audioset", 137, "Music"),
        ("audioset", 300, "Vehicle"),
        ("audioset", 396, "Siren"),
        ("audioset", 500, "Silence"),
        ("audioset", 526, "Field recording"),
        ("speech-commands", 0, "backward"),
        ("speech-commands", 4, "zero"),
        ("speech-commands", 15, "six"),
        ("speech-commands", 28, "yes"),
        ("speech-commands", 34, "one"),
        ("esc50", 0, "dog"),
        ("esc50", 10, "rain"),
        ("esc50", 20, "crying_baby"),
        ("esc50", 30, "door_wood_knock"),
        ("esc50", 40, "helicopter"),
        ("esc50", 49, "hand_saw"),
    ],
)
def test_known_points(name, index, label):
    assert label_set(name).labels[index] == label


def test_speech_commands_are_in_the_original_order():
    labels = label_set("speech-commands").labels
    assert list(labels) != sorted(labels)
    digits = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    assert [labels.index(digit) for digit in digits] == [4, 34, 7, 25, 20, 2, 15, 12, 13, 23]


def test_esc50_has_its_five_groups_of_ten():
    """Animals, nature, human sounds, home and city: an index's tens tell the group (Piczak 2015)."""
    labels = label_set("esc50").labels
    group = {name: labels.index(name) // 10 for name in ("crow", "wind", "snoring", "clock_tick", "church_bells")}
    assert group == {"crow": 0, "wind": 1, "snoring": 2, "clock_tick": 3, "church_bells": 4}


def test_audioset_file_is_as_pythons_csv_module_writes_it():
    content = (FOLDER / "audioset.csv").read_bytes()
    assert content.startswith(b'index,mid,display_name\n0,/m/09x0r,Speech\n1,/m/05zppz,"Male speech, man speaking"\n')
    assert b"\r" not in content
    rows = list(csv.reader(content.decode("ascii").splitlines()))
    assert [row[0] for row in rows[1:]] == [str(index) for index in range(527)]
    assert [row[2] for row in rows[1:]] == list(label_set("audioset").labels)


def test_sets_are_read_once_and_frozen():
    found = label_set("esc50")
    assert label_set("esc50") is found
    assert isinstance(found, LabelSet)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.name = "other"


@pytest.mark.parametrize("name", ["", "AudioSet", "esc10", "speech_commands"])
def test_unknown_set_names_the_choices(name):
    with pytest.raises(ValueError, match=f"expected one of audioset, speech-commands, esc50, got '{name}'$"):
        label_set(name)


def test_label_set_of_size():
    for name, size in SIZES.items():
        assert label_set_of_size(size) is label_set(name)
    for size in (-1, 0, 1, 34, 36, 49, 51, 526, 528):
        assert label_set_of_size(size) is None


def test_labels_need_no_jax():
    code = "import sys, ast_jax.labels as l; l.label_set_of_size(527); assert not {'jax', 'numpy'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_licences_name_every_set_and_file():
    text = (FOLDER / "LICENSES.md").read_text()
    for wanted in ("AudioSet", "Speech Commands v2", "ESC-50", "CC BY 4.0", "CC BY-SA 4.0", "CC BY-NC 3.0",
                   "Gemmeke", "Warden", "Piczak", "https://research.google.com/audioset/", "1804.03209",
                   "10.1145/2733373.2806390", "index order"):  # fmt: skip
        assert wanted in text, wanted
    files = {path.name for path in FOLDER.iterdir()} - {"LICENSES.md"}
    assert files == set(LABEL_SETS.values())
    assert all(f"`{file}`" in text for file in files)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("labels.txt", "dog\ncat, the\nGrüße\n"),
        ("labels", "dog\ncat, the\nGrüße"),
        ("labels.lst", "\ufeff  dog\t\r\n\r\n   \r\ncat, the\r\nGrüße\r\n\r\n"),
        ("labels.json", '["dog", "cat, the", "Grüße"]'),
        ("labels.json", '\ufeff{"0": "dog", "1": "cat, the", "2": " Grüße "}'),
        ("LABELS.JSON", '{"2": "Grüße", "0": "dog", "1": "cat, the"}'),
        ("labels.csv", 'index,mid,display_name\n0,/m/0,"dog"\n1,/m/1,"cat, the"\n2,/m/2,"Grüße"\n'),
        ("LABELS.CSV", '\ufeffindex,mid,display_name\r\n0,/m/0,dog\r\n1,/m/1,"cat, the"\r\n\r\n2,/m/2,Grüße\r\n'),
        ("labels.csv", 'display_name, index\n dog ,0\n"cat, the", 1\nGrüße,2\n'),
        ("labels.csv", 'index, display_name \n0, dog \n1,"cat, the"\n2,Grüße\n'),
        ("labels.csv", '\ufeffdisplay_name\ndog\n"cat, the"\nGrüße\n'),
    ],
)
def test_read_labels(write, name, content):
    path = write(name, content)
    assert read_labels(path) == read_labels(str(path)) == ("dog", "cat, the", "Grüße")


def test_read_labels_sorts_indices_as_numbers(write):
    names = [f"class {index}" for index in range(12)]
    path = write("labels.json", json.dumps({str(index): names[index] for index in reversed(range(12))}))
    assert read_labels(path) == tuple(names)


@pytest.mark.parametrize("kind", ["txt", "json", "csv"])
def test_audioset_survives_every_format(write, kind):
    labels = label_set("audioset").labels
    quoted = [f'{index},x,"{label}"' for index, label in enumerate(labels)]
    content = {
        "txt": "\n".join(labels),
        "json": json.dumps(ASTConfig(id2label=labels).to_json_dict()["id2label"]),
        "csv": "\n".join(["index,mid,display_name", *quoted]),
    }[kind]
    assert read_labels(write(f"labels.{kind}", content)) == labels


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", ": expected class names, got none"),
        ("a.txt", "\n  \n", ": expected class names, got none"),
        ("a.json", "[]", ": expected class names, got none"),
        ("a.json", "{}", ": expected class names, got none"),
        ("a.csv", "index,mid,display_name\n", ": expected class names, got none"),
        ("a.txt", "dog\ncat\n dog", ": expected each name once, got 2 of 'dog'"),
        ("a.json", '["b", "a", "b", "a", "a"]', ": expected each name once, got 3 of 'a'"),
        ("a.json", '{"0": "dog", "1": "dog"}', ": expected each name once, got 2 of 'dog'"),
        ("a.csv", "index,display_name\n0,dog\n1,dog\n", ": expected each name once, got 2 of 'dog'"),
        ("a.json", '["dog", 3]', ": expected a name for class 1, got 3"),
        ("a.json", '["dog", ["cat"]]', ": expected a name for class 1, got ['cat']"),
        ("a.json", '{"0": "dog", "1": " "}', ": expected a name for class 1, got ' '"),
        ("a.csv", "index,display_name\n0,dog\n1,\n", ": expected a name for class 1, got ''"),
        ("a.json", '"dog"', ": expected a list of names or an object with a name for each index, got str"),
        ("a.json", "null", ": expected a list of names or an object with a name for each index, got NoneType"),
        ("a.json", '{"1": "dog", "2": "cat"}', ": expected the indices 0 to 1 as keys, got '2'"),
        ("a.json", '{"dog": 0, "cat": 1}', ": expected the indices 0 to 1 as keys, got 'dog'"),
        ("a.json", '{"00": "dog"}', ": expected the indices 0 to 0 as keys, got '00'"),
        ("a.csv", "", ": expected the column display_name; missing display_name"),
        ("a.csv", "index,mid,name\n0,x,dog\n", ": expected the column display_name; missing display_name"),
        ("a.csv", "index,index,display_name\n0,1,dog\n",
         ": expected each column once, got several of index"),
        ("a.csv", "index,display_name\n1,dog\n2,cat\n", ", line 2: expected index 0, got '1'"),
        ("a.csv", "index,display_name\n0,dog\n2,cat\n", ", line 3: expected index 1, got '2'"),
        ("a.csv", "index,display_name\n1,dog\n0,cat\n", ", line 2: expected index 0, got '1'"),
        ("a.csv", "index,display_name\n0,Male speech, man speaking\n",
         ", line 2: expected 2 fields as in the header, got 3; quote values that contain ','"),
        ("a.csv", "index,mid,display_name\n0,dog\n",
         ", line 2: expected 3 fields as in the header, got 2"),
    ],
)  # fmt: skip
def test_read_labels_says_what_is_wrong(write, name, content, message):
    assert fails(write(name, content)) == message


@pytest.mark.parametrize("name", ["a.txt", "a.json", "a.csv"])
def test_read_labels_wants_utf_8(write, name):
    content = {"a.txt": "Grüße", "a.json": '["Grüße"]', "a.csv": "display_name\nGrüße\n"}[name]
    message = fails(write(name, content.encode("latin-1")))
    assert message.startswith(": expected class names in UTF-8, got another encoding")


def test_read_labels_of_broken_json(write):
    message = fails(write("a.json", '["dog",\n'))
    assert message.startswith(": expected JSON (")


def test_read_labels_of_broken_csv(write):
    message = fails(write("a.csv", "display_name\n" + "x" * (csv.field_size_limit() + 1)))
    assert message.startswith(", line 2: expected CSV (field larger than field limit")


@pytest.mark.parametrize("name", ["missing.txt", "missing.json", "missing.csv"])
def test_read_labels_of_a_missing_file(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=name):
        read_labels(tmp_path / name)
