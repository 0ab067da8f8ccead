"""Pictures of a recording as PNG: its spectrogram with a timeline of labels, and explanations of a model's scores."""

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

COLUMNS = 1500  # at most, in the spectrogram of a timeline
ROWS = 15  # labels at most, in a timeline
COLORMAP = "magma"
CLOCK_STEPS = [1, 1.5, 2, 3, 6, 10]  # between ticks, times a power of ten: whole minutes and hours among them


def check_place(path: pathlib.Path) -> None:
    """Check that a picture can be drawn and written, before the work that it needs.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: matplotlib or librosa is missing.
    """
    check_folder_of(path)
    with drawing():
        _librosa()


def _librosa() -> Any:
    """Import librosa, which takes a second, only where a spectrogram is drawn.

    Raises:
        ValueError: it is missing.
    """
    try:
        import librosa.display
    except ImportError as error:
        raise ValueError("pictures need librosa; install it with: pip install 'ast-jax[plots]'") from error
    return librosa


def timeline_picture(
    found: Analysis,
    frontend: FrontendConfig,
    path: str | pathlib.Path,
    threshold: float,
    low: float | None = None,
    source: Any = None,
) -> None:
    """Write `timeline_figure` as a PNG, atomically.

    Args:
        found: scores of the recording's windows.
        frontend: feature settings of the model.
        path: of the picture.
        threshold: as in `Analysis.timeline`.
        low: as in `Analysis.timeline`.
        source: the recording, which is decoded again; None for the file that `found` names.
    """
    spec = overview(found.source if source is None else source, frontend, found.duration)
    save_figure(timeline_figure(found, spec, frontend, threshold, low), path)


def overview(source: AudioSource, frontend: FrontendConfig, duration: float, columns: int = COLUMNS) -> np.ndarray:
    """Return the log-mel spectrogram [T, F] of a whole recording, averaged over frames down to at most `columns`.

    Args:
        source: as `read_audio` takes it.
        frontend: settings of the filter bank.
        duration: seconds of the recording.
        columns: maximum of T.
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
    """Yield log-mel frames [T, F] of a recording as it is decoded."""
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
    """Return a figure of a recording's spectrogram and, below it, a row for each label with its segments.

    Labels are in the order of their first segments, at most `ROWS` of them. Where no score reaches the threshold, the
    best label has an empty row.

    Args:
        found: scores of the recording's windows.
        spec: log-mel features [T, F] of the whole recording.
        frontend: settings of the filter bank.
        threshold: as in `Analysis.timeline`.
        low: as in `Analysis.timeline`.

    Raises:
        ValueError: matplotlib or librosa is missing, or `low` is above the threshold.
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
        _draw_segments(figure, bottom, segments, labels)
        more = f"; {left_out} more labels are not drawn" if left_out > 0 else ""
        bottom.set_xlabel(f"{top.get_xlabel()}; segments: a score of {threshold:g} or more{more}")
        top.set_xlabel("")
    return figure


def draw_spectrogram(axes: Axes, spec: np.ndarray, frontend: FrontendConfig, duration: float, **options: Any) -> Any:
    """Draw log-mel features on axes of seconds and Hz, by `librosa.display.specshow`; return its image.

    Args:
        axes: to draw on.
        spec: [T, F], or any value of each frame and mel bin.
        frontend: settings of the filter bank.
        duration: seconds of the T frames.
        **options: of matplotlib's `pcolormesh`, such as `vmin` and `cmap`.

    Raises:
        ValueError: librosa is missing.
    """
    low = np.quantile(spec, 0.01)  # not the minimum: a filter without an FFT bin, as some banks have, is at the floor
    times = np.linspace(0, duration, len(spec) + 1)
    return _draw_cells(axes, spec.T, times, bin_edges(frontend), **{"vmin": low, **options})


def bin_edges(frontend: FrontendConfig) -> np.ndarray:
    """Return the frequencies [F + 1] between mel bins: Hz, halfway in mel between the centres of the filters."""
    frequencies = _librosa().mel_frequencies(
        2 * frontend.num_mel_bins + 3, fmin=frontend.low_freq, fmax=frontend.top_frequency, htk=True
    )  # the filters' edges and centres, in turns with what is halfway between them
    return frequencies[1::2]


