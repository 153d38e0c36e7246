"""What a run writes down of its steps, whatever a kill has left of it."""

import json
from pathlib import Path

import pytest

from caption_train.files import read_json_lines
from caption_train.logs import RunLog

pytestmark = pytest.mark.tf


def test_steps_go_on_after_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo', encoding="utf-8")
    for step in (1, 2):
        with RunLog(tmp_path, step) as log:
            log.step({"step": step + 1, "loss": 1.0})
    assert [record["step"] for record in read_json_lines(path)] == [1, 2, 3]


def test_steps_after_the_checkpoint_do_not_count(tmp_path: Path) -> None:
    records = [{"step": step, "loss": 1.0} for step in (1, 2, 3)]
    (tmp_path / "steps.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    RunLog(tmp_path, 2)
    assert read_json_lines(tmp_path / "steps.jsonl") == records[:2]
