"""What the pages name exists: links, the headings they lead to, and files."""

import re
from pathlib import Path

import pytest
from test_architecture import LOWEST_FIRST

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = sorted(
    page for folder in (".", "benchmarks", "docs") for page in (REPOSITORY / folder).glob("*.md")
)
FOLDERS = ("benchmarks", "examples", "moco_scale", "scripts", "tests")
FILES = [
    *REPOSITORY.glob("*"),
    *(path for name in FOLDERS for path in (REPOSITORY / name).rglob("*")),
]
NOT_OURS = {"main_lincls.py", "engines/NAME.py", "ds_configs/zeroN.json"}


def headings(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    found = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def is_there(name: str) -> bool:
    """Whether a name, perhaps with ``*``, is that of a file: a path, or a name on its own."""
    if "/" not in name:
        return any(path.match(name) for path in FILES)
    return any(next((REPOSITORY / start).glob(name), None) for start in (".", "moco_scale"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        found = page.parent / target if target else page
        assert found.exists(), f"{page.name} links to {link}, which is not there"
        if anchor:
            assert anchor in headings(found), f"{page.name} links to {link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    text = re.sub(r"\]\([^)\s]+\)", "]", page.read_text())
    named = set(re.findall(r"[\w./*-]+\.(?:py|sh|sbatch|yaml)\b|ds_configs/\w+\.json", text))
    missing = sorted(name for name in named - NOT_OURS if not is_there(name))
    assert not missing, f"{page.name} names what is not there: {', '.join(missing)}"


def test_the_code_map_has_every_room_in_the_order_of_imports() -> None:
    page = (REPOSITORY / "docs" / "architecture.md").read_text()
    rooms = re.findall(r"^\| \[`([a-z/]+)/`\]", page, re.M)
    assert rooms == [room for room in LOWEST_FIRST if room != "data"]
