"""Synthesised sounds and signal operations for the data of `sounds-tiny`.

A synthesis function takes a NumPy random generator and a length in samples, and returns a float32 waveform at `RATE`
with a peak of at most 1. `at_peak` and `at_snr` set levels.
"""

from __future__ import annotations

import numpy as np
from scipy import signal

RATE = 16000

Rng = np.random.Generator


def times(length: int) -> np.ndarray:
    """Return the sample times of a waveform of `length` samples, in seconds."""
    return np.arange(length) / RATE


def rms(wave: np.ndarray) -> float:
    """Return the root mean square of a waveform."""
    return float(np.sqrt(np.mean(np.square(wave, dtype=np.float64)) + 1e-20))


def decibels(level: float) -> float:
    """Return the amplitude ratio of a level in dB."""
    return float(10.0 ** (level / 20.0))


def at_peak(wave: np.ndarray, level: float) -> np.ndarray:
    """Scale `wave` to a peak of `level` dBFS."""
    peak = float(np.max(np.abs(wave), initial=0.0))
    return (wave * (decibels(level) / max(peak, 1e-9))).astype(np.float32)


def at_snr(wave: np.ndarray, other: np.ndarray, snr: float) -> np.ndarray:
    """Mix `wave` with `other` of the same length at a signal-to-noise ratio of `snr` dB."""
    mixed = wave + other * (rms(wave) / rms(other) / decibels(snr))
    peak = float(np.max(np.abs(mixed)))
    return (mixed / max(peak, 1.0)).astype(np.float32)


def sweep(frequency: np.ndarray, phase: float = 0.0) -> np.ndarray:
    """Return the phase in radians of a tone with a frequency for each sample."""
    return phase + 2 * np.pi * np.cumsum(frequency) / RATE


