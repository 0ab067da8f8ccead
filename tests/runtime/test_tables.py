"""CSV and tab-separated files: rows, errors with file and line, and CSV text."""

import csv

import pytest

from ast_jax.runtime.tables import csv_text, one_of, read_table

REQUIRED = [("path", "file"), ("label",)]
ROWS = [{"path": "a, b.wav", "label": "x"}, {"path": "ü.wav", "label": ""}]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", 'path,label\n"a, b.wav",x\nü.wav,\n'),
        ("t.CSV", '\ufeffpath, label \r\n\r\n"a, b.wav",x\r\n\r\nü.wav,\r\n'),
        ("t.txt", "path\tlabel\na, b.wav\tx\nü.wav\t\n"),
        ("t.tsv", "path\tlabel\na, b.wav\tx\nü.wav\t\n"),
        ("t.tab", "path\tlabel\na, b.wav\tx\nü.wav\t"),
    ],
)
def test_rows(name, text, tmp_path):
    path = tmp_path / name
    path.write_bytes(text.encode())
    found = list(read_table(path, REQUIRED))
    assert [row for _, row in found] == ROWS
    lines = [number for number, line in enumerate(text.splitlines(), 1) if line][1:]
    assert [where for where, _ in found] == [f"{path}, line {line}" for line in lines]


def test_an_alias_and_other_columns(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("file,label,other\na,b,c\n")
    assert [row for _, row in read_table(path, REQUIRED)] == [{"file": "a", "label": "b", "other": "c"}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ": expected the columns path, label; missing path, label"),
        ("file,name\n", ": expected the columns path, label; missing label"),
        ("path,label,x,x\n", ": expected each column once, got several of x"),
        ("path,file,label\n", ": expected path or file, got both"),
        ("path,label\n\na,b\na,b,c\n",
         ", line 4: expected 2 fields as in the header, got 3; quote values that contain ','"),
        ("path\tlabel\na\tb\tc\n",
         ", line 2: expected 2 fields as in the header, got 3; quote values that contain '\\t'"),
        ("path,label\na\n", ", line 2: expected 2 fields as in the header, got 1"),
        (f"path,label\na,{'b' * (csv.field_size_limit() + 1)}\n",
         f", line 2: expected CSV (field larger than field limit ({csv.field_size_limit()}))"),
    ],
)  # fmt: skip
def test_errors_name_file_and_line(text, message, tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match="expected") as caught:
        list(read_table(path, REQUIRED))
    assert str(caught.value) == f"{path}{message}"


def test_another_encoding(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes("path,label\nü,a\n".encode("latin-1"))
    with pytest.raises(UnicodeDecodeError):
        list(read_table(path, REQUIRED))


def test_csv_text_has_the_columns_of_all_rows(tmp_path):
    text = csv_text([{"path": "a, b", "label": 1}, {"label": None, "more": 'say "x"'}])
    assert text == 'path,label,more\n"a, b",1,\n,,"say ""x"""\n'
    (tmp_path / "t.csv").write_text(text)
    assert [row["more"] for _, row in read_table(tmp_path / "t.csv", REQUIRED)] == ["", 'say "x"']


def test_one_of_a_name_and_its_alias():
    assert one_of(("path", "file"), {"file": 1, "label": 2}, "here") == "file"
    for present, got in (({"label"}, "neither"), ({"path", "file"}, "both")):
        with pytest.raises(ValueError, match=f"^here: expected path or file, got {got}$"):
            one_of(("path", "file"), present, "here")
