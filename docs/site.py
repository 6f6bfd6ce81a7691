"""A hook of mkdocs: pages that lie outside docs/ join the site, and links that leave docs/ work there."""

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
ADDED = ["benchmarks/README.md", "benchmarks/RESULTS.md", "kernels/README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
PICTURES = "benchmarks/results/*/*.png"

CODE = re.compile(r"(^ *```.*?^ *```$)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
ELSEWHERE = re.compile(r"^([a-z]+:|#|/)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages and their pictures, each at its path in the repository."""
    pictures = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(PICTURES))
    for uri in [*ADDED, *pictures]:
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / uri)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Rewrites the links of a page, outside of its code blocks."""
    uri = page.file.src_uri
    home = posixpath.dirname(uri if uri in ADDED else f"docs/{uri}")
    parts = CODE.split(markdown)  # prose and code in turn
    parts[::2] = [LINK.sub(lambda match: _link(match, uri, home, files), prose) for prose in parts[::2]]
    # Markdown inside of HTML, which code hosts read as such.
    return "".join(parts).replace("<details>", '<details markdown="1">')


def _link(match: re.Match[str], uri: str, home: str, files: Files) -> str:
    picture, text, target = match.groups()
    path, _, anchor = target.partition("#")
    if ELSEWHERE.match(target):
        return match[0]
    place = posixpath.normpath(posixpath.join(home, path))  # in the repository
    on_site = place.removeprefix("docs/")
    inside = place.startswith("docs/")
    if inside or place in ADDED or (picture and files.get_file_from_path(place) is not None):
        relative = os.path.relpath(on_site, posixpath.dirname(uri) or ".").replace(os.sep, "/")
        return f"{picture}[{text}]({relative}{'#' if anchor else ''}{anchor})"
    if "`" in text:
        return text
    return f"`{text}`" if place.endswith(text.rstrip("/")) else f"{text} (`{place}`)"
