"""Benchmark results as JSON files, and their comparison with earlier results."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

NOISE = 0.03  # relative difference of medians that is ignored, however narrow the quartiles


def finish(
    rows: Sequence[dict[str, Any]],
    machine: str,
    json_file: pathlib.Path | None,
    against: pathlib.Path | None,
    **more: Any,
) -> None:
    """Write results to a file and compare them with earlier ones, each if its path is given.

    Args:
        rows: results, each with "case", "contender", "median", "low" and "high" (quartiles), and more.
        machine: description of the machine.
        json_file: file to write.
        against: file that this function wrote.
        more: further content of the file.

    Raises:
        SystemExit: an ast_jax contender became slower (status 1), or `against` is not such a file.
    """
    if json_file is not None:
        content = {"machine": machine, **more, "results": list(rows)}
        json_file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if against is None:
        return
    try:
        before = json.loads(against.read_text(encoding="utf-8"))
        old = {(row["case"], row["contender"]): row for row in before["results"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{against}: expected results that --json wrote, got {error}") from error
    if before["machine"] != machine:
        print(f"{against} is of another machine: {before['machine']}")
    found = list(changes(old, rows))
    print(*[line for _, line in found] or [f"no change beyond the spread of {against}"], sep="\n")
    if any(slower for slower, _ in found):
        raise SystemExit(1)


def changes(old: dict[tuple[str, str], dict[str, Any]], rows: Sequence[dict[str, Any]]) -> Iterator[tuple[bool, str]]:
    """Yield, for each significant change, whether an ast_jax contender became slower, and a line of text.

    A change is significant if the quartiles do not overlap and the medians differ by more than `NOISE`. Changes of the
    other contenders are listed too, as they show that the whole machine was slower.
    """
    for row in rows:
        before = old.get((row["case"], row["contender"]))
        if before is None:
            continue
        change = row["median"] / before["median"] - 1
        apart = row["low"] > before["high"] or row["high"] < before["low"]
        if apart and abs(change) > NOISE:
            ours = row["contender"].startswith("ast")
            more = f"{abs(change):.0%} {'more' if change > 0 else 'less'} time"
            yield change > 0 and ours, f"{row['case']}: {row['contender']} takes {more}"
