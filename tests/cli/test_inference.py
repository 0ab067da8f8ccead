"""The commands `classify` (long sounds and pipes), `embed`, `explain` and `export`."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile
from command_line import SOUNDS, in_process

import ast_jax
from ast_jax.audio import streams
from ast_jax.cli import inference
from ast_jax.inference import embeddings, explanations, sliding_window, timeline

RATE = 16000
ORDER = ("speech", "music", "telephone")


@pytest.fixture(scope="module")
def meeting(tmp_path_factory):
    """Thirteen seconds: speech, music, a telephone."""
    path = tmp_path_factory.mktemp("sounds") / "meeting.flac"
    soundfile.write(path, np.concatenate([ast_jax.read_audio(SOUNDS / f"{name}.flac") for name in ORDER]), RATE)
    return path


def segments(text):
    """Return (label, start, end) of the lines of a timeline."""
    parts = [line.split() for line in text.splitlines() if " to " in line]
    return [(" ".join(part[5:]), float(part[0]), float(part[2])) for part in parts]


def test_windows_and_a_timeline(meeting):
    done = in_process("classify", meeting, "--window", "2", "--hop", "0.5", "-k", "8", "--threshold", "0.6")
    assert done.returncode == 0, done.stderr
    duration = len(ast_jax.read_audio(meeting)) / RATE
    count = int((duration - 2) // 0.5) + 2
    assert done.stdout.splitlines()[0] == (
        f"{meeting}  ({duration:.2f} s in {count} windows of 2.00 s every 0.50 s; their mean)"
    )
    found = segments(done.stdout)
    want = ast_jax.analyze(meeting, window=2, hop=0.5).timeline(0.6)
    assert [label for label, *_ in found] == [each.label for each in want]
    for (_, *times), each in zip(found, want, strict=True):
        assert times == pytest.approx([each.start, each.end], abs=0.005)
    assert {"Speech", "Music", "Alarm"} <= {label for label, *_ in found}
    assert found[0][:2] == ("Speech", 0)


def test_a_window_longer_than_the_model(meeting):
    done = in_process("classify", meeting, "--window", "10", "--hop", "1", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["windows"] == 4
    want = ast_jax.analyze(meeting, window=10, hop=1)
    assert result["predictions"][0] == {
        "label": want.best(1)[0][0],
        "score": pytest.approx(want.best(1)[0][1], abs=1e-5),
    }


def test_timelines_in_files(meeting, tmp_path):
    outputs = {ending: tmp_path / f"timeline.{ending}" for ending in ("csv", "jsonl", "txt")}
    for path in outputs.values():
        done = in_process("classify", meeting, "--timeline", path, "--hop", "1")
        assert done.returncode == 0, done.stderr
    want = ast_jax.analyze(meeting, hop=1).timeline()
    with outputs["csv"].open(newline="") as file:
        rows = list(csv.DictReader(file))
    lines = [json.loads(line) for line in outputs["jsonl"].read_text().splitlines()]
    labels = [line.split("\t") for line in outputs["txt"].read_text().splitlines()]
    assert len(rows) == len(lines) == len(labels) == len(want) >= 3
    for row, line, label, segment in zip(rows, lines, labels, want, strict=True):
        assert row["file"] == line["file"] == str(meeting)
        assert row["label"] == line["label"] == label[2] == segment.label
        for value in (float(row["start_seconds"]), line["start"], float(label[0])):
            assert value == pytest.approx(segment.start, abs=1e-3)
        for value in (float(row["end_seconds"]), line["end"], float(label[1])):
            assert value == pytest.approx(segment.end, abs=1e-3)
        assert float(row["score"]) == line["score"] == pytest.approx(segment.score, abs=1e-5)


def test_a_picture(meeting, tmp_path):
    done = in_process("classify", meeting, "--picture", tmp_path / "timeline.png")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "timeline.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.wav", "b.wav", "--picture", "x.png"], "--picture: expected one file, got 2"),
        (["a.wav", "b.wav", "--timeline", "x.txt"], "--timeline .txt: expected one file, got 2"),
        (["a.wav", "--timeline", "x.xml"], "--timeline: expected a name that ends in .csv, .jsonl or .txt, got x.xml"),
        (
            ["a.wav", "-o", "x.csv", "--timeline", "../there/x.csv"],
            "--output, --timeline, --picture: expected a file for each, got one for two of them",
        ),
        (["a.wav", "--picture", "x.jpg"], "--picture: expected a name that ends in .png, got x.jpg"),
        (["a.wav", "--low", "0.7"], "--low: expected at most --threshold 0.5, got 0.7"),
        (["-", "a.wav"], "-: expected the standard input alone, got - a.wav"),
        (["a.wav", "--raw", "s16le"], "--raw: expected -, the standard input, got a.wav"),
        (["-", "--rate", "8000"], "--rate and --channels: expected --raw with them; a header has its own"),
        (["-", "--picture", "x.png"], "--picture: expected a file, got the standard input, which cannot be read twice"),
    ],
    ids=" ".join,
)
def test_wrong_usage(arguments, message, tmp_path):
    here = tmp_path / "there"
    here.mkdir()
    done = in_process("classify", *arguments, cwd=here)
    assert done.returncode == 2
    assert done.stderr == f"ast-jax: {message}\n"
    assert list(here.iterdir()) == []


def test_invalid_windows(meeting):
    done = in_process("classify", meeting, "--window", "1", "--hop", "2")
    assert done.returncode == 1
    assert done.stderr.startswith("ast-jax: hop: expected more than 0 s and at most the window's 1 s")


@pytest.mark.parametrize("as_json", [False, True])
def test_a_live_pipe(meeting, as_json):
    """The first window is printed before the rest is sent; the final result equals that of the file."""
    samples = (ast_jax.read_audio(meeting) * 32767).astype("<i2")
    command = [
        sys.executable,
        "-m",
        "ast_jax.cli.main",
        "classify",
        "-",
        "--raw",
        "s16le",
        "-k",
        "2",
        *["--json"] * as_json,
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdin.write(samples[: 3 * RATE].tobytes())
        process.stdin.flush()
        first = process.stdout.readline().decode()
        rest, errors = process.communicate(samples[3 * RATE :].tobytes())
    assert process.returncode == 0, errors
    *lines, last = [first, *rest.decode().splitlines()]
    want = ast_jax.analyze(samples.astype(np.float32) / 32768, sampling_rate=RATE)
    if as_json:
        windows = [json.loads(line) for line in lines]
        assert len(windows) == len(want.times)
        assert windows[0]["predictions"][0]["score"] == pytest.approx(want.scores[0].max(), abs=1e-4)
        assert json.loads(last)["windows"] == len(want.times)
    else:
        assert first.split()[:3] == ["0.00", "to", "2.58"]
        summary = next(index for index, line in enumerate(lines) if line.startswith("-  ("))
        assert summary == len(want.times)


def test_a_file_on_the_standard_input(meeting):
    command = [sys.executable, "-m", "ast_jax.cli.main", "classify", "-", "-k", "1"]
    with meeting.open("rb") as file:
        done = subprocess.run(command, stdin=file, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    of_file = in_process("classify", meeting, "-k", "1").stdout
    assert done.stdout.splitlines()[-4:][1:] == of_file.splitlines()[-4:][1:]


def test_paddings(tmp_path):
    soundfile.write(tmp_path / "short.wav", ast_jax.read_audio(SOUNDS / "siren.flac")[:12_000], RATE)
    scores = {}
    for kind in sliding_window.PADDING:
        done = in_process("classify", tmp_path / "short.wav", "--pad", kind, "--json", "-k", "8")
        assert done.returncode == 0, done.stderr
        scores[kind] = {entry["label"]: entry["score"] for entry in json.loads(done.stdout)["predictions"]}
        want = dict(ast_jax.classify(tmp_path / "short.wav", padding=kind, top_k=8))
        assert scores[kind] == pytest.approx(want, abs=1e-5)
    assert len({value["Siren"] for value in scores.values()}) == 4


@pytest.mark.parametrize("ending", ["npz", "parquet"])
def test_embed(meeting, tmp_path, ending):
    path = tmp_path / f"vectors.{ending}"
    (tmp_path / "bad.wav").write_text("no sound")
    done = in_process("embed", meeting, tmp_path / "bad.wav", SOUNDS, "-o", path, "--layer", "2", "--per", "clip")
    assert done.returncode == 1
    assert done.stderr.startswith(f"ast-jax: {tmp_path / 'bad.wav'}: not a readable sound file")
    assert len(done.stderr.splitlines()) == 1
    if ending == "npz":
        with np.load(path) as file:
            sources, vectors = file["source"].tolist(), file["embedding"]
    else:
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(path)
        sources, vectors = table["source"].to_pylist(), np.array(table["embedding"].to_pylist())
    assert sources == [str(meeting), *sorted(map(str, SOUNDS.glob("*.flac")))]
    np.testing.assert_allclose(vectors[0], ast_jax.embed(meeting, layer=2).clip, atol=1e-5)


def test_explain(meeting, tmp_path):
    done = in_process(
        "explain",
        meeting,
        "-o",
        tmp_path / "why.png",
        "-l",
        "Alarm",
        "--cells",
        "2",
        "4",
        "--arrays",
        tmp_path / "why.npz",
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith(f"{meeting}: 2.58 s from ")
    assert float(first.split()[4]) > 9
    assert second.split()[1] == "Alarm"
    assert (tmp_path / "why.png").read_bytes()[:4] == b"\x89PNG"
    with np.load(tmp_path / "why.npz") as file:
        assert file["occlusion"].shape == (1, 2, 4)
        assert file["labels"].tolist() == ["Alarm"]
    done = in_process("explain", meeting, "-o", tmp_path / "why.png", "--start", "100")
    assert done.returncode == 1
    assert done.stderr.startswith(f"ast-jax: {meeting}: expected a sound from 100 s on, but it ends at")


def test_export(tmp_path):
    done = in_process("export", "sounds-tiny", tmp_path / "tiny.stablehlo", "--platforms", "cpu, tpu")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1:] == [
        "  takes    waveform [b, 41200] float32 at 16000 Hz, num_samples [b] int32",
        "  returns  a dict of 8 labels, each with its logits [b]",
    ]
    assert ast_jax.load_program(tmp_path / "tiny.stablehlo").exported.platforms == ("cpu", "tpu")
    done = in_process("export", "sounds-tiny", tmp_path / "tiny.onnx")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)


MEMORY = """
import resource, sys
from ast_jax.cli.main import main
sys.argv = ["ast-jax", "classify", sys.argv[1], "--json", "-k", "1"]
try:
    main()
