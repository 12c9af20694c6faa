"""Commands, files and links of the README and docs; and, marked slow, the commands as typed."""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from test_cli import SCRIPTS, module_name

README = ROOT / "README.md"
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
# Marks of blocks that need more than a checkout with the demo: the real dataset, the user's own
# data, or a download.
NEEDS = {"magnatagatune", "own_data", "download"}
PROGRAMS = {"cat", "curl", "jupyter", "make", "mkdir", "mv", "python", "python3", "unzip", "."}


@dataclass
class Block:
    """A fenced block of a page."""

    language: str
    needs: str  # '' if a checkout with the demo is enough
    text: str
    line: int

    def commands(self) -> list[str]:
        """Return the shell commands, with continued lines joined and without here-documents."""
        without = re.sub(r"<<'(\w+)'\n.*?^\1$", "", self.text, flags=re.MULTILINE | re.DOTALL)
        joined = without.replace("\\\n", " ")
        return [line.strip() for line in joined.splitlines() if line.strip()]


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    pattern = r"(?:^<!-- needs: (\w+) -->\n)?^```(\w+)\n(.*?)^```$"
    return [
        Block(found[2], found[1] or "", found[3], text[: found.start()].count("\n") + 1)
        for found in re.finditer(pattern, text, re.MULTILINE | re.DOTALL)
    ]


def shell_commands(page: str) -> list[list[str]]:
    """Return the words of each command in the sh blocks, without environment variables."""
    commands = []
    for block in blocks(page):
        for command in block.commands() if block.language == "sh" else ():
            words = shlex.split(command, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)
            words[0] = words[0].removeprefix(".venv-tag/bin/")
            commands.append(words)
    return commands


