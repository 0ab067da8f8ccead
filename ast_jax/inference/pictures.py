"""Pictures of a sound, as PNG: its spectrogram with Hz and seconds, what is heard when, and why."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ast_jax.audio import fbank
from ast_jax.audio.io import AudioSource
from ast_jax.audio.streams import BLOCK_SECONDS, mono_blocks
from ast_jax.config import FrontendConfig
from ast_jax.inference.timeline import Analysis, Segment
from ast_jax.runtime.figures import GREY, drawing, new_figure, save_figure, short_name
from ast_jax.runtime.files import check_folder_of
from ast_jax.runtime.progress import track

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ast_jax.inference.explanations import Explanation

COLUMNS = 1500  # of a spectrogram that is drawn
ROWS = 15  # labels that are drawn
HERTZ = (50, 100, 200, 500, 1000, 2000, 4000, 8000, 16000)
MAP = "magma"


def check_place(path: pathlib.Path) -> None:
    """Refuse to begin what could not be drawn in the end.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: matplotlib is missing.
    """
    check_folder_of(path)
    with drawing():
        pass


def timeline_picture(
    found: Analysis,
    frontend: FrontendConfig,
    path: str | pathlib.Path,
    threshold: float,
    low: float | None = None,
    source: Any = None,
) -> None:
    """Write `timeline_figure` of a sound as a PNG, whole or not at all.

    Args:
        found: what was heard.
        frontend: of the model.
        path: of the picture.
        threshold: as in `Analysis.timeline`.
        low: as in `Analysis.timeline`.
        source: the sound, read once more; None for the file that `found` names.
    """
    spec = overview(found.source if source is None else source, frontend, found.duration)
    save_figure(timeline_figure(found, spec, frontend, threshold, low), path)


def overview(source: AudioSource, frontend: FrontendConfig, duration: float, columns: int = COLUMNS) -> np.ndarray:
    """Return the log-mel spectrogram [T, F] of a whole sound in at most so many means of frames.

    Args:
        source: as `read_audio` takes it.
        frontend: settings of the filter bank.
        duration: seconds of the sound.
        columns: the most that T may be.
    """
    frames = fbank.num_frames(round(duration * frontend.sampling_rate), frontend)
    share = -(-frames // columns)
    sums: list[np.ndarray] = []
    rest = np.zeros((0, frontend.num_mel_bins), np.float32)
    for block in track(_log_mel_blocks(source, frontend), "spectrogram", math.ceil(duration / BLOCK_SECONDS)):
        rest = np.concatenate([rest, block])
        whole = len(rest) // share
        sums.extend(rest[: whole * share].reshape(whole, share, rest.shape[1]).mean(1))
        rest = rest[whole * share :]
    if len(rest):
        sums.append(rest.mean(0))
    return np.stack(sums)


def _log_mel_blocks(source: AudioSource, frontend: FrontendConfig) -> Iterator[np.ndarray]:
    """Yield log-mel frames [T, F] of a sound as it is read."""
    settings = frontend.replace(dither=0.0)
    window, shift = frontend.window_samples, frontend.shift_samples
    held = np.zeros(0, np.float32)
    any_frame = False
    for block in mono_blocks(source, frontend.sampling_rate):
        held = np.concatenate([held, block])
        if len(held) >= window:
            any_frame = True
            yield fbank.log_mel(held, settings)
            held = held[fbank.num_frames(len(held), settings) * shift :]
    if not any_frame:
        yield fbank.log_mel(held, settings)


def timeline_figure(
    found: Analysis, spec: np.ndarray, frontend: FrontendConfig, threshold: float, low: float | None = None
) -> Figure:
    """Return a sound's spectrogram, and under it a row for each label with the stretches in which it is heard.

    Labels come in the order of their first stretch, at most `ROWS` of them; where nothing reaches the threshold, the
    best label has an empty row.

    Args:
        found: what was heard.
        spec: log-mel features [T, F] of the whole sound.
        frontend: settings of the filter bank.
        threshold: as in `Analysis.timeline`.
        low: as in `Analysis.timeline`.

    Raises:
        ValueError: matplotlib is missing, or `low` is above the threshold.
    """
    segments = found.timeline(threshold, low)
    labels = list(dict.fromkeys(segment.label for segment in segments)) or [found.best(1)[0][0]]
    left_out = len(labels) - ROWS
    labels = labels[:ROWS]
    with drawing():
        figure = new_figure(10, 3.2 + 0.28 * len(labels))
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[2.4, 0.28 * len(labels) + 0.1])
        draw_spectrogram(top, spec, frontend, found.duration)
        top.set_title(short_name(pathlib.PurePath(found.source).name), parse_math=False)
        top.set_xlabel("")
        _draw_segments(figure, bottom, segments, labels, found.duration)
        more = f"; {left_out} more labels are not drawn" if left_out > 0 else ""
        bottom.set_xlabel(f"{bottom.get_xlabel()} (heard: a score of {threshold:g} or more{more})")
    return figure


def draw_spectrogram(axes: Axes, spec: np.ndarray, frontend: FrontendConfig, duration: float, **options: Any) -> None:
    """Draw log-mel features [T, F] with Hz and seconds at their sides."""
    bins = frontend.num_mel_bins
    low = np.quantile(spec, 0.01)  # a mel bin that holds nothing, as some banks have, does not make the rest pale
    options = {"cmap": MAP, "aspect": "auto", "origin": "lower", "interpolation": "nearest", "vmin": low, **options}
    axes.imshow(spec.T, extent=(0, duration, -0.5, bins - 0.5), **options)
    shown: dict[int, float] = {}
    for hertz in HERTZ:
        place = mel_place(hertz, frontend)
        if 0 <= place <= bins - 0.5 and all(abs(place - other) > bins / 15 for other in shown.values()):
            shown[hertz] = place
    axes.set_yticks(list(shown.values()), [f"{hertz:,}" for hertz in shown])
    axes.set_ylabel("Hz")
    _time_axis(axes, duration)


def mel_place(hertz: float, frontend: FrontendConfig) -> float:
    """Return where a frequency lies among the mel bins, 0 for the centre of the first."""
    low, high = fbank.hz_to_mel(frontend.low_freq), fbank.hz_to_mel(frontend.top_frequency)
    return float((fbank.hz_to_mel(hertz) - low) / (high - low) * (frontend.num_mel_bins + 1) - 1)


def _time_axis(axes: Axes, duration: float) -> None:
    """Write seconds at the foot, or minutes or hours where there are many."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_xlim(0, duration)
    if duration < 120:
        axes.set_xlabel("seconds")
        return
    steps = [1, 1.5, 2, 3, 6, 10]
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, steps=steps))

    def clock(seconds: float, _: int) -> str:
        hours, minutes, rest = int(seconds // 3600), int(seconds // 60 % 60), int(seconds % 60)
        return f"{hours}:{minutes:02}:{rest:02}" if duration >= 3600 else f"{minutes}:{rest:02}"

    axes.xaxis.set_major_formatter(FuncFormatter(clock))
    axes.set_xlabel("hours, minutes, seconds" if duration >= 3600 else "minutes, seconds")


def _draw_segments(figure: Figure, axes: Axes, segments: list[Segment], labels: list[str], duration: float) -> None:
    """Draw a row of stretches for each label, the darker the higher their scores."""
    import matplotlib
    from matplotlib.cm import ScalarMappable

    colors = ScalarMappable(cmap=matplotlib.colormaps["Blues"])
    colors.set_clim(0, 1)
    for segment in segments:
        if segment.label in labels:
            place = labels.index(segment.label)
            extent = (segment.start, segment.end - segment.start)
            axes.broken_barh(
                [extent],
                (place - 0.38, 0.76),
                facecolors=colors.to_rgba(np.array([segment.score])),
                edgecolor=GREY,
                linewidth=0.4,
            )
    axes.set_yticks(range(len(labels)), [short_name(label) for label in labels], parse_math=False)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    _time_axis(axes, duration)
    bar = figure.colorbar(colors, ax=axes, label="score", aspect=max(4, 3 * len(labels)))
    bar.outline.set_visible(False)


def explanation_picture(found: Explanation, path: str | pathlib.Path) -> None:
    """Write `explanation_figure` as a PNG, whole or not at all."""
    save_figure(explanation_figure(found), path)


def explanation_figure(found: Explanation) -> Figure:
    """Return a sound's spectrogram and attention rollout, and for each label its saliency and its occlusion.

    Raises:
        ValueError: matplotlib is missing.
    """
    count = len(found.labels)
    with drawing():
        figure = new_figure(11, 2.3 * (count + 1) + 0.4)
        axes = figure.subplots(count + 1, 2, sharex=True, sharey=True, squeeze=False)
        draw_spectrogram(axes[0, 0], found.spec, found.frontend, found.duration)
        axes[0, 0].set_title("spectrogram")
        _draw_cells(figure, axes[0, 1], found, *_patch_edges(found), found.rollout, "attention rollout")
        highest = np.abs(found.occlusion).max() or 1.0
        for row, label in enumerate(found.labels, 1):
            title = f"{short_name(label)} {found.scores[row - 1]:.3f}"
            saliency = found.saliency[row - 1]
            limit = np.quantile(saliency, 0.995) or 1.0
            draw_spectrogram(axes[row, 0], saliency, found.frontend, found.duration, vmin=0, vmax=limit)
            axes[row, 0].set_title(f"{title}: gradient saliency", parse_math=False)
            edges = (
                found.cell_frames / found.cell_frames[-1] * found.duration,  # as the frames above are drawn
                found.cell_bins - 0.5,
            )
            _draw_cells(
                figure, axes[row, 1], found, *edges, found.occlusion[row - 1], f"{title}: logit lost without the cell",
                vmin=-highest, vmax=highest, cmap="RdBu_r",
            )  # fmt: skip
        for each in axes.flat:
            each.label_outer()
        where = f", from {found.start:.2f} s on" if found.start else ""
        name = short_name(pathlib.PurePath(found.source).name)
        figure.suptitle(f"{name}: {found.duration:.2f} s{where}", parse_math=False)
    return figure


def _patch_edges(found: Explanation) -> tuple[np.ndarray, np.ndarray]:
    """Return edges of cells around the middles of patches, which overlap: seconds [T' + 1] and mel bins [F' + 1]."""
    middles = found.patch_times.mean(1)
    places = np.vectorize(lambda hertz: mel_place(hertz, found.frontend))(found.patch_frequencies).mean(1)
    return _around(middles, 0, found.duration), _around(places, -0.5, found.frontend.num_mel_bins - 0.5)


def _around(middles: np.ndarray, low: float, high: float) -> np.ndarray:
    """Return the edges of cells around their middles, from `low` to `high`."""
    if len(middles) == 1:
        return np.array([low, high])
    return np.concatenate([[low], (middles[1:] + middles[:-1]) / 2, [high]])


def _draw_cells(
    figure: Figure, axes: Axes, found: Explanation, times: np.ndarray, places: np.ndarray, values: np.ndarray,
    title: str, **options: Any,
) -> None:  # fmt: skip
    """Draw values [F', T'] of cells over the axes of the spectrogram."""
    image = axes.pcolormesh(times, places, values, **{"cmap": MAP, **options})
    axes.set_ylim(-0.5, found.frontend.num_mel_bins - 0.5)
    axes.set_title(title, parse_math=False)
    _time_axis(axes, found.duration)
    bar = figure.colorbar(image, ax=axes, aspect=15)
    bar.outline.set_visible(False)
