"""What mkdocs.yml asks for beside docs/: research pages, tutorials, and the two pages at the root.

Pages link to each other as they lie in the repository, so that they work on GitHub, too. Here their
links are turned to where the site has them. Tutorials are shown from their saved notebooks: text,
code, printed output and static pictures. Nothing of the site is loaded from elsewhere.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md")
LINK = re.compile(r"\]\((?!https?:|#)([^)\s#]+)(#[^)\s]*)?\)")


def notebook_page(path: Path) -> tuple[str, dict[str, str]]:
    """A saved notebook as Markdown, and its pictures by file name."""
    lines: list[str] = []
    pictures: dict[str, str] = {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            lines += [source, ""]
            continue
        lines += ["```python", source, "```", ""]
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/svg+xml" in data:
                name = f"{path.stem}-{len(pictures) + 1}.svg"
                pictures[name] = "".join(data["image/svg+xml"])
                lines += [f"![What this cell draws]({name})", ""]
            elif text := "".join(output.get("text", data.get("text/plain", ""))):
                lines += ["```text", text.rstrip(), "```", ""]
    return "\n".join(lines), pictures


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add what lies outside docs/."""
    from mkdocs.structure.files import File

    for path in sorted((ROOT / "research").rglob("*")):
        if path.suffix in (".md", ".csv", ".py"):
            where = path.relative_to(ROOT).as_posix()
            files.append(File(where, str(ROOT), config.site_dir, config.use_directory_urls))
    for name in PAGES:
        files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    for path in sorted((ROOT / "tutorials").glob("*.ipynb")):
        text, pictures = notebook_page(path)
        made = {f"{path.stem}.md": text, **pictures}
        for name, content in made.items():
            files.append(File.generated(config, f"tutorials/{name}", content=content))
    return files


def on_page_markdown(markdown: str, *, page: Page, files: Files, **_: Any) -> str:
    """Turn links between folders of the repository to where the site has the pages."""
    own = page.file.src_uri
    folder = Path(own).parent if "/" in own or own in PAGES else Path("docs")

    def moved(match: re.Match[str]) -> str:
        target, anchor = match[1], match[2] or ""
        lies = (ROOT / folder / target).resolve()
        if not lies.is_relative_to(ROOT):
            return match[0]
        where = lies.relative_to(ROOT).as_posix()
        where = re.sub(r"^docs/", "", where) if where.startswith("docs/") else where
        where = re.sub(r"^(tutorials/.*)\.ipynb$", r"\1.md", where)
        if where == "README.md":
            where = "index.md"
        if lies.is_dir():  # on GitHub its list of files
            where = "research/README.md"
        if files.get_file_from_path(where) is None:
            return match[0]
        up = "../" * own.count("/")
        return f"]({up}{where}{anchor})"

    return LINK.sub(moved, markdown)


SHIM = '<script src="https://unpkg.com/iframe-worker/shim"></script>'
"""What the theme would load for searches in pages opened from disk."""


def on_post_page(output: str, *, page: Page, **_: Any) -> str:
    """Load the stand-in for workers from the site itself instead."""
    up = "../" * page.url.count("/")
    return output.replace(SHIM, f'<script src="{up}worker.js"></script>')


def on_post_template(output_content: str, **_: Any) -> str:
    """The page for what is not found needs none."""
    return output_content.replace(SHIM, "")
