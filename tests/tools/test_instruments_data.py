"""The tool that renders the data set of instruments, and the comparison of fine-tuning on it."""

import dataclasses
import itertools
import pathlib
import struct
import sys

import numpy as np
import pytest

sys.path.append(str(pathlib.Path(__file__).parents[2] / "tools"))  # as for a script in that folder

import compare_finetuning
import instruments_data as tool
from sounds import cut

from ast_jax.training.config import TrainConfig
from ast_jax.training.optimizers import learning_rate_schedule

SOURCE = tool.Source("package", "font.sf2", "train", "MIT", clips=8)
ALL_PROGRAMS = {program for programs in tool.INSTRUMENTS.values() for program in programs}


def noise(seed, length=4000):
    return np.random.default_rng(seed).integers(-20_000, 20_000, length).astype(np.int16)


# ---------------------------------------------------------------- sources


def test_sources_of_the_shipped_model_are_in_training_only():
    shipped = {take.package for take in cut.read_takes()} | {cut.SOUNDFONT.split("/")[0]}
    assert {source.split for source in tool.SOURCES if source.package in shipped} == {"train"}
    assert len({source.package for source in tool.SOURCES}) == len(tool.SOURCES)
    assert {source.split for source in tool.SOURCES} == set(cut.SPLITS)


def riff(name, *parts):
    content = b"".join(parts)
    return name + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)


def soundfont(samples, instruments, presets):
    """Return a SoundFont 2 file of recordings, instruments (indices of recordings) and (program, bank, instruments)."""
    ends = np.cumsum([0, *map(len, samples)]).tolist()
    shdr = [struct.pack("<20sIIIIIBbHH", b"", a, b, 0, 0, 16000, 60, 0, 0, 1) for a, b in itertools.pairwise(ends)]
    zones = {"p": [number for *_, number in presets], "i": instruments}
    tables = {}
    for letter, generator in (("p", 41), ("i", 53)):
        flat = [index for indices in zones[letter] for index in indices]
        bags = [struct.pack("<HH", 2 * index, 0) for index in range(len(flat) + 1)]
        pairs = [struct.pack("<HHHH", 48, index, generator, index) for index in flat]  # an attenuation before each
        tables[letter] = (riff(letter.encode() + b"bag", *bags), riff(letter.encode() + b"gen", *pairs))
    starts = {letter: np.cumsum([0, *map(len, zones[letter])]).tolist() for letter in zones}
    heads = [(*preset[:2], start) for preset, start in zip([*presets, (0, 0, ())], starts["p"], strict=True)]
    phdr = [struct.pack("<20sHHHIII", b"", program, bank, start, 0, 0, 0) for program, bank, start in heads]
    inst = [struct.pack("<20sH", b"", start) for start in starts["i"]]
    sdta = riff(b"LIST", b"sdta", riff(b"smpl", *[sample.tobytes() for sample in samples]))
    pdta = riff(b"LIST", b"pdta", riff(b"phdr", *phdr), *tables["p"], riff(b"inst", *inst), *tables["i"],
                riff(b"shdr", *shdr, bytes(46)))  # fmt: skip
    return riff(b"RIFF", b"sfbk", riff(b"LIST", b"INFO", riff(b"INAM", b"odd")), sdta, pdta)


def test_soundfont_recordings_by_program(tmp_path):
    samples = [noise(seed, 50 + seed) for seed in range(4)]
    presets = [(0, 0, (0,)), (7, 0, (0, 1)), (0, 128, (2,)), (9, 0, (2,))]
    path = tmp_path / "font.sf2"
    path.write_bytes(soundfont(samples, [(0,), (2, 1), (3, 0)], presets))
    found = tool.soundfont_recordings(path)
    expected = {0: [0], 7: [0, 1, 2], 9: [0, 3]}  # bank 128 is drums
    assert {program: len(waves) for program, waves in found.items()} == {0: 1, 7: 3, 9: 2}
    for program, indices in expected.items():
        for wave, index in zip(found[program], indices, strict=True):
            np.testing.assert_array_equal(wave, samples[index])


