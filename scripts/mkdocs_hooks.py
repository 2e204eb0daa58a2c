"""Hooks of mkdocs.yml: pages that lie outside of docs/, and links that leave it.

The pages are written for GitHub, so they link to files of the repository by relative paths. On the site, links to
RESULTS.md and CONTRIBUTING.md lead to their pages; links to source files lead to the repository, or, where its address
is not known (`repo_url`), become plain text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"artifacts/RESULTS.md": "measurements.md", "CONTRIBUTING.md": "contributing.md"}
LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<path>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are kept elsewhere."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrite the links of a page for the site."""
    home = {name: source for source, name in PAGES.items()}.get(page.file.src_uri)
    folder = posixpath.dirname(home or f"docs/{page.file.src_uri}")

    def rewrite(link: re.Match[str]) -> str:
        text, path, anchor = link["text"], link["path"], link["anchor"] or ""
        if ":" in path:
            return link[0]
        target = posixpath.normpath(posixpath.join(folder, path))
        if target in PAGES:
            return f"[{text}]({PAGES[target]}{anchor})"
        if target.startswith("docs/"):
            return f"[{text}]({target.removeprefix('docs/')}{anchor})"
        return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{target})" if config.repo_url else text

    return LINK.sub(rewrite, markdown)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Mark short names in code type, so that the style sheet keeps `--group_size` on one line."""
    return re.sub(r"<code>([^<\s]{1,36})</code>", r'<code class="name">\1</code>', html)
