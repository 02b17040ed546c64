"""The report of a run: figures (PNG) and one self-contained page, made from the run record, and answers beside it."""
# SPDX-License-Identifier: Apache-2.0

import json
import os
from pathlib import Path

from fedlora_hf.record.answers import load_answers
from fedlora_hf.record.record import RunRecord
from fedlora_hf.util.disk import within, write_atomically

FOLDER = "report"
PAGE = "index.html"


def write_report(record: RunRecord, folder: str | os.PathLike[str]) -> list[Path]:
    """Write `folder`/report/*.png and index.html; the paths written, the page last.

    Answers that a run left in `folder`/answers.json stand in the page, in a part that no push sends.
    The page holds its figures inside itself (light and dark, wide and narrow), needs no network and no script, and
    opens from disk. A figure whose numbers are not in the record is left out, a stale one of that name is removed, and
    the page says so at its end.
    The same record and answers give the same bytes. RecordError: a field of the record is not of its type.
    """
    from fedlora_hf.report.figures import FIGURES
    from fedlora_hf.report.page import Picture, render_page
    from fedlora_hf.report.style import DARK, LIGHT, draw_png, narrowed
    from fedlora_hf.report.view import Run

    # Through JSON, so that a record in memory and the same one read back from run.json are drawn alike.
    run, target = Run.of(RunRecord.from_dict(json.loads(record.to_json()))), within(Path(folder), FOLDER)
    pictures: dict[str, Picture] = {}
    written = []
    for figure in FIGURES:
        path = target / f"{figure.name}.png"
        drawn = [draw_png(figure.draw, run, theme) for theme in (LIGHT, DARK, narrowed(LIGHT), narrowed(DARK))]
        found = [png for png in drawn if png is not None]
        if len(found) < len(drawn):
            path.unlink(missing_ok=True)
            continue
        pictures[figure.name] = Picture(*found)
        write_atomically(path, pictures[figure.name].light)
        written.append(path)
    write_atomically(target / PAGE, render_page(run, pictures, load_answers(folder)).encode())
    return [*written, target / PAGE]
