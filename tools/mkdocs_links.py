"""A hook of MkDocs: links to files outside docs/ point to the repository on the site.

Pages link to code by relative paths (`../megatron_srpo/train.py`), which work where GitHub or an editor shows
the page, and which tests/test_docs.py checks.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

ROOT = Path(__file__).parents[1]
CODE_LINK = re.compile(r"\]\((\.\./[^)#\s]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Return the page's text with absolute links to the repository; called by MkDocs."""
    depth = len(PurePosixPath(page.file.src_uri).parents)  # of the page in docs/, itself counted
    return CODE_LINK.sub(lambda link: _to_repository(link, depth, config["repo_url"]), markdown)


def _to_repository(link: re.Match[str], depth: int, repo_url: str) -> str:
    path, anchor = link[1], link[2] or ""
    if not path.startswith("../" * depth):  # to another page, from a folder of pages
        return link[0]
    path = path.removeprefix("../" * depth)
    view = "tree" if (ROOT / path).is_dir() else "blob"
    return f"]({repo_url.rstrip('/')}/{view}/main/{path}{anchor})"
