"""What `classify` prints and writes: results, windows as they come, timelines; as text, JSON, CSV and label track."""

from __future__ import annotations

import contextlib
import csv
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ast_jax.cli.common import json_line, one_line, write_out

if TYPE_CHECKING:
    from ast_jax.checkpoints.folder import Checkpoint
    from ast_jax.inference.sliding_window import Part
    from ast_jax.inference.timeline import Analysis, Segment

SEGMENTS = 20  # of a timeline that are printed
Cut = tuple[float, float | None]  # the thresholds of a timeline, high and low


@contextlib.contextmanager
def results_writer(
    output: pathlib.Path | None, as_json: bool, top_k: int, cut: Cut
) -> Iterator[Callable[[Analysis], None]]:
    """Yield what takes each result: to the terminal, or to a file that is there when all of them are in it."""
    if output is None:
        yield (
            lambda found: (
                None if found.error else _print_json(found, top_k, cut) if as_json else _print_text(found, top_k, cut)
            )
        )
        return
    with _table(output) as (file, write_row):
        if output.suffix.lower() == ".jsonl":
            yield lambda found: file.write(f"{json.dumps(_result_json(found, top_k, cut), ensure_ascii=False)}\n")
        else:
            best = [f"{what}_{place}" for place in range(1, top_k + 1) for what in ("label", "score")]
            write_row(["file", "duration_seconds", "windows", "error", *best])
            yield lambda found: write_row(_result_row(found, top_k))


@contextlib.contextmanager
def timeline_writer(path: pathlib.Path | None, cut: Cut) -> Iterator[Callable[[Analysis], None]]:
    """Yield what takes the timeline of each result, to a file that is there when all of them are in it."""
    if path is None:
        yield lambda found: None
        return
    with _table(path) as (file, write_row):

        def write(found: Analysis) -> None:
            for segment in found.timeline(*cut):
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
    """Yield a text file that is there when all is in it, and what writes a row of CSV to it."""
    from ast_jax.runtime.files import whole_file

    with whole_file(path) as name, name.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        yield file, csv.writer(file).writerow


def window_printer(checkpoint: Checkpoint, top_k: int, as_json: bool) -> Callable[[Part], None]:
    """Return what prints a window as soon as it is complete."""
    from ast_jax.inference.timeline import ranked

    def tell(part: Part) -> None:
        best = ranked(part.output, checkpoint.config.labels, top_k)
        if as_json:
            content = {"start": round(part.start, 3), "end": round(part.end, 3), "predictions": _best_json(best)}
            write_out(json_line(content))
        else:
            labels = "   ".join(f"{score:.3f} {one_line(label)}" for label, score in best)
            write_out(f"{part.start:9.2f} to {part.end:9.2f} s   {labels}")

    return tell


def _print_json(found: Analysis, top_k: int, cut: Cut) -> None:
    """Print a result as JSON."""
    write_out(json_line(_result_json(found, top_k, cut)))


def _print_text(found: Analysis, top_k: int, cut: Cut) -> None:
    """Print a result for people."""
    lines = [one_line(found.source) + _extent(found)]
    lines += [f"  {score:6.3f}  {one_line(label)}" for label, score in found.best(top_k)]
    if len(found.times) > 1:
        segments = found.timeline(*cut)
        lines += [
            f"  {segment.start:9.2f} to {segment.end:9.2f} s  {segment.score:6.3f}  {one_line(segment.label)}"
            for segment in segments[:SEGMENTS]
        ]
        if len(segments) > SEGMENTS:
            lines.append(f"  … and {len(segments) - SEGMENTS} more: --timeline FILE has them all")
    write_out("\n".join(lines))


def _extent(found: Analysis) -> str:
    """Say how a sound of several windows was heard."""
    if len(found.times) < 2:
        return ""
    length, hop = found.times[0, 1] - found.times[0, 0], found.times[1, 0] - found.times[0, 0]
    every = f" every {hop:.2f} s" if len(found.times) > 2 else ""
    return f"  ({found.duration:.2f} s in {len(found.times)} windows of {length:.2f} s{every}; their {found.aggregate})"


def _result_row(found: Analysis, top_k: int) -> list[Any]:
    """Return a result as a row of CSV."""
    if found.error:
        return [found.source, "", "", found.error, *[""] * (2 * top_k)]
    best = [entry for label, score in found.best(top_k) for entry in (label, f"{score:.6f}")]
    return [found.source, f"{found.duration:.3f}", len(found.times), "", *best]


def _result_json(found: Analysis, top_k: int, cut: Cut) -> dict[str, Any]:
    """Return a result as JSON has it; where there is an error, only that."""
    if found.error:
        return {"file": found.source, "error": found.error}
    content: dict[str, Any] = {
        "file": found.source,
        "duration_seconds": round(found.duration, 3),
        "windows": len(found.times),
        "predictions": _best_json(found.best(top_k)),
    }
    if len(found.times) > 1:
        content["timeline"] = [_segment_json(segment) for segment in found.timeline(*cut)]
    return content


def _best_json(best: list[tuple[str, float]]) -> list[dict[str, Any]]:
    """Return labels and scores as JSON has them."""
    return [{"label": label, "score": round(score, 6)} for label, score in best]


def _segment_json(segment: Segment) -> dict[str, Any]:
    """Return a stretch as JSON has it."""
    return {
        "start": round(segment.start, 3), "end": round(segment.end, 3), "label": segment.label,
        "score": round(segment.score, 6),
    }  # fmt: skip
