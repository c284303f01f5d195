"""docs/systemd.md: the commands that it tells users to run."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLE_ETCD = "http://10.0.0.2:2379"


def fenced(section: str) -> str:
    """The lines of a block between fences below that heading: what not everybody wants."""
    text = (ROOT / "docs/systemd.md").read_text()
    found = re.search(rf"^## {re.escape(section)}.*?^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert found, f"docs/systemd.md has no section {section} with a block"
    return found[1]


def commands(section: str, etcd: str = EXAMPLE_ETCD) -> str:
    """The indented lines below the heading that begins with this text, with our etcd for the example's."""
    text = (ROOT / "docs/systemd.md").read_text()
    found = re.search(rf"^## {re.escape(section)}[^\n]*\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"docs/systemd.md has no section {section}"
    lines = re.findall(r"^    (.+)$", found[1], re.MULTILINE)
    assert lines, f"section {section} of docs/systemd.md tells no command"
    return "\n".join(lines).replace(EXAMPLE_ETCD, etcd)
