"""Numbers of a benchmark on the disk, and what has moved since others were written."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

NOISE = 0.03  # of the median: less is no movement, however narrow the spread


def finish(
    rows: Sequence[dict[str, Any]],
    machine: str,
    json_file: pathlib.Path | None,
    against: pathlib.Path | None,
    **more: Any,
) -> None:
    """Write the numbers and compare them with others, where either is wanted.

    Args:
        rows: with "case", "contender", "median", "low" and "high" (quartiles), and more.
        machine: that they are of.
        json_file: where to write.
        against: a file that this function wrote.
        more: what else to write.

    Raises:
        SystemExit: something of ours is slower, with status 1; or `against` is no such file.
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
        raise SystemExit(f"{against}: expected numbers that --json wrote, got {error}") from error
    if before["machine"] != machine:
        print(f"{against} is of another machine: {before['machine']}")
    found = list(moved(old, rows))
    print(*[line for _, line in found] or [f"nothing has moved beyond the spread of {against}"], sep="\n")
    if any(slower for slower, _ in found):
        raise SystemExit(1)


def moved(old: dict[tuple[str, str], dict[str, Any]], rows: Sequence[dict[str, Any]]) -> Iterator[tuple[bool, str]]:
    """Yield whether something of ours is slower, and a line, for what is beyond the spread of both measurements.

    Quartiles that do not overlap, and medians that are further apart than `NOISE`, are no accident of a few seconds; a
    machine that is busier as a whole moves the other contenders too, which are listed for that.
    """
    for row in rows:
        before = old.get((row["case"], row["contender"]))
        if before is None:
            continue
        change = row["median"] / before["median"] - 1
        apart = row["low"] > before["high"] or row["high"] < before["low"]
        if apart and abs(change) > NOISE:
            ours = row["contender"].startswith("ast")
            yield change > 0 and ours, f"{row['case']}: {row['contender']} takes {change:+.0%} of the time before"
