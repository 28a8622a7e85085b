"""The example of docs/tasks.md works as typed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from mansu_interp.losses.accuracy import accuracy
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.tasks.load import load_task

PAGE = Path(__file__).resolve().parents[1] / "docs" / "tasks.md"


def test_the_example_makes_a_task_that_the_model_knows(tmp_path: Path, facts: LanguageModel):
    found = re.search(r"cat > my\.py <<'END'\n(.*?)END\n", PAGE.read_text("utf-8"), re.S)
    assert found
    done = subprocess.run(
        [sys.executable, "-c", found[1]], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    (tmp_path / "my.jsonl").write_text(done.stdout, encoding="utf-8")
    task = load_task(tmp_path / "my.jsonl", facts)
    assert len(task.forget) > 100 and not task.dropped
    assert accuracy(facts, task.scored["unseen"]["forget"]["forget"]).choice > 0.9
