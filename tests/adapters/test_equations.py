"""docs/equations.md: the sections that docstrings refer to exist, and its table of contents leads to them."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "equations.md").read_text()
HEADINGS = re.findall(r"^#{2,3} (.+)$", DOCUMENT, flags=re.MULTILINE)


def test_docstrings_refer_to_sections_that_exist() -> None:
    numbers = {heading.split()[0].rstrip(".") for heading in HEADINGS}
    references = {
        (path.name, number)
        for folder in ("adapters", "training", "serve")
        for path in (ROOT / folder).rglob("*.py")
        for number in re.findall(r"docs/equations\.md,\s+section ([\d.]*\d)", path.read_text())
    }
    assert {"diag.py", "row.py", "uncertainty.py", "sampling.py", "posterior.py"} <= {name for name, _ in references}
    assert {(name, number) for name, number in references if number not in numbers} == set()


def test_the_table_of_contents_leads_to_every_section() -> None:
    anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in HEADINGS]
    linked = re.findall(r"\]\(#([^)]+)\)", DOCUMENT)
    assert linked == [anchor for anchor in anchors if anchor != "references"]