def spans(page: str) -> list[str]:
    """Return every inline code span of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return [span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", prose)]


def script_call(words: list[str]) -> tuple[str, list[str]] | None:
    """Split `python SCRIPT.py ...` or `python -m tools.NAME ...` into module and arguments."""
    if words[:2] == ["python", "-m"] and len(words) > 2 and words[2].startswith("tools."):
        return words[2], words[3:]
    if len(words) > 1 and words[0] == "python" and words[1].endswith(".py"):
        return words[1].removesuffix(".py"), words[2:]
    return None


@pytest.mark.parametrize("page", PAGES)
def test_every_fence_is_closed_and_every_mark_is_known_and_stands_before_a_block(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    found = blocks(page)
    assert len(re.findall(r"^```", text, re.MULTILINE)) == 2 * len(found)
    marked = [block.needs for block in found if block.needs]
    assert len(marked) == len(re.findall("^<!--", text, re.MULTILINE))
    assert set(marked) <= NEEDS
    assert {block.language for block in found} <= {"sh", "text", "python", "bibtex"}


def test_the_readme_has_commands_of_every_stage():
    calls = [script_call(words) for words in shell_commands("README.md")]
    expected = {"build_mtt", "train", "eval", "extract_excitations", "tag"}
    expected |= {"tools.make_demo_dataset", "tools.convert_model", "tools.paper"}
    assert {call[0] for call in calls if call} == expected


@pytest.mark.parametrize("page", PAGES)
def test_programs_and_files_that_commands_name_exist(page):
    for words in shell_commands(page):
        assert words[0] in PROGRAMS or (ROOT / words[0]).is_file(), words
        for word in words[1:]:
            # Other files are datasets, models and results.
            if re.search(r"\.(py|ipynb)$|^requirements", word) and "*" not in word:
                assert (ROOT / word).is_file(), words


@pytest.mark.parametrize("page", PAGES)
def test_options_of_commands_are_those_of_their_scripts(page):
    in_prose = [shlex.split(span) for span in spans(page) if span.startswith("python ")]
    for words in shell_commands(page) + in_prose:
        if call := script_call(words):
            try:
                importlib.import_module(call[0]).build_parser().parse_args(call[1])
            except SystemExit:
                pytest.fail(f"{page}: {shlex.join(words)}: these options are not accepted")


@pytest.mark.parametrize("page", PAGES)
def test_options_named_in_prose_belong_to_a_script(page):
    known = set()
    for script in SCRIPTS:
        parser = importlib.import_module(module_name(script)).build_parser()
        known.update(parser._option_string_actions)
    ours = [span for span in spans(page) if span.startswith("--") or ".py " in span]
    named = {option for span in ours for option in re.findall(r"(?<!\S)--[a-z-]+", span)}
    assert named <= known


@pytest.mark.parametrize("page", PAGES)
def test_files_named_in_prose_exist(page):
    folders = ("docs", "requirements", "tests", "toolkit", "tools")
    paths = [*ROOT.glob("*.*"), *(path for name in folders for path in ROOT.glob(f"{name}/**/*.*"))]
    known = [path.as_posix() for path in paths]
    for span in spans(page):
        for name in re.findall(r"(?<!\S)[a-z0-9_/]+\.(?:py|ipynb|md)(?!\S)", span):
            if not name.startswith("demo/"):  # made by the demo, not part of a checkout
                assert any(path.endswith(f"/{name}") for path in known), name


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    in_prose = [span.split() for span in spans(page) if span.startswith("make ")]
    for words in shell_commands(page) + in_prose:
        if words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= targets, words


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page}: {link}: no such file"
        if anchor:
            assert anchor in anchors(target), f"{page}: {link}: no such heading"


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_citation_names_the_paper_of_the_readme():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()  # required by the format
    paper = citation["preferred-citation"]
    readme = " ".join(README.read_text(encoding="utf-8").split())
    assert paper["title"] in readme and paper["url"] in readme


def runnable_blocks() -> list[Block]:
    """Return the blocks that make the demo or need only the demo, in order."""
    return [
        block
        for page in ("README.md", "docs/python.md")
        for block in blocks(page)
        if block.language in ("sh", "python") and not block.needs
    ]


def is_demo(block: Block) -> bool:
    return block.commands()[0].startswith("python -m tools.make_demo_dataset")


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_the_demo_typed_by_hand_is_that_of_make(tmp_path):
    venv = tmp_path / "venv"
    venv.mkdir()
    (venv / "installed").touch()
    command = ["make", "--dry-run", "--no-print-directory", "demo", f"VENV={venv}"]
    printed = subprocess.check_output(command, cwd=ROOT, text=True)
    printed = printed.replace(f"{venv}/bin/", "").replace("\\\n", " ")
    by_make = [line.split() for line in printed.splitlines() if not line.startswith("echo")]
    (demo,) = filter(is_demo, runnable_blocks())
    assert by_make == [command.split() for command in demo.commands()]


@pytest.mark.slow
@pytest.mark.skipif(
    not (ROOT / "demo" / "excitation_analysis.ipynb").exists(), reason="needs the demo: make demo"
)
def test_commands_after_the_demo_run_as_typed(tmp_path):
    for path in ROOT.iterdir():
        if path.name != "demo":
            (tmp_path / path.name).symlink_to(path)
    shutil.copytree(ROOT / "demo", tmp_path / "demo")
    # Programs are found as in an activated environment.
    programs = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    environment.pop("KERAS_BACKEND", None)
    said = ""
    for block in runnable_blocks():
        if is_demo(block):
            continue
        shell = ["bash", "-eu"] if block.language == "sh" else ["python"]
        shell[0] = shutil.which(shell[0], path=environment["PATH"])
        how = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
        ran = subprocess.run([*shell, "-c", block.text], timeout=600, **how)
        error = f"line {block.line}:\n{block.text}\n{ran.stderr[-3000:]}"
        assert ran.returncode == 0, error
        said += ran.stdout

    demo = tmp_path / "demo"
    for stage in "01":
        assert list((demo / "log" / stage).glob("ckpt-e000-l*.keras"))
        assert len((demo / "log" / stage / "training.csv").read_text().splitlines()) == 1 + 5
        assert list((demo / "log" / stage).glob("events.out.tfevents.*"))
    metrics = json.loads((demo / "report" / "metrics.json").read_text())
    assert f"=> @ ROC AUC score: {metrics['roc_auc']:.4f}" in said
    assert 0 < metrics["roc_auc"] < 1
    for name in ("metrics.json", "per_tag.csv", "per_tag.png", "predictions.csv"):
        assert (demo / "report" / name).stat().st_size
    notebook = json.loads((demo / "excitation_analysis.ipynb").read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in code)