finally:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, file=sys.stderr)
"""


@pytest.mark.slow
def test_three_hours_in_constant_memory(tmp_path):
    """Compared with ten minutes; only the scores grow, by a third of a MiB."""
    rng, peaks = np.random.default_rng(0), []
    minute = (0.1 * rng.standard_normal(60 * 22050)).astype(np.float32)
    for minutes in (10, 180):
        path = tmp_path / f"{minutes}.flac"
        with soundfile.SoundFile(path, "w", 22050, 1) as file:
            for _ in range(minutes):
                file.write(minute)
        began = time.monotonic()
        done = subprocess.run([sys.executable, "-c", MEMORY, str(path)], capture_output=True, text=True)
        assert json.loads(done.stdout)["duration_seconds"] == minutes * 60
        peaks.append(int(done.stderr.splitlines()[-1]))
        print(f"{minutes} minutes: {time.monotonic() - began:.0f} s, {peaks[-1]} MiB")
    assert peaks[1] < peaks[0] + 30  # MiB; the samples are 660


def test_many_long_sounds_keep_few_files_open(tmp_path):
    """However many are decoded ahead; all are scored to their end, including those closed in between."""
    long = (0.1 * np.random.default_rng(0).standard_normal(16 * RATE)).astype(np.float32)
    for number in range(40):
        soundfile.write(tmp_path / f"{number:02}.wav", long, RATE)
    before, most = len(os.listdir("/proc/self/fd")), 0
    found = ast_jax.analyze_each(sorted(tmp_path.iterdir()), ast_jax.load("sounds-tiny"), batch_size=32)
    for analysis in found:
        most = max(most, len(os.listdir("/proc/self/fd")) - before)
        assert analysis.times[-1, 1] == 16
        assert len(analysis.times) == 12
    assert most <= sliding_window.MAX_OPEN + 4


def test_ctrl_c_ends_the_stream_and_keeps_the_results(meeting, tmp_path):
    samples = (ast_jax.read_audio(meeting) * 32767).astype("<i2")
    command = [
        sys.executable,
        "-m",
        "ast_jax.cli.main",
        "classify",
        "-",
        "--raw",
        "s16le",
        "--timeline",
        tmp_path / "t.csv",
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdin.write(samples[: 4 * RATE].tobytes())
        process.stdin.flush()
        assert process.stdout.readline().startswith(b"     0.00 to      2.58 s")
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(samples[4 * RATE : 5 * RATE].tobytes())
    assert (process.returncode, errors) == (0, b"")
    assert b"-  (" in rest
    assert b"Speech" in rest
    assert (tmp_path / "t.csv").read_text().splitlines()[1].startswith("-,0.000,")


@pytest.mark.parametrize(
    "arguments",
    [
        ["classify", "--picture", "none/x.png"],
        ["classify", "--timeline", "none/x.csv"],
        ["classify", "-o", "none/x.csv"],
        ["embed", "-o", "none/x.npz"],
        ["explain", "-o", "none/x.png"],
        ["explain", "-o", "x.png", "--arrays", "none/x.npz"],
    ],
    ids=" ".join,
)
def test_output_folders_are_checked_first(arguments, meeting, tmp_path, monkeypatch):
    monkeypatch.setattr(inference, "_loaded", lambda model: pytest.fail("the work had begun"))
    command, *options = arguments
    done = in_process(command, meeting, *options, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"ast-jax: {options[-1]}: no such folder\n"


def test_an_empty_table_does_not_replace_a_file(tmp_path):
    (tmp_path / "bad.wav").write_text("no sound")
    for ending in ("npz", "parquet"):
        path = tmp_path / f"vectors.{ending}"
        path.write_text("of yesterday")
        done = in_process("embed", tmp_path / "bad.wav", "-o", path)
        assert done.returncode == 1
        assert done.stderr.splitlines()[1:] == [f"ast-jax: {path}: not written, as no file could be used"]
        assert path.read_text() == "of yesterday"
    done = in_process("embed", "-", "-o", path)
    assert done.returncode == 2
    assert done.stderr == "ast-jax: -: expected files, got the standard input, which only classify reads\n"


def test_choices_equal_the_library():
    assert [each.value for each in inference.Padding] == list(sliding_window.PADDING)
    assert [each.value for each in inference.Pool] == list(embeddings.POOLS)
    assert [each.value for each in inference.Encoding] == list(streams.ENCODINGS)
    assert [each.value for each in inference.Aggregate] == list(timeline.AGGREGATES)


def test_a_picture_that_cannot_be_drawn_is_refused_before_the_work(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "librosa", None)  # as if it were not installed
    monkeypatch.setattr(explanations, "explain", lambda *_, **__: pytest.fail("the work began"))
    done = in_process("explain", SOUNDS / "siren.flac", "--output", tmp_path / "why.png")
    assert done.returncode == 1
    assert "install it with: pip install 'ast-jax[plots]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
