"""Streaming decode: bit-identical to `read_audio`, from files, arrays and pipes."""

import os
import pathlib
import threading

import numpy as np
import pytest
import soundfile

import ast_jax
from ast_jax.audio.streams import BLOCK_SECONDS, ENCODINGS, Live, mono_blocks

SOUNDS = pathlib.Path(ast_jax.__file__).parent / "sounds"


def noise(seconds, rate, channels=1):
    return 0.1 * np.random.default_rng(0).standard_normal((round(seconds * rate), channels)).astype(np.float32)


@pytest.mark.parametrize("ending", ["wav", "flac", "ogg", "mp3"])
@pytest.mark.parametrize(("rate", "channels"), [(16000, 1), (44100, 2), (8000, 1)])
def test_blocks_equal_the_whole_file(tmp_path, ending, rate, channels):
    path = tmp_path / f"noise.{ending}"
    soundfile.write(path, noise(3.3 * BLOCK_SECONDS, rate, channels), rate)
    blocks = list(mono_blocks(path, 16000))
    assert len(blocks) >= 4
    rounding = 1e-6 if ending == "mp3" else 0  # mpg123 rounds the last bit otherwise where a read begins
    np.testing.assert_allclose(np.concatenate(blocks), ast_jax.read_audio(path), rtol=0, atol=rounding)


def test_an_array_is_resampled_as_a_file(tmp_path):
    samples = noise(5, 22050)[:, 0]
    soundfile.write(tmp_path / "noise.wav", samples, 22050, subtype="FLOAT")
    got = np.concatenate(list(mono_blocks(samples, 16000, 22050)))
    np.testing.assert_array_equal(got, ast_jax.read_audio(tmp_path / "noise.wav"))


def through_a_pipe(content, **fields):
    """Return the blocks of content that is written into a pipe."""
    read_end, write_end = os.pipe()

    def feed():
        with os.fdopen(write_end, "wb") as pipe:
            pipe.write(content)

    thread = threading.Thread(target=feed)
    thread.start()
    try:
        return list(mono_blocks(Live(read_end, **fields), 16000))
    finally:
        os.close(read_end)
        thread.join()


@pytest.mark.parametrize("size", [b"\xff\xff\xff\xff", None])
def test_wav_through_a_pipe(tmp_path, size):
    """Also with the size that ffmpeg writes for an unknown length."""
    path = tmp_path / "noise.wav"
    soundfile.write(path, noise(1, 44100), 44100)
    content = path.read_bytes()
    if size:
        data = content.index(b"data") + 4
        content = content[:4] + size + content[8:data] + size + content[data + 4 :]
    blocks = through_a_pipe(content)
    assert len(blocks) > 10  # blocks are short, so that windows are complete without delay
    np.testing.assert_array_equal(np.concatenate(blocks), ast_jax.read_audio(path))


@pytest.mark.parametrize(
    ("encoding", "dtype", "scale"),
    [("s16le", "<i2", 2**15), ("s16be", ">i2", 2**15), ("s32le", "<i4", 2**31), ("f32le", "<f4", 1),
     ("f64le", "<f8", 1)],
)  # fmt: skip
def test_raw_samples_through_a_pipe(encoding, dtype, scale):
    stereo = noise(0.5, 16000, 2)
    raw = (stereo * scale).astype(dtype)
    got = np.concatenate(through_a_pipe(raw.tobytes(), encoding=encoding, channels=2))
    want = (raw.astype(np.float64) / scale).mean(1)
    np.testing.assert_allclose(got, want, atol=1e-6)  # float32 roundings of the mean


@pytest.mark.parametrize("encoding", ["s24le", "u8", "alaw", "mulaw"])
def test_other_encodings_equal_libsndfile(tmp_path, encoding):
    subtype, endian = ENCODINGS[encoding]
    path = tmp_path / "noise.raw"
    soundfile.write(path, noise(0.5, 16000), 16000, format="RAW", subtype=subtype, endian=endian)
    got = np.concatenate(through_a_pipe(path.read_bytes(), encoding=encoding))
    np.testing.assert_allclose(got, noise(0.5, 16000)[:, 0], atol=0.02)  # 8 bits


@pytest.mark.parametrize("content", [b"", b"this is no sound", b"RIFF"])
def test_invalid_pipes(content):
    with pytest.raises(
        ast_jax.AudioError, match="-: expected WAV, or raw samples with their encoding, rate and channels"
    ):
        through_a_pipe(content)


def test_a_regular_file_behind_a_descriptor(tmp_path):
    """Including an MP3 file without a frame count, of which libsndfile alone would read the start only."""
    soundfile.write(tmp_path / "noise.mp3", noise(20, 16000), 16000)
    content = (tmp_path / "noise.mp3").read_bytes()
    place = max(content.find(b"Xing"), content.find(b"Info"))
    assert place > 0
    (tmp_path / "noise.mp3").write_bytes(content[:place] + b"none" + content[place + 4 :])
    with (tmp_path / "noise.mp3").open("rb") as file:
        got = np.concatenate(list(mono_blocks(Live(file.fileno()), 16000)))
    want = ast_jax.read_audio(tmp_path / "noise.mp3")
    assert len(got) == len(want) >= 19 * 16000


def test_an_empty_raw_pipe():
    with pytest.raises(ast_jax.AudioError, match="-: there are no samples in it"):
        through_a_pipe(b"", encoding="s16le")


def test_an_unknown_encoding():
    with pytest.raises(ValueError, match=r"raw samples: expected one of s16le, .*, got 'mp3'"):
        Live(encoding="mp3")


def test_invalid_samples_late_in_a_sound(tmp_path):
    samples = noise(3 * BLOCK_SECONDS, 16000)[:, 0]
    samples[-5:] = np.nan
    soundfile.write(tmp_path / "late.wav", samples, 16000, subtype="FLOAT")
    blocks = mono_blocks(tmp_path / "late.wav", 16000)
    assert len(next(blocks)) == BLOCK_SECONDS * 16000
    with pytest.raises(ast_jax.AudioError, match=r"late\.wav: 5 of 32000 samples from 4\.00 s on are NaN or Inf"):
        list(blocks)


def test_an_abandoned_stream_closes_the_file():
    before = len(os.listdir("/proc/self/fd"))
    blocks = mono_blocks(SOUNDS / "speech.flac", 8000)
    next(blocks)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    blocks.close()
    assert len(os.listdir("/proc/self/fd")) == before
