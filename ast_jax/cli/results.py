"""Output of the inference commands: results, windows and timelines as text, JSON, CSV and label tracks; progress."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from ast_jax.cli.common import json_line, one_line, write_out

if TYPE_CHECKING:
    from ast_jax.inference.sliding_window import WindowOutput
    from ast_jax.inference.timeline import Analysis, Segment

MAX_SEGMENTS = 20  # printed per file
Thresholds = tuple[float, float | None]  # of a timeline, upper and lower
_Result = TypeVar("_Result")


@contextlib.contextmanager
def results_writer(
    output: pathlib.Path | None, as_json: bool, top_k: int, thresholds: Thresholds
) -> Iterator[Callable[[Analysis], None]]:
    """Yield a function that prints a result, or adds it to a file that is there when the block ends."""
    if output is None:

        def write(found: Analysis) -> None:
            if not found.error and as_json:
                write_out(json_line(_result_json(found, top_k, thresholds)))
            elif not found.error:
                write_out(_result_text(found, top_k, thresholds))

        yield write
        return
    with _table(output) as (file, write_row):
        is_jsonl = output.suffix.lower() == ".jsonl"
        if not is_jsonl:
            best = [f"{column}_{place}" for place in range(1, top_k + 1) for column in ("label", "score")]
            write_row(["file", "duration_seconds", "windows", "error", *best])

        def write(found: Analysis) -> None:
            if is_jsonl:
                file.write(f"{json.dumps(_result_json(found, top_k, thresholds), ensure_ascii=False)}\n")
            else:
                write_row(_result_row(found, top_k))

        yield write


@contextlib.contextmanager
def timeline_writer(path: pathlib.Path | None, thresholds: Thresholds) -> Iterator[Callable[[Analysis], None]]:
    """Yield a function that adds a result's timeline to a file that is there when the block ends."""
    if path is None:
        yield lambda found: None
        return
    with _table(path) as (file, write_row):

        def write(found: Analysis) -> None:
            for segment in found.timeline(*thresholds):
                if path.suffix.lower() == ".csv":
                    times = (f"{segment.start:.3f}", f"{segment.end:.3f}")
                    write_row([found.source, *times, segment.label, f"{segment.score:.6f}"])
                elif path.suffix.lower() == ".jsonl":
                    content = {"file": found.source, **_segment_json(segment)}
                    file.write(f"{json.dumps(content, ensure_ascii=False)}\n")
                else:
                    file.write(f"{segment.start:.6f}\t{segment.end:.6f}\t{one_line(segment.label)}\n")

        if path.suffix.lower() == ".csv":
            write_row(["file", "start_seconds", "end_seconds", "label", "score"])
        yield write


@contextlib.contextmanager
def _table(path: pathlib.Path) -> Iterator[tuple[Any, Callable[[list[Any]], Any]]]:
    """Yield a text file, written atomically, and a function that adds a CSV row to it."""
    from ast_jax.runtime.files import atomic_file

    with atomic_file(path) as name, name.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        yield file, csv.writer(file).writerow


class FileProgress:
    """Progress bars: one over the files, and one over the seconds of each file of several windows."""

    def __init__(self) -> None:
        self._bar = contextlib.ExitStack()
        self._advance: Callable[[float], None] | None = None
        self._done = 0.0  # seconds

    def on_window(self, window: WindowOutput) -> None:
        """Advance the file's bar to the end of a window; the first of several windows opens it."""
        from ast_jax.runtime.progress import step

        if window.start == 0:
            total = header_duration(window.source)
            if total is not None and window.end < total:
                self._advance, self._done = self._bar.enter_context(step("seconds", total)), 0.0
        if self._advance is not None:
            self._advance(window.end - self._done)
            self._done = window.end

    def track(self, results: Iterable[_Result], num_files: int) -> Iterator[_Result]:
        """Yield the result of each file; close the file's bar before."""
        from ast_jax.runtime.progress import track

        with self._bar:
            for found in track(results, "sounds", num_files):
                self._bar.close()
                self._advance = None
                yield found


def header_duration(source: Any) -> float | None:
    """Return the seconds in the header of a regular file; None for other sources and unknown lengths."""
    from ast_jax.audio.io import header_seconds

    if not isinstance(source, str | os.PathLike) or not os.path.isfile(source):
        return None
    with contextlib.suppress(OSError, ValueError):
        return header_seconds(source)
    return None


def print_window(window: WindowOutput, labels: tuple[str, ...], top_k: int, as_json: bool) -> None:
    """Print the best labels of a window."""
    from ast_jax.inference.timeline import ranked

    best = ranked(window.output, labels, top_k)
    if as_json:
        times = {"start": round(window.start, 3), "end": round(window.end, 3)}
        write_out(json_line({**times, "predictions": _best_json(best)}))
    else:
        text = "   ".join(f"{score:.3f} {one_line(label)}" for label, score in best)
        write_out(f"{window.start:9.2f} to {window.end:9.2f} s   {text}")


def _result_text(found: Analysis, top_k: int, thresholds: Thresholds) -> str:
    """Return a result as text: the best labels and the timeline."""
    lines = [one_line(found.source) + _extent(found)]
    lines += [f"  {score:6.3f}  {one_line(label)}" for label, score in found.best(top_k)]
    if len(found.times) > 1:
        segments = found.timeline(*thresholds)
        lines += [
            f"  {segment.start:9.2f} to {segment.end:9.2f} s  {segment.score:6.3f}  {one_line(segment.label)}"
            for segment in segments[:MAX_SEGMENTS]
        ]
        if len(segments) > MAX_SEGMENTS:
            lines.append(f"  … and {len(segments) - MAX_SEGMENTS} more: --timeline FILE has them all")
    return "\n".join(lines)


def _extent(found: Analysis) -> str:
    """Describe the windows of a sound of several windows."""
    if len(found.times) < 2:
        return ""
    length, hop = found.times[0, 1] - found.times[0, 0], found.times[1, 0] - found.times[0, 0]
    every = f" every {hop:.2f} s" if len(found.times) > 2 else ""
    return f"  ({found.duration:.2f} s in {len(found.times)} windows of {length:.2f} s{every}; their {found.aggregate})"


def _result_row(found: Analysis, top_k: int) -> list[Any]:
    """Return a result as a CSV row."""
    if found.error:
        return [found.source, "", "", found.error, *[""] * (2 * top_k)]
    best = [entry for label, score in found.best(top_k) for entry in (label, f"{score:.6f}")]
    return [found.source, f"{found.duration:.3f}", len(found.times), "", *best]


def _result_json(found: Analysis, top_k: int, thresholds: Thresholds) -> dict[str, Any]:
    """Return a result as JSON; of an unusable file the error only."""
    if found.error:
        return {"file": found.source, "error": found.error}
    content: dict[str, Any] = {
        "file": found.source,
        "duration_seconds": round(found.duration, 3),
        "windows": len(found.times),
        "predictions": _best_json(found.best(top_k)),
    }
    if len(found.times) > 1:
        content["timeline"] = [_segment_json(segment) for segment in found.timeline(*thresholds)]
    return content


def _best_json(best: list[tuple[str, float]]) -> list[dict[str, Any]]:
    """Return labels and scores as JSON."""
    return [{"label": label, "score": round(score, 6)} for label, score in best]


def _segment_json(segment: Segment) -> dict[str, Any]:
    """Return a segment as JSON."""
    return {
        "start": round(segment.start, 3), "end": round(segment.end, 3), "label": segment.label,
        "score": round(segment.score, 6),
    }  # fmt: skip
