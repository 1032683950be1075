"""`qkit inspect --html`: the same as a page that needs nothing else, with a search over the rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from qkit.chat import template
from qkit.core.batching import IGNORED
from qkit.core.files import write_text
from qkit.data.inspection.screen import histogram, suspects
from qkit.data.inspection.view import Inspection, columns_shown, token_texts
from qkit.plugins.task import ShownRow, open_task
from qkit.recipe.schema import SPLITS

ROWS = 2000  # of each split: about 3 MB of page for rows of 300 tokens
DROPPED = 500
READ = 256  # rows at a time


Segment = list[Any]  # [kind, text]; kind: 1 trained, 2 special, 3 both, 0 neither


def write(inspection: Inspection, file: Path) -> None:
    """Write the page."""
    import jinja2

    tokenizer = open_task(inspection.recipe.task).tokenizer(inspection.recipe)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("qkit.data.inspection", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    splits = {split: list(_rows(inspection, split, tokenizer)) for split in SPLITS}
    page = environment.get_template("inspect.html.j2").render(
        summary=inspection.summary,
        checks=suspects(inspection.summary["checks"]),
        passed=[check for check in inspection.summary["checks"] if check["status"] == "pass"],
        skipped=[check for check in inspection.summary["checks"] if check["status"] == "skipped"],
        histogram=list(histogram(inspection.summary["lengths"], inspection.recipe.data.max_length)),
        rows=_json({split: rows for split, rows in splits.items() if rows}),
        dropped=list(_dropped(inspection)),
        limit=ROWS,
    )
    write_text(file, page)


def _json(value: Any) -> str:
    """JSON that may stand in a script element: nothing in it ends the element or opens a comment."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _rows(inspection: Inspection, split: str, tokenizer: Any) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as pq

    task, special = open_task(inspection.recipe.task), frozenset(template.special_ids(tokenizer).values())
    with pq.ParquetFile(inspection.folder / f"{split}.parquet") as opened:
        batches = opened.iter_batches(READ, columns=columns_shown(opened))
        rows = (row for batch in batches for row in batch.to_pylist())
        for row in islice(rows, ROWS):
            shown = task.shown(row)
            segments = list(_segments(shown, special, tokenizer))
            yield {"place": row["place"], "tokens": len(shown.input_ids), "segments": segments}


def _segments(row: ShownRow, special: frozenset[int], tokenizer: Any) -> Iterator[Segment]:
    """Tokens of one kind in a row, as one text; before a part that has a title, the title."""
    last: Segment | None = None
    texts = token_texts(tokenizer, row.input_ids)
    for place, (token, label, text) in enumerate(zip(row.input_ids, row.labels, texts, strict=True)):
        kind = int(label != IGNORED) + 2 * (token in special)
        titled = place in row.titles
        if titled and last:
            yield last
        if titled:
            yield [0, f"\n[{row.titles[place]}] "]
            last = None
        if last is None or last[0] != kind:
            if last:
                yield last
            last = [kind, ""]
        last[1] += text
    if last:
        yield last


def _dropped(inspection: Inspection) -> Iterator[Mapping[str, Any]]:
    """Records that are not used, and why."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    ledger = pq.read_table(
        inspection.folder / "ledger.parquet", columns=["source", "line", "split", "reason", "status"]
    )
    yield from ledger.filter(pc.equal(ledger["status"], "dropped")).slice(0, DROPPED).to_pylist()