def harmonics(phase: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return a sum of harmonics of `phase` with the given weights."""
    return sum(w * np.sin((k + 1) * phase) for k, w in enumerate(weights))


def gate(length: int, on: float, off: float, edge: float = 0.004) -> np.ndarray:
    """Return an on-off envelope with `on` and `off` in seconds and soft edges."""
    square = (np.mod(times(length), on + off) < on).astype(np.float64)
    width = max(2, int(edge * RATE))
    return signal.lfilter(np.ones(width) / width, [1.0], square)


# ----------------------------------------------------------------- noise


def coloured(rng: Rng, length: int, slope: float) -> np.ndarray:
    """Return coloured noise, whose power falls by `slope` dB per octave."""
    spectrum = np.fft.rfft(rng.standard_normal(length))
    frequency = np.maximum(np.fft.rfftfreq(length, 1 / RATE), 20.0)
    spectrum *= (frequency / 20.0) ** (-slope / 6.02)
    return np.fft.irfft(spectrum, length)


def band_noise(rng: Rng, length: int) -> np.ndarray:
    """Return white noise in a random band at least an octave wide."""
    low = float(rng.uniform(50, 2500))
    high = float(min(7900.0, low * rng.uniform(2.0, 12.0)))
    sos = signal.butter(3, [low, high], "bandpass", fs=RATE, output="sos")
    return signal.sosfilt(sos, rng.standard_normal(length))


def hum(rng: Rng, length: int) -> np.ndarray:
    """Return mains hum with its harmonics over a broadband hiss."""
    phase = sweep(np.full(length, rng.choice([50.0, 60.0])), rng.uniform(0, 6))
    tone = harmonics(phase, rng.uniform(0, 1, 12) / np.arange(1, 13))
    hiss = coloured(rng, length, rng.uniform(0, 3))
    return tone / rms(tone) + hiss / rms(hiss) * rng.uniform(0.5, 2.0)


def gusts(rng: Rng, length: int) -> np.ndarray:
    """Return wind: low-frequency noise with slowly varying level and colour."""
    low = coloured(rng, length, rng.uniform(4, 8))
    high = coloured(rng, length, rng.uniform(1, 4))
    drift = 0.6 + 0.4 * np.sin(2 * np.pi * rng.uniform(0.1, 0.8) * times(length) + rng.uniform(0, 6))
    return low / rms(low) + high / rms(high) * drift


def crackle(rng: Rng, length: int) -> np.ndarray:
    """Return static: hiss with random clicks."""
    hiss = coloured(rng, length, rng.uniform(0, 3))
    clicks = rng.standard_normal(length) * (rng.random(length) < rng.uniform(2e-4, 4e-3))
    return hiss / rms(hiss) + clicks * rng.uniform(2, 10)


def noise(rng: Rng, length: int) -> np.ndarray:
    """Return noise of a random kind: coloured, band-limited, hum, wind or static."""
    kind = rng.choice(["coloured", "band", "hum", "gusts", "crackle"], p=[0.5, 0.15, 0.1, 0.15, 0.1])
    if kind == "coloured":
        wave = coloured(rng, length, float(rng.choice([0.0, 3.0, 6.0, rng.uniform(-2, 7)])))
    elif kind == "band":
        wave = band_noise(rng, length)
    elif kind == "hum":
        wave = hum(rng, length)
    elif kind == "gusts":
        wave = gusts(rng, length)
    else:
        wave = crackle(rng, length)
    return at_peak(wave, 0.0)


def silence(rng: Rng, length: int) -> np.ndarray:
    """Return digital silence, or inaudible noise and hum (-96 to -66 dBFS RMS)."""
    if rng.random() < 0.2:
        return np.zeros(length, np.float32)
    wave = noise(rng, length)
    return (wave / rms(wave) * decibels(rng.uniform(-96, -66))).astype(np.float32)


# ----------------------------------------------------------------- tones


def siren_track(rng: Rng, length: int) -> np.ndarray:
    """Return the frequency of a siren over time: wail, yelp, hi-lo, whoop or air raid."""
    t = times(length) + rng.uniform(0, 10)
    low = rng.uniform(300, 1100)
    high = low * rng.uniform(1.3, 2.8)
    kind = rng.choice(["wail", "yelp", "hilo", "whoop", "raid"])
    if kind == "wail":
        cycle = np.mod(t / rng.uniform(2.0, 7.0), 1.0)
        rise = rng.uniform(0.2, 0.7)
        shape = np.where(cycle < rise, cycle / rise, (1 - cycle) / (1 - rise))
        shape = np.sin(np.pi / 2 * shape) if rng.random() < 0.6 else shape
    elif kind == "yelp":
        shape = 0.5 + 0.5 * signal.sawtooth(2 * np.pi * rng.uniform(1.5, 7) * t, rng.uniform(0.1, 1.0))
    elif kind == "hilo":
        high = low * rng.uniform(1.12, 1.5)
        shape = (np.mod(t / rng.uniform(0.6, 1.8), 1.0) < 0.5).astype(np.float64)
    elif kind == "whoop":
        low = rng.uniform(120, 900)
        high = low * rng.uniform(1.5, 5)
        shape = np.mod(t / rng.uniform(0.4, 2.5), 1.0) ** rng.uniform(0.4, 2.0)
    else:
        low, high = rng.uniform(80, 350), rng.uniform(350, 1000)
        swing = np.mod(t / rng.uniform(5.0, 16.0), 1.0)
        shape = np.sin(np.pi * swing) ** rng.uniform(0.4, 1.2)
    return low + (high - low) * shape


def one_siren(rng: Rng, length: int) -> np.ndarray:
    """Return a single siren: an overdriven horn or a harmonic tone."""
    phase = sweep(siren_track(rng, length))
    if rng.random() < 0.4:
        return np.tanh(rng.uniform(1, 8) * np.sin(phase))
    count = int(rng.integers(2, 20))
    falling = np.arange(1, count + 1) ** rng.uniform(0.3, 1.2)
    return lowpass(harmonics(phase, rng.uniform(0.2, 1, count) / falling), rng.uniform(1500, 7500))


def siren(rng: Rng, length: int) -> np.ndarray:
    """Return one or two sirens with a level ramp, reverberation and street noise."""
    wave = one_siren(rng, length)
    if rng.random() < 0.2:
        wave = wave + one_siren(rng, length) * rng.uniform(0.3, 1.0)
    if rng.random() < 0.5:
        wave = wave * np.linspace(rng.uniform(0.2, 1), rng.uniform(0.2, 1), length)
    wave = reverb(rng, wave) if rng.random() < 0.6 else wave
    wave = tilt(rng, wave) if rng.random() < 0.3 else wave
    if rng.random() < 0.6:
        street = coloured(rng, length, rng.uniform(0, 6))
        wave = wave / rms(wave) + street / rms(street) * decibels(-rng.uniform(12, 35))
    return at_peak(wave, 0.0)


def beep_pitches(rng: Rng) -> np.ndarray:
    """Return the pitches of 24 beeps: all equal, two alternating, or all different."""
    first = float(np.exp(rng.uniform(np.log(250), np.log(4500))))
    kind = rng.random()
    if kind < 0.6:
        return np.full(24, first)
    if kind < 0.8:
        return np.tile([first, first * rng.uniform(0.6, 1.6)], 12)
    return np.exp(rng.uniform(np.log(300), np.log(3500), 24))


def beep(rng: Rng, length: int) -> np.ndarray:
    """Return beeps: single, repeated or Morse code; from sine to buzzer and chord, dry or with reverberation."""
    wave = np.zeros(length)
    at = int(rng.uniform(0, 0.15) * length)
    unit = float(np.exp(rng.uniform(np.log(0.05), np.log(0.5))))
    morse = rng.random() < 0.2
    off = int(unit * RATE / 2) if morse else int(rng.choice([0.0, rng.uniform(0.04, 0.5)], p=[0.15, 0.85]) * RATE)
    weights = rng.uniform(0, 1, int(rng.integers(1, 8)))
    weights[0] = 1.0
    decay = rng.choice([0.0, 0.0, rng.uniform(1, 12)])
    second = rng.uniform(1.1, 2.7) if rng.random() < 0.25 else 0.0  # frequency ratio of a second tone
    for pitch in beep_pitches(rng)[: int(rng.integers(1, 24 if unit < 0.12 else 9))]:
        on = int(unit * RATE * (rng.choice([0.5, 1.5]) if morse else 1.0))
        stop = min(at + on, length)
        if stop - at < 200:
            break
        index = np.arange(stop - at)
        tone = harmonics(sweep(np.full(stop - at, pitch)), weights[: max(1, int(7800 / pitch))])
        if second:
            tone = tone + rng.uniform(0.2, 1.0) * np.sin(sweep(np.full(stop - at, min(pitch * second, 7500.0))))
        wave[at:stop] += tone * np.minimum(1.0, np.minimum(index, index[::-1]) / 48) * np.exp(-decay * index / RATE)
        at = stop + off
    wave = reverb(rng, wave) if rng.random() < 0.3 else wave
    wave = tilt(rng, wave) if rng.random() < 0.3 else wave
    if rng.random() < 0.4:
        hiss = coloured(rng, length, rng.uniform(0, 4))
        wave = wave + hiss / rms(hiss) * rms(wave) * decibels(-rng.uniform(5, 40))
    return at_peak(wave, 0.0)


DTMF_LOW = (697.0, 770.0, 852.0, 941.0)
DTMF_HIGH = (1209.0, 1336.0, 1477.0, 1633.0)
LINE_TONES = ((350.0, 440.0), (440.0, 480.0), (480.0, 620.0), (425.0, 425.0), (400.0, 450.0))
CADENCES = ((100.0, 0.1), (0.5, 0.5), (0.25, 0.25), (2.0, 4.0), (1.0, 4.0), (0.4, 0.2), (1.0, 2.0))


def dialling(rng: Rng, length: int) -> np.ndarray:
    """Return DTMF dialling."""
    wave = np.zeros(length)
    on, off = int(rng.uniform(0.06, 0.3) * RATE), int(rng.uniform(0.04, 0.25) * RATE)
    at = int(rng.uniform(0, 0.2) * RATE)
    while at + on < length:
        t = times(on)
        wave[at : at + on] = np.sin(2 * np.pi * rng.choice(DTMF_LOW) * t) + np.sin(
            2 * np.pi * rng.choice(DTMF_HIGH) * t
        )
        at += on + off
    return wave


def line_tone(rng: Rng, length: int) -> np.ndarray:
    """Return a dial, ring-back or busy tone."""
    first, second = LINE_TONES[int(rng.integers(len(LINE_TONES)))]
    on, off = CADENCES[int(rng.integers(len(CADENCES)))]
    t = times(length)
    wave = np.sin(2 * np.pi * first * t) + np.sin(2 * np.pi * second * t + 1.0)
    wave = wave * np.roll(gate(length, on, off), int(rng.uniform(0, 0.6) * RATE))
    return wave + 0.003 * rng.standard_normal(length)


def bell_ring(rng: Rng, length: int) -> np.ndarray:
    """Return a bell ringer: a clapper that strikes two gongs 14 to 32 times per second."""
    rate = rng.uniform(14, 32)
    wave = np.zeros(length)
    gongs = []
    for base in rng.uniform(900, 2600, 2):
        t = times(int(0.5 * RATE))
        partials = base * np.array(
            [1.0, rng.uniform(1.3, 1.7), rng.uniform(2.0, 2.9), rng.uniform(3.2, 4.5), rng.uniform(4.6, 5.6)]
        )
        partials = partials[partials < 7800]
        gongs.append(
            sum(rng.uniform(0.2, 1) * np.sin(2 * np.pi * p * t) * np.exp(-t * rng.uniform(4, 25)) for p in partials)
        )
    ring = rng.uniform(0.8, 2.2)
    for index, start in enumerate(np.arange(rng.uniform(0, 0.3), length / RATE, 1 / rate)):
        if np.mod(start, ring + 1.0) < ring:
            at = int(start * RATE)
            stroke = gongs[index % 2][: length - at]
            wave[at : at + len(stroke)] += stroke * rng.uniform(0.7, 1.0)
    return wave + 0.01 * rng.standard_normal(length) * np.abs(wave).max()


def warble(rng: Rng, length: int) -> np.ndarray:
    """Return an electronic ringer: two or three alternating tones, on and off."""
    tones = rng.uniform(600, 2600) * np.array([1.0, rng.uniform(1.1, 1.4), rng.uniform(1.2, 1.6)])
    index = (times(length) * rng.uniform(16, 44)).astype(int) % int(rng.integers(2, 4))
    wave = harmonics(sweep(tones[index]), rng.uniform(0, 1, 4) / np.arange(1, 5) + np.eye(4)[0])
    return wave * np.roll(gate(length, rng.uniform(0.4, 2.0), rng.uniform(0.2, 2.0)), int(rng.uniform(0, 0.3) * RATE))


def telephone(rng: Rng, length: int) -> np.ndarray:
    """Return a telephone: dialling, line tone, bell or electronic ringer."""
    maker = (dialling, line_tone, bell_ring, warble)[int(rng.choice(4, p=[0.2, 0.3, 0.3, 0.2]))]
    return at_peak(maker(rng, length), 0.0)


SCALES = ((0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10), (0, 2, 4, 7, 9), (0, 3, 5, 7, 10))


def melody(rng: Rng, length: int) -> np.ndarray:
    """Return a melody with chords, by additive synthesis."""
    wave = np.zeros(length)
    scale = SCALES[int(rng.integers(len(SCALES)))]
    root = rng.integers(40, 64)
    beat = rng.uniform(0.12, 0.5)
    decay = rng.uniform(0.3, 6)
    weights = rng.uniform(0, 1, 8) / np.arange(1, 9) ** rng.uniform(0.5, 1.6)
    weights[0] = 1.0
    for step, start in enumerate(np.arange(0, length / RATE, beat)):
        degree = int(rng.integers(0, 2 * len(scale)))
        chord = [degree] if step % 4 else [degree, degree + 2, degree + 4][: int(rng.integers(1, 4))]
        for note in chord:
            octave, place = divmod(note, len(scale))
            pitch = 440 * 2 ** ((root + 12 * octave + scale[place] - 69) / 12)
            at = int(start * RATE)
            t = times(min(length - at, int(beat * RATE * rng.uniform(0.8, 3))))
            tone = harmonics(2 * np.pi * pitch * t, weights[: max(1, int(7500 / pitch))])
            attack = np.minimum(1.0, t / 0.01)
            release = np.minimum(1.0, t[::-1] / 0.02)
            wave[at : at + len(t)] += tone * np.exp(-decay * t) * attack * release
    return at_peak(reverb(rng, wave), 0.0)


# ------------------------------------------------------------ conditions


def band(wave: np.ndarray, low: float, high: float) -> np.ndarray:
    """Apply a band-pass filter."""
    sos = signal.butter(4, [low, high], "bandpass", fs=RATE, output="sos")
    return signal.sosfilt(sos, wave)


def lowpass(wave: np.ndarray, high: float) -> np.ndarray:
    """Apply a low-pass filter at `high` Hz, as of a lower sampling rate."""
    sos = signal.cheby2(10, 60, high, fs=RATE, output="sos")
    return signal.sosfilt(sos, wave)


def reverb(rng: Rng, wave: np.ndarray) -> np.ndarray:
    """Add reverberation with a reverberation time of 0.1 to 0.6 s."""
    tail = times(int(rng.uniform(0.1, 0.6) * RATE))
    room = rng.standard_normal(len(tail)) * np.exp(-6.9 * tail / tail[-1])
    wet = signal.fftconvolve(wave, room)[: len(wave)]
    return wave / rms(wave) + wet / rms(wet) * rng.uniform(0.1, 0.6)


def tilt(rng: Rng, wave: np.ndarray) -> np.ndarray:
    """Apply random, smooth equalisation of up to 9 dB."""
    spectrum = np.fft.rfft(wave)
    octave = np.log2(np.maximum(np.fft.rfftfreq(len(wave), 1 / RATE), 60.0) / 60.0)
    curve = np.interp(octave, np.arange(8), rng.uniform(-9, 9, 8))
    return np.fft.irfft(spectrum * 10 ** (curve / 20), len(wave))


def degrade(rng: Rng, wave: np.ndarray) -> np.ndarray:
    """Apply one random recording condition.

    The conditions are the same for every label, so that neither bandwidth nor reverberation predicts the label.
    """
    kind = rng.choice(["telephone", "8k", "11k", "reverb", "tilt", "mulaw"])
    if kind == "telephone":
        wave = band(wave, rng.uniform(200, 350), rng.uniform(3000, 3600))
    elif kind == "8k":
        wave = lowpass(wave, 4000)
    elif kind == "11k":
        wave = lowpass(wave, 5500)
    elif kind == "reverb":
        wave = reverb(rng, wave)
    elif kind == "tilt":
        wave = tilt(rng, wave)
    else:
        wave = mulaw(at_peak(lowpass(wave, 4000), -1.0))
    return wave.astype(np.float32)


def mulaw(wave: np.ndarray) -> np.ndarray:
    """Apply 8-bit mu-law coding."""
    coded = np.sign(wave) * np.log1p(255 * np.abs(wave)) / np.log(256)
    coded = np.round(coded * 127) / 127
    return np.sign(coded) * np.expm1(np.abs(coded) * np.log(256)) / 255
