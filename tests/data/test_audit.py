"""The data set audit: headers, statistics equal to NumPy's, and every planted fault."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
import soundfile

from ast_jax.audio import fbank
from ast_jax.audio.io import decode
from ast_jax.config import ASTConfig, FrontendConfig
from ast_jax.data import audit
from ast_jax.data.audit_report import suggest_max_length
from ast_jax.data.datasets import DataSet, Example, load_example, read_dataset
from ast_jax.data.records import DataError

FRONTEND = FrontendConfig(max_length=24, num_mel_bins=16)  # 255 ms


def noise(seconds=0.1, seed=0, rate=16000, level=0.1):
    return level * np.random.default_rng(seed).standard_normal(round(seconds * rate))


def write(path, samples, rate=16000, **settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate, **settings)
    return path


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """Twelve clips of different length, loudness and rate; some exceed the input length, one is a segment."""
    folder = tmp_path_factory.mktemp("sounds")
    found = []
    for number in range(12):
        rate = (16000, 8000, 44100)[number % 3]
        samples = noise(0.05 + 0.03 * number, number, rate, level=0.01 * (number + 1))
        found.append(Example(write(folder / f"{number}.wav", samples, rate), (number % 2,)))
    found[5] = dataclasses.replace(found[5], start=0.03, end=0.15)
    return found


def all_values(examples, frontend):
    """Return every log-mel value in float64."""
    waveforms = [load_example(example, frontend) for example in examples]
    return np.concatenate([fbank.log_mel(one, frontend).astype(np.float64).ravel() for one in waveforms])


def test_statistics_are_those_of_all_values_at_once(examples):
    values = all_values(examples, FRONTEND)
    found = audit.statistics(examples, FRONTEND)
    # float64 sums of some thousand values in another order
    np.testing.assert_allclose([found.mean, found.std], [values.mean(), values.std()], rtol=1e-10)
    assert found.frames == len(values) / FRONTEND.num_mel_bins
    assert (found.clips, found.skipped) == (12, 0)
    assert type(found.mean) is type(found.std) is float
    padded = len(examples) * FRONTEND.max_length
    assert found.frames < padded, "padding is left out"


@pytest.mark.parametrize("measure", [audit.statistics, audit.statistics_as_original])
def test_statistics_do_not_depend_on_threads(measure, examples):
    once = measure(examples, FRONTEND, num_threads=1)
    assert [measure(examples, FRONTEND, num_threads=threads) for threads in (2, 7)] == [once, once]


def test_moments_of_values_far_from_zero_keep_their_precision():
    """A sum of squares would lose a deviation of 1e-3 around 1e6 in float64."""
    rng = np.random.default_rng(0)
    parts = [1e6 + 1e-3 * rng.standard_normal(size) for size in (1000, 1, 500)]
    total = audit._Moments()
    for part in parts:
        total = total.merge(audit._Moments.of(part))
    whole = np.concatenate(parts)
    np.testing.assert_allclose(np.sqrt(total.squares / total.size), whole.std(), rtol=1e-6)
    assert total.size == 1501


def test_limit_draws_with_seed(examples):
    one, again, other = (audit.statistics(examples, FRONTEND, limit=5, seed=seed) for seed in (1, 1, 2))
    assert one == again != other
    assert one.clips == 5
    assert audit.statistics(examples, FRONTEND, limit=100) == audit.statistics(examples, FRONTEND)


def test_statistics_with_dither_drawn_with_seed(examples):
    loud = FRONTEND.replace(dither=0.1)
    one, again, other = (audit.statistics(examples, loud, seed=seed, num_threads=3) for seed in (1, 1, 2))
    assert one == again != other
    assert one.mean > audit.statistics(examples, FRONTEND).mean


def test_statistics_skip_unusable_clips(examples, tmp_path):
    (tmp_path / "text.wav").write_text("no sound")
    spoiled = noise()
    spoiled[7] = np.nan
    bad = [
        Example(tmp_path / "text.wav", ()),
        Example(tmp_path / "none.wav", ()),
        Example(write(tmp_path / "nan.wav", spoiled, subtype="FLOAT"), ()),
    ]
    calls = []
    found = audit.statistics([bad[0], *examples, *bad[1:]], FRONTEND, advance=lambda: calls.append(1))
    assert found == audit.statistics(examples, FRONTEND)._replace(skipped=3)
    assert len(calls) == 15
    for measure in (audit.statistics, audit.statistics_as_original):
        with pytest.raises(DataError, match=r"none of 3 can be used, the first: .*text\.wav: not a readable"):
            measure(bad, FRONTEND)
        with pytest.raises(DataError, match=r"none of 0 can be used$"):
            measure([], FRONTEND)


def test_silence_is_refused(tmp_path):
    silent = [Example(write(tmp_path / f"{number}.wav", np.zeros(4000)), ()) for number in range(3)]
    with pytest.raises(DataError, match="all log-mel values of 3 training clips are equal, as in silence"):
        audit.statistics(silent, FRONTEND)


def test_statistics_as_original_without_masks_and_mixup_are_those_of_padded_batches(examples, monkeypatch):
    monkeypatch.setattr(audit, "ORIGINAL_MASKS", (0, 0))
    monkeypatch.setattr(audit, "ORIGINAL_MIXUP", 0.0)
    monkeypatch.setattr(audit, "ORIGINAL_BATCH", 5)
    padded = np.zeros((12, FRONTEND.max_length, FRONTEND.num_mel_bins))
    for spec, example in zip(padded, examples, strict=True):
        waveform = load_example(example, FRONTEND)
        values = fbank.log_mel(waveform - waveform.mean(), FRONTEND)
        spec[: len(values)] = values
    batches = [padded[:5], padded[5:10], padded[10:]]
    found = audit.statistics_as_original(examples, FRONTEND)
    want = [np.mean([one.mean() for one in batches]), np.mean([one.std(ddof=1) for one in batches])]
    np.testing.assert_allclose([found.mean, found.std], want, rtol=1e-10)
    assert found.frames == 12 * FRONTEND.max_length


def test_statistics_as_original_count_masks_and_mixed_sounds(tmp_path, monkeypatch):
    """On clips that fill the input, so that there is no padding."""
    frontend = FrontendConfig(max_length=24, num_mel_bins=48)
    full = [Example(write(tmp_path / f"{number}.wav", noise(0.3, number, level=1e-3)), ()) for number in range(80)]
    exact = audit.statistics(full, frontend)
    masked = audit.statistics_as_original(full, frontend)
    # widths are uniform up to 24 of 48 bins and 24 of 24 frames: (1 - 11.5/48) (1 - 11.5/24) = 0.40 of the values stay;
    # of 80 sounds the mean of that has a standard error of 0.03
    assert 0.3 < masked.mean / exact.mean < 0.5
    assert masked.std > 1.2 * exact.std
    monkeypatch.setattr(audit, "ORIGINAL_MASKS", (0, 0))
    unmasked = audit.statistics_as_original(full, frontend)
    # half are mixtures of two sounds as loud: lambda² + (1 - lambda)² of the power, about 0.5, in half of them
    np.testing.assert_allclose(unmasked.mean, exact.mean + 0.5 * np.log(0.52), atol=0.1)
    monkeypatch.setattr(audit, "ORIGINAL_MIXUP", 0.0)
    np.testing.assert_allclose(audit.statistics_as_original(full, frontend).mean, exact.mean, atol=0.01)


def test_masks_are_bands_of_less_than_their_width():
    covered = np.zeros(20)
    for seed in range(300):
        spec = np.ones((20, 4), np.float32)
        audit._mask(np.random.default_rng(seed), spec, 0, 6)
        zero = np.flatnonzero((spec == 0).all(1))
        assert len(zero) == (spec == 0).any(1).sum() <= 5
        assert np.all(np.diff(zero) == 1)
        covered[zero] += 1
    assert (covered[:-1] > 0).all()
    assert covered[-1] == 0, "start and width are both rounded down, so that torchaudio never masks the last one"


def test_headers(examples, tmp_path):
    assert audit.check_headers(examples, FRONTEND) == audit.Headers(12, 5, [])  # 0.05 s + 0.03 s n > 0.255 s: 7 to 11
    (tmp_path / "text.wav").write_text("no sound")
    short = Example(write(tmp_path / "short.wav", np.zeros(100)), ())
    bad = [
        Example(tmp_path / "text.wav", ()),
        short,
        dataclasses.replace(examples[0], start=0.05),
        Example(tmp_path / "none.wav", ()),
    ]
    found = audit.check_headers([*bad, *examples], FRONTEND, num_threads=2)
    assert found[:2] == (16, 5)
    assert [example for example, _ in found.bad] == bad
    expected = [
        "not a readable sound file",
        "only 6.2 ms long",
        "from 0.05 s on, but it ends at 0.05 s",
        "no such file",
    ]
    for (example, reason), part in zip(found.bad, expected, strict=True):
        assert reason.startswith(str(example.path))
        assert part in reason
    parts = [dataclasses.replace(examples[11], end=0.2), dataclasses.replace(examples[11], start=0.2)]
    assert audit.check_headers(parts, FRONTEND).longer == 0
    limited = audit.check_headers([*bad, *examples], FRONTEND, limit=6, seed=3)
    assert limited.checked == 6
    assert limited == audit.check_headers([*bad, *examples], FRONTEND, limit=6, seed=3)


def test_headers_of_rows_are_read_from_their_bytes(tmp_path):
    import datasets as hf

    hf.disable_progress_bars()
    sounds = [
        {"bytes": write(tmp_path / "1.wav", noise(0.4)).read_bytes(), "path": None},
        {"bytes": b"x", "path": None},
    ]
    dataset = hf.Dataset.from_dict({"audio": sounds, "label": ["a", "b"]}).cast_column("audio", hf.Audio())
    dataset.save_to_disk(tmp_path / "saved")
    rows = [Example(tmp_path / "saved", (0,), row=row) for row in range(2)]
    found = audit.check_headers(rows, FRONTEND)
    assert (found.checked, found.longer) == (2, 1)
    ((example, reason),) = found.bad
    assert example == rows[1]
    assert reason.startswith(f"{tmp_path / 'saved'}, row 1: not a readable sound file")


@pytest.fixture
def healthy(tmp_path):
    """Two classes in three splits, all clips different."""
    for number in range(40):
        split = ("train", "train", "train", "validation", "test")[number // 2 % 5]
        write(tmp_path / split / "ab"[number % 2] / f"{number}.wav", noise(0.1 + 0.01 * number, number))
    return tmp_path


def test_a_healthy_data_set_has_no_problems(healthy):
    dataset = read_dataset(healthy)
    found = audit.survey(dataset, FRONTEND)
    assert found.problems == 0
    assert found.examples == {"train": 24, "validation": 8, "test": 8}
    assert found.counts == {"train": [12, 12], "validation": [4, 4], "test": [4, 4]}
    seconds = 0.1 + 0.01 * np.arange(40)
    want = [*np.percentile(seconds, (0, 50, 95, 100)), seconds.sum() / 3600]
    np.testing.assert_allclose(found.durations, want, rtol=1e-9)  # whole samples, all of them multiples of 10 ms
    assert (found.rates, found.channels) == ({16000: 40}, {1: 40})
    assert found.max_length == 48  # 0.49 s have 47 frames; the longest but two, 0.47 s, have 45
    assert found.few == []
    assert found.small == {"validation": 8, "test": 8}
    assert found.lines()[0] == "examples    40 in 2 classes: train 24, validation 8, test 8"
    assert found.lines()[-1] == "no problems"
    assert json.loads(json.dumps(found.to_json_dict()))["problems"] == 0


def plant(folder, what):
    """Plant a fault and return the attribute of the survey that must report it, its length, and a part of its text."""
    train, test = folder / "train" / "a", folder / "test" / "a"
    if what == "unreadable":
        (train / "bad.wav").write_text("no sound")
        return "bad", 1, "bad.wav: not a readable sound file"
    if what == "too short":
        write(train / "bad.wav", np.zeros(100))
        return "bad", 1, "bad.wav: only 6.2 ms long"
    if what == "cut":
        whole = write(train / "bad.flac", noise(2.0, 77)).read_bytes()
        (train / "bad.flac").write_bytes(whole[: len(whole) // 2])
        return "bad", 1, "bad.flac: not a readable sound file"
    if what == "silent":
        write(train / "bad.wav", 0.2 + 1e-5 * noise(0.3, 77))  # a constant and a step of dither
        return "silent", 1, "bad.wav"
    if what == "NaN":
        spoiled = noise(0.3, 77)
        spoiled[[3, 5, 4000]] = np.nan, np.inf, -np.inf
        write(train / "bad.wav", spoiled, subtype="FLOAT")
        return "not_finite", 1, "bad.wav: 3 samples"
    if what == "leak":  # 0 is in train; another name and another format
        samples, rate = soundfile.read(train / "0.wav")
        write(test / "copy.flac", samples, rate)
        return "leaks", 1, "copy.flac"
    write(test.parent / "new" / "1.wav", noise(0.3, 77))
    return "unlearned", 1, "new"


@pytest.mark.parametrize("what", ["unreadable", "too short", "cut", "silent", "NaN", "leak", "unlearned"])
def test_a_planted_fault_is_found_and_nothing_else(what, healthy):
    name, count, part = plant(healthy, what)
    found = audit.survey(read_dataset(healthy), FRONTEND)
    assert len(getattr(found, name)) == count
    assert part in str(getattr(found, name))
    assert found.problems == 1
    lines = found.lines()
    assert lines[-1] == "problems: 1"
    heading = next(index for index, line in enumerate(lines) if line.startswith("problem: "))
    assert lines[heading].endswith(": 1")
    assert part in lines[heading + 1]
    content = json.loads(json.dumps(found.to_json_dict()))
    assert part in json.dumps(content[name])


def test_warnings_are_not_problems(healthy):
    train = healthy / "train" / "a"
    samples, rate = soundfile.read(train / "0.wav")
    write(train / "again.wav", samples, rate)
    loud = np.clip(noise(0.3, 77, level=1.0), -1, 1)
    write(train / "loud.wav", loud)
    for number in range(2):
        write(healthy / "train" / "rare" / f"{number}.wav", noise(0.3, 80 + number))
    found = audit.survey(read_dataset(healthy), FRONTEND)
    assert found.problems == 0
    assert found.duplicates == [[("train", str(train / "0.wav")), ("train", str(train / "again.wav"))]]
    assert found.clipped == [str(train / "loud.wav")]
    assert found.few == ["rare"]
    assert found.missing == {"train": [], "validation": ["rare"], "test": ["rare"]}
    text = "\n".join(found.lines())
    for part in ("duplicates within a split: 1", "clipped: 1", "fewer than 10 training examples: 1",
                 "classes without an example in test: 1", "\n  rare",
                 "fewer than 100 clips: 2", "test: one clip of 8 is 12.5 %"):  # fmt: skip
        assert part in text


def test_groups_and_files_in_several_splits_are_leaks(tmp_path):
    lines = ["path,label,split,start,end,group"]
    for number in range(6):
        write(tmp_path / f"{number}.wav", noise(0.3, number))
    lines += ["0.wav,a,train,,,anna", "1.wav,b,train,,,ben", "2.wav,a,test,,,anna", "3.wav,b,test,,,carl"]
    lines += ["4.wav,a,train,0,0.1,", "4.wav,a,validation,0.1,0.2,", "5.wav,a,train,,,", "5.wav,b,train,0.1,0.2,"]
    (tmp_path / "manifest.csv").write_text("\n".join(lines))
    found = audit.survey(read_dataset(tmp_path), FRONTEND)
    assert found.shared == ["anna: train, test", f"{tmp_path / '4.wav'}: train, validation"]
    assert found.problems == 2
    assert found.duplicates == [], "parts that differ are other sounds"


def test_segments_are_measured_not_their_files(tmp_path):
    path = write(tmp_path / "1.wav", np.r_[np.zeros(16000), noise(1.0)])
    parts = [Example(path, (0,), 0.0, 0.5), Example(path, (1,), 1.0, 1.5), Example(path, (0,), 3.0)]
    found = audit.survey(DataSet(("a", "b"), {"train": parts, "validation": [], "test": []}), FRONTEND)
    assert found.silent == [parts[0].name]
    assert found.bad == [f"{parts[2].name}: expected a sound from 3 s on, but it ends at 2.00 s"]
    np.testing.assert_allclose(found.durations[:4], 0.5, rtol=1e-12)
    assert found.missing == {"train": []}


def test_rates_and_channels_are_counted(tmp_path):
    for number in range(3):
        write(tmp_path / "a" / f"{number}.wav", noise(0.1, number, 44100), 44100)
    write(tmp_path / "b" / "x.wav", noise(0.2, 9).reshape(-1, 2))
    write(tmp_path / "b" / "y.wav", noise(0.1, 10))
    found = audit.survey(read_dataset(tmp_path), FRONTEND)
    assert (found.rates, found.channels) == ({44100: 3, 16000: 2}, {1: 4, 2: 1})
    lines = found.lines()
    assert "rates       44100 Hz (3), 16000 Hz (2)" in lines
    assert "channels    1 (4), 2 (1)" in lines


def test_survey_without_readable_clips(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        for number in range(4):
            (tmp_path / name / f"{number}.wav").write_text("no sound")
    found = audit.survey(read_dataset(tmp_path), FRONTEND)
    assert found.problems == 8
    assert found.max_length is found.durations is None
    assert found.lines()[-1] == "problems: 8"
    assert "  ... and 3 more" in found.lines()
    json.dumps(found.to_json_dict())


def test_the_survey_does_not_depend_on_threads_and_reports_progress(healthy):
    plant(healthy, "leak")
    dataset, calls = read_dataset(healthy), []
    one = audit.survey(dataset, FRONTEND, num_threads=1, advance=lambda: calls.append(1))
    assert one == audit.survey(dataset, FRONTEND, num_threads=5)
    assert len(calls) == 41


def test_a_table_of_many_classes_shows_the_rarest():
    labels = tuple(f"class {number}" for number in range(80))
    train = [Example(pathlib.Path("none"), (number,)) for number in range(80) for _ in range(80 - number)]
    found = audit.survey(DataSet(labels, {"train": train[:-1], "validation": [], "test": []}), FRONTEND)
    table = [line for line in found.lines() if line.startswith(("class ", "the 50"))]
    assert table[0].split() == ["the", "50", "rarest", "classes", "train", "validation", "test"]
    assert table[1].split() == ["class", "79", "0", "0", "0"]
    assert table[-1].split() == ["class", "30", "50", "0", "0"]
    assert len({len(line) for line in table}) == 1, "aligned"


@pytest.mark.parametrize(
    ("frames", "length", "reason"),
    [
        ([1, 5, 9], 16, "3 of 3 clips fit in full; the longest has 9 frames"),
        ([98] * 10, 112, "10 of 10 clips fit in full; the longest has 98 frames"),
        ([98] * 95 + [500] * 5, 112, "95 of 100 clips fit in full; the longest has 500 frames"),
        ([98] * 94 + [500] * 6, 512, "100 of 100 clips fit in full; the longest has 500 frames"),
        ([998] * 20, 1008, "20 of 20 clips fit in full; the longest has 998 frames"),
        ([3000] * 20, 1024, "0 of 20 clips fit in full; the longest has 3000 frames"),
    ],
)
def test_suggested_lengths(frames, length, reason):
    found = suggest_max_length(np.array(frames))
    assert found == (length, reason)
    assert ASTConfig(max_length=found[0]).grid[1] >= 1, "the model takes it"


def test_the_suggested_length_covers_the_clips(examples):
    """`load_example` does not truncate a clip at the suggested length."""
    dataset = DataSet(("a", "b"), {"train": examples, "validation": [], "test": []})
    found = audit.survey(dataset, FRONTEND)
    frontend = FRONTEND.replace(max_length=found.max_length)
    for example in examples[6:]:
        frames = fbank.num_frames(len(decode(example.path).samples), frontend)
        assert fbank.num_frames(len(load_example(example, frontend)), frontend) == frames
