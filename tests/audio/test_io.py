"""`read_audio`: formats, rates, channels, kinds of source, slices; one line per unusable file."""

import io
import os
import pathlib
import threading

import librosa
import numpy as np
import pytest
import soundfile

from ast_jax import AudioError, read_audio
from ast_jax.audio.io import decode, describe, header_seconds, to_mono

RATE = 16000


def sine(rate=RATE, seconds=1.0, frequency=1000.0, amplitude=0.5):
    return amplitude * np.sin(2 * np.pi * frequency * np.arange(round(rate * seconds)) / rate)


def noise(count=RATE, channels=None, seed=0):
    shape = count if channels is None else (count, channels)
    return (0.1 * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def encode(samples, rate=RATE, kind="WAV", subtype=None):
    """Return a sound file's bytes."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype=subtype)
    return file.getvalue()


# What each coding loses: half a step of the integer (rounding down: one), or what a lossy codec leaves of a sine.
LOSSLESS = {("WAV", "PCM_16"): 2**-15, ("WAV", "PCM_24"): 2**-23, ("WAV", "FLOAT"): 0, ("FLAC", "PCM_16"): 2**-15,
            ("FLAC", "PCM_24"): 2**-23, ("WAV", "PCM_U8"): 2**-7}  # fmt: skip


@pytest.mark.parametrize(("kind", "subtype"), LOSSLESS, ids="-".join)
def test_lossless_formats(kind, subtype):
    samples = noise()
    got = read_audio(encode(samples, kind=kind, subtype=subtype))
    assert got.dtype == np.float32
    assert got.shape == samples.shape
    assert np.abs(got - samples).max() <= LOSSLESS[kind, subtype] * (1 + 1e-6)


@pytest.mark.parametrize("kind", ["MP3", "OGG"])
def test_lossy_formats(kind):
    samples = sine().astype(np.float32)
    got = read_audio(encode(samples, kind=kind))
    assert got.shape == samples.shape, "the encoder's delay and padding are cut off"
    # the codec's own noise; a delay of one sample would make 39 %
    assert np.std((got - samples)[800:-800]) < 0.05 * np.std(samples)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 32000, 44100, 48000, 96000])
def test_resampling_keeps_frequency_amplitude_and_phase(rate):
    got = read_audio(encode(sine(rate), rate, subtype="FLOAT"))
    assert got.dtype == np.float32
    assert len(got) == RATE
    # soxr's high quality is good for 20 bits (1e-6); the ends, within its filter's length, see the silence around
    assert np.abs(got - sine())[400:-400].max() < 1e-5


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_resampling_is_librosas_default(rate):
    samples = noise(rate // 2)
    got = read_audio(encode(samples, rate, subtype="FLOAT"))
    np.testing.assert_allclose(got, librosa.resample(samples, orig_sr=rate, target_sr=RATE), rtol=0, atol=1e-7)


def test_frequencies_above_the_new_nyquist_frequency_are_removed():
    got = read_audio(encode(sine(44100, frequency=10000), 44100, subtype="FLOAT"))
    assert np.abs(got[400:-400]).max() < 1e-5


def test_other_target_rate():
    got = read_audio(encode(sine(44100), 44100, subtype="FLOAT"), sampling_rate=8000)
    assert np.abs(got - sine(8000))[400:-400].max() < 1e-5


@pytest.mark.parametrize("channels", [1, 2, 6])
@pytest.mark.parametrize("rate", [RATE, 44100])
def test_channels_are_averaged(channels, rate):
    samples = noise(rate, channels)
    got = read_audio(encode(samples, rate, subtype="FLOAT"))
    want = read_audio(encode(samples.mean(1), rate, subtype="FLOAT"))
    assert got.shape == (RATE,)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-7)  # a float32 rounding of values below 1


def test_loud_float_samples_are_not_clipped():
    samples = 4 * noise()
    assert np.abs(samples).max() > 1
    np.testing.assert_array_equal(read_audio(encode(samples, subtype="FLOAT")), samples)


def test_every_kind_of_source(tmp_path):
    data = encode(noise(), kind="FLAC")
    path = tmp_path / "sound.flac"
    path.write_bytes(data)
    want = read_audio(path)
    assert len(want) == RATE
    for source in (str(path), data, bytearray(data), memoryview(data), io.BytesIO(data)):
        np.testing.assert_array_equal(read_audio(source), want)
    with path.open("rb") as file:
        np.testing.assert_array_equal(read_audio(file), want)
        assert not file.closed
    relative = pathlib.Path(os.path.relpath(path))
    np.testing.assert_array_equal(read_audio(relative), want)


@pytest.mark.parametrize("name", ["two words.wav", "ein Hund, groß.wav", "犬の声.wav", "%41#?.wav", "no-ending"])
def test_names(tmp_path, name):
    (tmp_path / name).write_bytes(encode(noise()))
    assert len(read_audio(tmp_path / name)) == RATE
    assert len(read_audio(str(tmp_path / name))) == RATE


def test_the_format_is_detected_from_the_content(tmp_path):
    (tmp_path / "really flac.mp3").write_bytes(encode(noise(), kind="FLAC"))
    assert len(read_audio(tmp_path / "really flac.mp3")) == RATE


UNKNOWN = "not a readable sound file (Format not recognised)"
BROKEN = {
    "empty.wav": (b"", "the file is empty"),
    "text.wav": (
        b"This is no sound, whatever its name says.\n" * 20,
        "not a readable sound file (Format not recognised)",
    ),
    "picture.flac": (b"\x89PNG\r\n\x1a\n" + bytes(300), "not a readable sound file (Format not recognised)"),
    "zeros.wav": (bytes(1000), "not a readable sound file (Format not recognised)"),
    "half a header.wav": (encode(noise())[:20], "not a readable sound file (Error in WAV"),
    "header only.wav": (encode(noise())[:44], "there are no samples in it"),
    "no samples.wav": (encode(np.zeros(0)), "there are no samples in it"),
    "no frame.mp3": (b"\xff\xfb\x90", UNKNOWN),
    "cut.flac": (encode(noise(), kind="FLAC")[:9000], "not a readable sound file (flac decoder lost sync)"),
    "one sample.wav": (encode(np.zeros(1)), "only 0.1 ms long; at least 25 ms are needed"),
    "20 ms.wav": (encode(np.zeros(320)), "only 20.0 ms long; at least 25 ms are needed"),
    "20 ms at 44.1 kHz.wav": (encode(np.zeros(882), 44100), "only 20.0 ms long; at least 25 ms are needed"),
    "nan.wav": (encode(np.r_[noise(), [np.nan] * 3], subtype="FLOAT"), "3 of 16003 samples are NaN or Inf"),
    "inf.wav": (encode(np.r_[noise(), np.inf, -np.inf], subtype="FLOAT"), "2 of 16002 samples are NaN or Inf"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_one_line_with_their_name(tmp_path, name):
    content, message = BROKEN[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(AudioError) as caught:
        read_audio(path)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)
    if content:
        for source, called in ((content, "<bytes>"), (io.BytesIO(content), "<BytesIO>")):
            with pytest.raises(AudioError) as caught:
                read_audio(source)
            assert str(caught.value).startswith(f"{called}: {message}")


HIDDEN = {"cut.flac", "nan.wav", "inf.wav"}  # only decoding shows what is wrong with these


@pytest.mark.parametrize("name", BROKEN)
def test_header_errors_without_decoding(tmp_path, name):
    content, message = BROKEN[name]
    path = tmp_path / name
    path.write_bytes(content)
    if name in HIDDEN:
        assert header_seconds(path) > 0.9
        return
    with pytest.raises(AudioError) as caught:
        header_seconds(path)
    assert str(caught.value).startswith(f"{path}: {message}")


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3"])
def test_header_seconds_is_the_duration(tmp_path, kind):
    path = tmp_path / f"sound.{kind.lower()}"
    path.write_bytes(encode(noise(), 22050, kind=kind))
    assert abs(header_seconds(path) - decode(path).duration) < 1e-9
    assert header_seconds(path.read_bytes()) == header_seconds(path)
    assert abs(header_seconds(path) - RATE / 22050) < 0.06  # MP3 pads to whole frames of 26 ms


@pytest.mark.parametrize("tag", [b"", b"ID3\x03\x00\x00\x00\x00\x01\x00" + bytes(128)], ids=["bare", "ID3"])
def test_mp3_of_varying_rate_without_a_count_is_read_to_its_end(tag, tmp_path):
    """libsndfile alone estimates 1.7 s of these 10."""
    sound = np.r_[noise(), np.zeros(9 * RATE, np.float32)]
    file = io.BytesIO()
    soundfile.write(file, sound, RATE, format="MP3", bitrate_mode="VARIABLE")
    counted = file.getvalue()
    bare = counted[counted.index(counted[:2], 4) :]  # without the first frame, which has the count
    assert soundfile.info(io.BytesIO(bare)).duration < 3
    path = tmp_path / "vbr.mp3"
    path.write_bytes(tag + bare)
    for source in (path, path.read_bytes(), io.BytesIO(path.read_bytes())):
        assert abs(len(read_audio(source)) / RATE - 10) < 0.1
    beginning = decode(path, max_seconds=1)
    assert len(beginning.samples) == RATE
    assert abs(beginning.duration - 10) < 0.1


def test_memory_is_not_allocated_by_the_header():
    data = bytearray(encode(noise(), kind="FLAC"))
    assert data[:4] == b"fLaC"
    data[21] |= 0x0F  # the 36 bits of the sample count in STREAMINFO
    data[22:26] = b"\xff\xff\xff\xfe"
    with pytest.raises(AudioError):
        read_audio(bytes(data))


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.wav: no such file$"):
        read_audio(tmp_path / "nothing.wav")
    with pytest.raises(AudioError, match=r": expected a sound file, got a folder$"):
        read_audio(tmp_path)


@pytest.mark.parametrize("source", [None, 3, 1.5, ["a.wav"], np.zeros(RATE, np.float32)])
def test_invalid_sources_are_refused(source):
    """libsndfile would take an integer for a file descriptor."""
    with pytest.raises(AudioError, match=r"expected a path, the bytes of a sound file, or a binary file object$"):
        read_audio(source)


def test_empty_bytes_are_refused():
    with pytest.raises(AudioError, match=r"^<bytes>: there are no bytes in it$"):
        read_audio(b"")


def test_25_ms_is_enough():
    for rate in (8000, 16000, 22050, 44100, 48000):
        got = read_audio(encode(np.zeros(int(np.ceil(0.025 * rate))), rate))
        assert len(got) >= 400, "one frame of the filter bank"


@pytest.mark.parametrize(("kind", "kept"), [("WAV", 0.5), ("MP3", 0.5), ("OGG", 0.75)])
def test_truncated_files_are_read_to_their_end(tmp_path, kind, kept):
    """A truncated FLAC file is an error (BROKEN above); these formats have no such check."""
    data = encode(noise(4 * RATE), kind=kind)
    whole = read_audio(data)
    path = tmp_path / f"cut.{kind.lower()}"
    path.write_bytes(data[: int(kept * len(data))])
    sound = decode(path)
    assert 0.3 * len(whole) < len(sound.samples) <= (kept + 0.05) * len(whole)
    assert sound.duration == len(sound.samples) / RATE, "not what the header says"
    # a lossy codec's last frame overlaps with one that is missing
    np.testing.assert_allclose(sound.samples[:-2000], whole[: len(sound.samples) - 2000], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3"])
@pytest.mark.parametrize("rate", [RATE, 44100])
def test_beginning_equals_the_whole_cut(kind, rate):
    data = encode(noise(2 * rate), rate, kind)
    whole = decode(data)
    assert whole.sampling_rate == RATE
    assert whole.duration == pytest.approx(2.0)
    beginning = decode(data, max_seconds=0.5)
    assert len(beginning.samples) == 8000
    assert beginning.duration == whole.duration, "of the whole source"
    np.testing.assert_allclose(beginning.samples, whole.samples[:8000], rtol=0, atol=1e-6)


@pytest.mark.parametrize("max_seconds", [2.0, 1.0, 0.99, 0.96])
def test_beginning_of_a_sound_about_as_long(max_seconds):
    sound = decode(encode(noise(), subtype="FLOAT"), max_seconds=max_seconds)
    assert sound.duration == 1.0
    np.testing.assert_array_equal(sound.samples, noise()[: round(max_seconds * RATE)])


@pytest.mark.parametrize("start", [1, 1999, 8000, 24321, 31600])
@pytest.mark.parametrize(("kind", "subtype"), [("WAV", "FLOAT"), ("WAV", "MS_ADPCM"), ("FLAC", None), ("AIFF", None)])
def test_a_start_is_exact_to_the_sample(kind, subtype, start):
    data = encode(noise(2 * RATE), kind=kind, subtype=subtype)
    whole = decode(data)
    rest = decode(data, start_seconds=start / RATE)
    np.testing.assert_array_equal(rest.samples, whole.samples[start:])
    assert rest.duration == whole.duration, "of the whole source"
    part = decode(data, max_seconds=0.025, start_seconds=start / RATE)
    np.testing.assert_array_equal(part.samples, whole.samples[start : start + 400])


@pytest.mark.parametrize("kind", ["OGG", "MP3"])
def test_a_start_in_lossy_formats(kind):
    """Their decoders restart some frames before the requested position, without an audible difference."""
    data = encode(noise(4 * RATE), kind=kind)
    whole = decode(data).samples
    for start in (1, 7777, 20001, 40000):
        rest = decode(data, start_seconds=start / RATE).samples
        assert len(rest) == len(whole) - start
        # the same arithmetic but for where its float32 sums begin
        np.testing.assert_allclose(rest, whole[start:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 44099])
def test_a_start_at_other_rates_is_the_slice_of_the_whole_resampled(rate):
    data = encode(noise(3 * rate, channels=2), rate, subtype="FLOAT")
    whole = decode(data).samples
    for start_seconds in (0.01, 0.05, 0.333, 1.23456, 2.9):
        first = round(start_seconds * RATE)
        rest = decode(data, start_seconds=start_seconds).samples
        assert len(rest) == len(whole) - first
        # soxr's high quality is good for 20 bits of what lies below 1
        np.testing.assert_allclose(rest, whole[first:], rtol=0, atol=1e-6)
        part = decode(data, max_seconds=0.075, start_seconds=start_seconds).samples
        np.testing.assert_allclose(part, whole[first : first + 1200], rtol=0, atol=1e-6)


def test_a_start_in_an_unseekable_source(tmp_path):
    """An MP3 file without a frame count is read through a pipe."""
    file = io.BytesIO()
    soundfile.write(file, noise(2 * RATE), RATE, format="MP3", bitrate_mode="VARIABLE")
    counted = file.getvalue()
    data = counted[counted.index(counted[:2], 4) :]
    whole, part = decode(data), decode(data, max_seconds=0.5, start_seconds=1.0)
    np.testing.assert_array_equal(part.samples, whole.samples[RATE : RATE + 8000])
    assert part.duration == whole.duration


@pytest.mark.parametrize(
    ("start_seconds", "message"),
    [
        (1.0, "expected a sound from 1 s on, but it ends at 1.00 s"),
        (7.5, "expected a sound from 7.5 s on, but it ends at 1.00 s"),
        (0.99, "only 10.0 ms long from 0.99 s on; at least 25 ms are needed"),
        (-1.0, "expected to start at 0 s or later, got -1 s"),
    ],
)
@pytest.mark.parametrize("rate", [RATE, 44100])
@pytest.mark.parametrize("max_seconds", [None, 0.5])
def test_a_start_beyond_the_end_is_one_line(start_seconds, message, rate, max_seconds):
    with pytest.raises(AudioError) as caught:
        decode(encode(noise(rate), rate), max_seconds=max_seconds, start_seconds=start_seconds)
    assert str(caught.value) == f"<bytes>: {message}"


def test_to_mono_checks_samples():
    np.testing.assert_array_equal(to_mono(noise(), RATE, RATE), noise())
    assert to_mono(noise().astype(np.float64), 8000, RATE).dtype == np.float32
    with pytest.raises(AudioError, match=r"^clip: 1 of 32000 samples are NaN or Inf$"):
        to_mono(np.r_[noise(2 * RATE - 1), np.nan].reshape(-1, 2), RATE, RATE, "clip")
    with pytest.raises(AudioError, match=r"^sound: there are no samples in it$"):
        to_mono(np.zeros((0, 2), np.float32), RATE, RATE)


def test_names_in_messages(tmp_path):
    assert describe("a/b.wav") == "a/b.wav"
    assert describe(pathlib.PurePosixPath("a/b.wav")) == "a/b.wav"
    assert describe(b"RIFF") == "<bytes>"
    assert describe(io.BytesIO()) == "<BytesIO>"
    (tmp_path / "text.wav").write_text("no sound")
    with (tmp_path / "text.wav").open("rb") as file, pytest.raises(AudioError, match=r"text\.wav: not a readable"):
        read_audio(file)


def test_flac_without_a_length(tmp_path):
    """As encoders write it into a pipe: the 36-bit total in STREAMINFO is zero."""
    sound = np.sin(np.arange(48000) / 20).astype(np.float32) / 2
    soundfile.write(tmp_path / "whole.flac", sound, 16000)
    content = bytearray((tmp_path / "whole.flac").read_bytes())
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    (tmp_path / "stream.flac").write_bytes(content)
    for max_seconds in (None, 1.0):
        with pytest.raises(AudioError, match="does not hold the length"):
            decode(tmp_path / "stream.flac", max_seconds=max_seconds)


def test_a_name_that_is_too_long_is_a_clear_error():
    with pytest.raises(AudioError, match="cannot be opened"):
        decode("x" * 5000)


def test_pipes_and_unseekable_file_objects_are_read_to_their_end(tmp_path):
    data = encode(noise(4 * RATE))  # more than a pipe holds
    want = read_audio(data)
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=[data])
    writer.start()
    np.testing.assert_array_equal(read_audio(tmp_path / "pipe"), want)
    writer.join()

    class Response(io.BytesIO):
        def seekable(self):
            return False

    np.testing.assert_array_equal(read_audio(Response(data)), want)


def test_file_objects_that_cannot_be_read_are_one_line(tmp_path):
    ends = os.pipe()
    os.close(ends[1])
    with open(ends[0], "rb") as pipe, pytest.raises(AudioError, match=r"^<BufferedReader>: there are no bytes in it$"):
        read_audio(pipe)
    with pytest.raises(AudioError, match=r"^<BufferedReader>: cannot be read \(.*closed file"):
        read_audio(pipe)
    with pytest.raises(AudioError, match=r"^<StringIO>: expected a binary file object, got one that reads str$"):
        read_audio(io.StringIO("text"))


def test_a_name_that_is_not_utf8(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.wav")
    pathlib.Path(path).write_bytes(encode(noise()))
    np.testing.assert_array_equal(read_audio(path), read_audio(encode(noise())))
    pathlib.Path(path).write_bytes(b"no sound")
    with pytest.raises(AudioError, match="not a readable sound file"):
        read_audio(path)
