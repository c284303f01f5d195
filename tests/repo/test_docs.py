"""The documents say what the program does: commands, exit codes, log lines, links, version."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import flannelpy
from flannelpy import claim, errors, reconcile
from flannelpy.cli import doctor, lease
from flannelpy.cli.lease_text import as_json
from flannelpy.doctor import overlay
from flannelpy.flags import FLAGS
from flannelpy.usage import help_text
from tests.builders import entry
from tests.netns import doctor_faults

ROOT = Path(__file__).parents[2]
MADE = {"build", "dist", "node_modules"}
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md")])
REFERENCE = (ROOT / "docs/reference.md").read_text()


def files() -> Iterator[Path]:
    """Everything that belongs to the repository; not what tools have put beside it."""
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        hidden = any(part.startswith(".") and part not in (".ci", ".gitignore") for part in parts)
        made = any(part in MADE or part == "__pycache__" or part.endswith(".egg-info") for part in parts)
        if path.is_file() and not hidden and not made:
            yield path


def section(text: str, heading: str) -> str:
    """What stands below a heading, up to the next one of the same depth."""
    marks = heading.partition(" ")[0]
    found = re.search(rf"^{re.escape(heading)}\n(.*?)(?=^{marks} |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"there is no {heading!r}"
    return found[1]


def rows(text: str) -> Iterator[list[str]]:
    """The cells of each row of the tables, without heads."""
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        for line in block.splitlines()[2:]:
            yield [cell.strip() for cell in line.strip("|").split("|")]


# --- commands ---


def test_the_test_command_is_make_test_and_ci_runs_it() -> None:
    commands = re.findall(r"^    (.+)$", section((ROOT / "README.md").read_text(), "## Tests"), re.MULTILINE)
    assert commands == ["make test"]
    lines = (ROOT / ".ci/run").read_text().splitlines()
    assert commands[0] in lines
    assert (ROOT / ".ci/run").stat().st_mode & 0o111


def test_make_targets_in_the_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in DOCUMENTS:
        named = re.findall(r"(?:^    |`)make ([a-z-]+)", path.read_text(), re.MULTILINE)
        assert set(named) <= targets, path


def test_variables_in_the_documents_exist() -> None:
    known = {flag.env for flag in FLAGS.values()} | {"FLANNELD_VERSION"}
    for path in DOCUMENTS:
        assert set(re.findall(r"FLANNELD_[A-Z_]*[A-Z]", path.read_text())) <= known, path


# --- exit codes, log lines ---


def exit_codes() -> dict[int, str]:
    """Number -> meaning, as the table of the reference has it."""
    return {int(code): meaning for code, meaning, _ in rows(section(REFERENCE, "## Exit codes"))}


def test_every_exit_code_is_documented_with_its_number() -> None:
    base = errors.FlannelpyError
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, base)]
    assert set(exit_codes()) == {0} | {kind.exit_code for kind in kinds}
    in_help = re.findall(r"^  (\d)  (.+)$", help_text().partition("exit codes:")[2], re.MULTILINE)
    assert len(in_help) == len(exit_codes())
    for code, text in in_help:
        # The first words are the same, so the numbers cannot have changed places.
        assert exit_codes()[int(code)].startswith(re.split(r"[:;(]", text)[0].strip())


def literals() -> str:
    """Every text in the program; what is filled in is a NUL."""
    found = []
    for path in sorted([*(ROOT / "flannelpy").rglob("*.py"), *(ROOT / "backends").rglob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%(?:\.0f|[sd])", "\0", node.value))
    return "\n".join(found)


@pytest.mark.parametrize("heading", ["## Log lines", "## Status texts"])
def test_documented_lines_are_in_the_program(heading: str) -> None:
    program = literals()
    lines = [cells[0].strip("`") for cells in rows(section(REFERENCE, heading))]
    assert len(lines) > 5
    for line in lines:
        # What is filled in stands in <>; the words between must be in the program, which joins by : and ;.

        pieces = [piece.strip(" ()") for piece in re.split(r"<[^>]+>|[:;] ", line)]
        missing = [piece for piece in pieces if len(piece) > 2 and piece not in program]
        assert missing == [], line


def test_what_lease_check_finds_is_documented_with_its_severity() -> None:
    sources = [(ROOT / path).read_text() for path in ("flannelpy/model/census.py", "flannelpy/cli/lease.py")]
    made = re.findall(r'Finding\(\s*"([a-z]+)",\s*"([a-z-]+)"', "".join(sources))
    table = section(REFERENCE, "### What lease check finds").partition("\n## ")[0]
    told = [cells[:2] for cells in rows(table)]
    assert {(kind.strip("`"), severity) for kind, severity in told} == {(kind, rank) for rank, kind in made}
    codes = (lease.WARNINGS_FOUND, lease.ERRORS_FOUND)
    assert "{} with warnings, {} with errors".format(*codes) in REFERENCE.replace("\n", " ")


def test_the_shape_of_a_lease_in_json_is_documented() -> None:
    (shape,) = re.findall(r"^    LEASE  (\{.*?\})\n", REFERENCE, re.MULTILINE | re.DOTALL)
    assert re.findall(r'"(\w+)"', shape) == list(as_json(entry("10.5.1.0-24"), ()))


def test_every_damage_that_is_tried_is_in_the_table_of_repairs() -> None:
    tree = ast.parse((ROOT / "tests/netns/test_repair.py").read_text())
    tried = [
        [ast.literal_eval(key) for key in node.value.keys if key is not None]
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Dict)
    ]
    assert len(tried) == 1, "DAMAGE"
    told = [cells[0] for cells in rows(section(REFERENCE, "## What is noticed and repaired"))]
    assert told == tried[0]


def test_the_table_of_the_doctor_is_what_its_test_tries() -> None:
    page = (ROOT / "docs/doctor.md").read_text()
    assert "\n".join(doctor_faults.table()) in page
    assert len({fault.name for fault in doctor_faults.FAULTS}) >= 15
    assert f"{len(doctor_faults.FAULTS)} faults" in page


def test_every_finding_of_the_doctor_is_documented() -> None:
    made = set(overlay._WHY)
    for path in (ROOT / "flannelpy/doctor").glob("*.py"):
        made |= set(re.findall(r'(?:error|warning|note)\)?\(\s*"([a-z_-]+)"', path.read_text()))
    page = (ROOT / "docs/doctor.md").read_text()
    told = set(re.findall(r"^\| (`.*?`) \|", section(page, "## What it finds"), re.MULTILINE))
    assert made == set(re.findall(r"`([a-z_-]+)`", " ".join(told)))
    codes = (doctor.WARNINGS_FOUND, doctor.ERRORS_FOUND)
    assert "0 when nothing is wrong, {} with warnings, {} with errors".format(*codes) in page.replace(
        "\n", " "
    )


def test_every_fault_of_etcd_that_is_tried_is_in_the_table_of_outages() -> None:
    tried = set(re.findall(r'Fault\("([^"]+)"', (ROOT / "tests/etcd/outages/faults.py").read_text()))
    assert tried == {cells[1] for cells in rows(section(REFERENCE, "## Outages of etcd"))}


def test_waits_in_the_reference_are_those_of_the_program() -> None:
    for first, longest in (claim._RETRY_SECONDS, reconcile._RETRY_SECONDS):
        assert f"after {first:g} s, doubling to {longest:g} s" in REFERENCE
    assert "every {:g} to {:g} seconds".format(*reconcile._RESYNC_SECONDS) in REFERENCE


# --- links, version, leftovers ---


def anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"\]\(\s+", "](", path.read_text())
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.is_relative_to(ROOT), link
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


def test_sources_refer_to_decisions_that_exist() -> None:
    pages = {path.name for path in (ROOT / "docs/design").glob("[0-9]*.md")}
    index = (ROOT / "docs/design/README.md").read_text()
    assert pages == set(re.findall(r"\]\((\d{4}-[^)]+)\)", index))
    for path in files():
        if path.suffix in {".py", ".md", ".toml", ".sh"}:
            for name in re.findall(r"docs/design/(\d{4}[\w.-]*)", path.read_text()):
                assert any(page.startswith(name.rstrip(".")) for page in pages), f"{path}: {name}"


def test_the_changelog_has_this_version() -> None:
    headings = re.findall(r"^## \[([^]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] in ("Unreleased", flannelpy.__version__)
    assert flannelpy.__version__ in headings


def test_no_figure_is_left_to_be_filled_in() -> None:
    assert [path.name for path in DOCUMENTS if re.search(r"@@\w+@@", path.read_text())] == []


def test_no_path_of_a_developers_machine() -> None:
    own = re.compile(rb"/(?:home|Users|root)/\w|(?<![\w.}])/wor[k]/|C:\\Users|\.pyen[v]|/tmp/[\w.]*/")
    found = [
        f"{path.relative_to(ROOT)}: {match[0]!r}"
        for path in files()
        if (match := own.search(path.read_bytes()))
    ]
    assert found == []