def _draw_cells(axes: Axes, values: np.ndarray, times: np.ndarray, frequencies: np.ndarray, **options: Any) -> Any:
    """Draw values [F', T'] of cells with edges at times [T' + 1] and frequencies [F' + 1]; return the image."""
    duration = times[-1]
    image = _librosa().display.specshow(
        values, x_coords=times, y_coords=frequencies, x_axis="s" if duration < 60 else "m" if duration < 3600 else "h",
        y_axis="mel", ax=axes, **{"cmap": COLORMAP, **options},
    )  # fmt: skip
    axes.set(xlim=(0, duration), ylim=(frequencies[0], frequencies[-1]))
    if duration >= 60:
        from matplotlib.ticker import MaxNLocator

        axes.xaxis.set_major_locator(MaxNLocator(nbins=10, steps=CLOCK_STEPS))
    return image


def _draw_segments(figure: Figure, axes: Axes, segments: list[Segment], labels: list[str]) -> None:
    """Draw a row of segments for each label, darker for higher scores."""
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
    bar = figure.colorbar(colors, ax=axes, label="score", aspect=max(4, 3 * len(labels)))
    bar.outline.set_visible(False)


def explanation_picture(found: Explanation, path: str | pathlib.Path) -> None:
    """Write `explanation_figure` as a PNG, atomically."""
    save_figure(explanation_figure(found), path)


def explanation_figure(found: Explanation) -> Figure:
    """Return a figure of spectrogram and attention rollout, and for each label its saliency and occlusion.

    Raises:
        ValueError: matplotlib or librosa is missing.
    """
    count = len(found.labels)
    with drawing():
        figure = new_figure(11, 2.3 * (count + 1) + 0.4)
        axes = figure.subplots(count + 1, 2, sharex=True, sharey=True, squeeze=False)

        def draw_cells(axes: Axes, title: str, values: np.ndarray, *edges: np.ndarray, **options: Any) -> None:
            image = _draw_cells(axes, values, *edges, **options)
            axes.set_title(title, parse_math=False)
            figure.colorbar(image, ax=axes, aspect=15).outline.set_visible(False)

        draw_spectrogram(axes[0, 0], found.spec, found.frontend, found.duration)
        axes[0, 0].set_title("spectrogram")
        draw_cells(axes[0, 1], "attention rollout", found.rollout, *_patch_edges(found))
        highest = np.abs(found.occlusion).max() or 1.0
        cells = (
            found.cell_frames / found.cell_frames[-1] * found.duration,  # as the frames of the spectrogram are drawn
            bin_edges(found.frontend)[found.cell_bins],
        )
        for row, label in enumerate(found.labels, 1):
            title = f"{short_name(label)} {found.scores[row - 1]:.3f}"
            saliency = found.saliency[row - 1]
            limit = np.quantile(saliency, 0.995) or 1.0
            draw_spectrogram(axes[row, 0], saliency, found.frontend, found.duration, vmin=0, vmax=limit)
            axes[row, 0].set_title(f"{title}: gradient saliency", parse_math=False)
            draw_cells(
                axes[row, 1], f"{title}: drop of the logit without the cell", found.occlusion[row - 1], *cells,
                vmin=-highest, vmax=highest, cmap="RdBu_r",
            )  # fmt: skip
        for each in axes.flat:
            each.label_outer()
        where = f", from {found.start:.2f} s on" if found.start else ""
        name = short_name(pathlib.PurePath(found.source).name)
        figure.suptitle(f"{name}: {found.duration:.2f} s{where}", parse_math=False)
    return figure


def _patch_edges(found: Explanation) -> tuple[np.ndarray, np.ndarray]:
    """Return edges between the centres of patches, which overlap: seconds [T' + 1] and Hz [F' + 1]."""
    librosa, outer = _librosa(), bin_edges(found.frontend)
    centres = librosa.mel_to_hz(librosa.hz_to_mel(found.patch_frequencies, htk=True).mean(1), htk=True)
    times = _between(found.patch_times.mean(1), 0, found.duration)
    return times, _between(centres, outer[0], outer[-1])


def _between(centres: np.ndarray, low: float, high: float) -> np.ndarray:
    """Return the edges of cells halfway between their centres, from `low` to `high`."""
    return np.concatenate([[low], (centres[1:] + centres[:-1]) / 2, [high]])