def test_patch_recordings_of_every_kind(tmp_path):
    wave = noise(0, 64)
    coarse = (wave >> 8 << 8).astype(np.int16)
    kinds = [
        (1, wave.tobytes(), wave),
        (3, (wave.astype(np.int32) + 32768).astype(np.uint16).tobytes(), wave),
        (0, (wave >> 8).astype(np.int8).tobytes(), coarse),
        (2, ((wave >> 8) + 128).astype(np.uint8).tobytes(), coarse),
    ]
    content = bytearray(239)
    content[198] = len(kinds)
    for mode, data, _ in kinds:
        header = bytearray(96)
        struct.pack_into("<I", header, 8, len(data))
        header[55] = mode
        content += header + data
    (tmp_path / "019_Church_Organ.pat").write_bytes(content)
    (tmp_path / "readme.txt").write_text("no patch")
    found = tool.patch_recordings(tmp_path)
    assert list(found) == [19]
    for got, (_, _, expected) in zip(found[19], kinds, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_parts_of_a_recording_share_its_fingerprint_and_others_do_not():
    wave = noise(1, 20_000)
    marks = tool.fingerprint(wave)
    assert 0.8 < len(marks) / (len(wave) / 16) < 1.2  # binomial: 1250 ± 34
    part = tool.fingerprint(wave[7001:9001])
    assert len(part) > 50
    assert np.isin(part, marks).all()
    assert not np.isin(tool.fingerprint(noise(2, 20_000)), marks).any()
    assert len(tool.fingerprint(wave // 1000)) == 0  # all but silent
    assert len(tool.fingerprint(wave[: tool.WINDOW - 1])) == 0


def test_a_recording_in_two_splits_is_refused():
    test = dataclasses.replace(SOURCE, package="other", split="test")
    own = {0: [noise(0)], 4: [noise(1), noise(2)]}
    tool.check_apart({SOURCE: own, test: {0: [noise(3)]}})
    copied = {9: [np.concatenate([noise(3), noise(2)[500:1500]])]}  # a fifth of it is in program 4
    tool.check_apart({SOURCE: own, dataclasses.replace(test, split="train"): copied})
    with pytest.raises(tool.DataError, match=r"shared ones in programs (4|9); leave"):
        tool.check_apart({SOURCE: own, test: copied})


# ------------------------------------------------------------------ music


@pytest.mark.parametrize("label", tool.INSTRUMENTS)
def test_notes_are_in_the_range_and_end_in_time(label):
    rng = np.random.default_rng(0)
    kinds = set()
    for low, high in tool.INSTRUMENTS[label].values():
        for _ in range(60):
            notes = tool.draw_notes(label, low, high, rng)
            assert all(low <= note.pitch <= high and 40 <= note.velocity <= 127 for note in notes)
            assert all(0 < note.start < note.end < 1000 * tool.LENGTH / tool.RATE for note in notes)
            together = len({note.start for note in notes}) == 1 and len(notes) > 1
            assert together or all(a.end <= b.start for a, b in itertools.pairwise(notes))
            kinds.add("chord" if together else "note" if len(notes) == 1 else "phrase")
    assert kinds == ({"note", "phrase", "chord"} if label in tool.CHORDS else {"note", "phrase"})


def test_clips_depend_on_seed_and_source_and_use_what_there_is():
    clips = tool.draw_clips(SOURCE, ALL_PROGRAMS, seed=0)
    assert clips == tool.draw_clips(SOURCE, ALL_PROGRAMS, seed=0)
    assert clips != tool.draw_clips(SOURCE, ALL_PROGRAMS, seed=1)
    assert clips != tool.draw_clips(dataclasses.replace(SOURCE, package="other"), ALL_PROGRAMS, seed=0)
    assert [clip.label for clip in clips] == [label for label in tool.INSTRUMENTS for _ in range(8)]
    assert {clip.program for clip in clips} == ALL_PROGRAMS
    assert 40 not in {clip.program for clip in tool.draw_clips(SOURCE, ALL_PROGRAMS - {40}, seed=0)}
    with pytest.raises(tool.DataError, match="a program of the class Choir, got none"):
        tool.draw_clips(SOURCE, ALL_PROGRAMS - {52, 53}, seed=0)


def test_variable_lengths_of_the_midi_specification():
    known = {0: "00", 0x40: "40", 0x7F: "7f", 0x80: "8100", 0x3FFF: "ff7f", 0x4000: "818000", 0xFFFFFFF: "ffffff7f"}
    assert {value: tool.variable_length(value).hex() for value in known} == known


def read_midi(content):
    """Return (ms, message) of every event but the last, the end of track."""
    kind, size, form, tracks, division = struct.unpack(">4sIHHH", content[:14])
    assert (kind, size, form, tracks) == (b"MThd", 6, 0, 1)
    assert struct.unpack(">4sI", content[14:22]) == (b"MTrk", len(content) - 22)
    at, now, events = 22, 0, []
    while at < len(content):
        delta = 0
        while content[at] & 0x80:
            delta, at = (delta << 7) + (content[at] & 0x7F), at + 1
        now, at = now + (delta << 7) + content[at], at + 1
        status = content[at]
        length = 3 + content[at + 2] if status == 0xFF else 2 if status >> 4 == 0xC else 3
        events.append((now, content[at : at + length]))
        at += length
    (start, tempo), *events, (_, end) = events
    assert (start, tempo[:3], end) == (0, b"\xff\x51\x03", b"\xff\x2f\x00")
    scale = int.from_bytes(tempo[3:], "big") / division / 1000
    return [(when * scale, message) for when, message in events]


def test_midi_plays_each_clip_in_its_slot():
    chord = tuple(tool.Note(100, 900, pitch, 80) for pitch in (60, 64, 67))
    repeated = (tool.Note(50, 300, 40, 90), tool.Note(300, 500, 40, 100))
    clips = [tool.Clip("Organ", 19, chord), tool.Clip("Bass", 33, repeated)]
    events = read_midi(tool.midi(clips))
    for index, clip in enumerate(clips):
        begin = index * tool.SLOT
        mine = [(when - begin, message) for when, message in events if begin <= when < begin + tool.SLOT]
        assert mine[0] == (0, bytes([0xC0, clip.program]))
        assert mine[-1] == (tool.CUT_OFF, bytes([0xB0, 120, 0]))
        sounding, played = {}, []
        for when, message in mine[1:-1]:  # a pitch ends before it begins again
            if message[0] == 0x90:
                assert message[1] not in sounding
                sounding[message[1]] = when, message[2]
            else:
                start, velocity = sounding.pop(message[1])
                played.append(tool.Note(start, when, message[1], velocity))
        assert not sounding
        assert sorted(played, key=lambda note: (note.start, note.pitch)) == list(clip.notes)


def test_finished_clips_keep_their_length_and_have_a_level():
    rng = np.random.default_rng(0)
    wave = np.sin(np.arange(tool.LENGTH) * 0.2).astype(np.float32) * 0.01
    levels = [20 * np.log10(np.abs(tool.finish(wave, rng)).max()) for _ in range(40)]
    assert -20.001 < min(levels) < -15 < -6 < max(levels) < -0.999
    clip = tool.finish(wave, rng)
    assert clip.shape == wave.shape
    assert np.corrcoef(clip, wave)[0, 1] > 0.9999  # noise at -40 dB leaves 0.99995


# ------------------------------------------------------------- comparison


def test_pytorch_has_the_rates_of_ast_jax():
    training = TrainConfig(epochs=5, learning_rate=1e-3, schedule="cosine", warmup_steps=7)
    expected = learning_rate_schedule(training, steps_per_epoch=7)
    for step in range(35):
        found = 1e-3 * compare_finetuning.rate_factor(step, warmup=7, steps=35)
        assert found == pytest.approx(float(expected(step)), rel=1e-4, abs=1e-9)  # optax computes in float32


def test_summary_and_table_of_runs():
    runs = [
        {"accuracy": 0.5, "seconds": [30.0, 10.0, 10.0, 40.0], "total_seconds": 100.0},
        {"accuracy": 0.7, "seconds": [50.0, 20.0, 20.0, 20.0], "total_seconds": 120.0},
    ]
    found = compare_finetuning.summary(runs, clips=400)
    assert found["accuracy"] == pytest.approx(0.6)
    assert found["accuracy_deviation"] == pytest.approx(0.2 / 2**0.5)
    assert found["clips_per_second"] == pytest.approx((40 + 20) / 2)
    assert (found["first_epoch_seconds"], found["total_seconds"]) == (40.0, 110.0)
    text = compare_finetuning.table({"scratch": found}, {"scratch": runs})
    assert "| 60.0 ± 14.1 | 50.0, 70.0 | 30 | 40.0 | 110 |" in text
