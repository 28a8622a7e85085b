"""Writes the JSON schema of task files, by which editors complete and check them.

python scripts/make_schema.py
"""

from __future__ import annotations

from mansu_interp.tasks.schema import json_schema
from mansu_interp.utils.files import write_json
from mansu_interp.utils.shipped import DATA

FILE = DATA / "task.schema.json"

if __name__ == "__main__":
    write_json(FILE, json_schema())
