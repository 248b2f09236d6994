"""Manual pages: all commands and all options are there, and man finds nothing wrong with them."""

import re
import subprocess
from pathlib import Path

import pytest
from typer.main import get_command

from blockstore.cli.commands import app
from blockstore.cli.main import run
from blockstore.cli.man import escaped, pages
from blockstore.cli.settings import DAEMON_SETTINGS
from blockstore.config import option_name
from tests.programs import require_programs


def shown(path: Path) -> str:
    """As a reader sees it; no line is broken."""
    done = subprocess.run(
        ["man", "--warnings", "-l", str(path)],
        capture_output=True, text=True, timeout=60, check=True, env={"MANWIDTH": "10000", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.stderr == ""
    return re.sub(r".\x08", "", done.stdout)


def test_man_finds_nothing_wrong_and_shows_every_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    require_programs("man", "groff")
    assert run(["man", "--directory", str(tmp_path)]) == 0
    written = [Path(line) for line in capsys.readouterr().out.split()]
    assert {"cairn.1", "cairn-volume.1", "cairn-nbd.1"} <= {path.name for path in written}
    texts = {path.stem: shown(path) for path in written}
    for name, settings in DAEMON_SETTINGS.items():
        for field in settings.__dataclass_fields__:
            assert f"{option_name(field)} " in texts[f"cairn-{name}"], field
    for verb in ("create", "attach", "resize"):
        assert f"cairn volume {verb} " in texts["cairn-volume"]
    assert "cairn-snapshotd(1)" in texts["cairn"]
    assert "130" in texts["cairn"]


def test_every_command_has_a_page_and_a_name_line() -> None:
    made = dict(pages(get_command(app)))
    assert {f"cairn-{name}" for name in DAEMON_SETTINGS} < made.keys()
    for name, text in made.items():
        section = text.split(".SH NAME\n")[1].split("\n")[0]
        assert section.startswith(name.replace("-", "\\-") + " \\- "), "what apropos reads"
        assert not re.search(r"^\.(?!\\\"|TH|SH|SS|PP|TP|BR|B|RI|nf|fi)", text, re.MULTILINE), "a request by accident"
        assert not re.search(r"^\.S[HS].*\n\.PP$", text, re.MULTILINE), "mandoc warns of a paragraph that is skipped"


@pytest.mark.parametrize(
    ("text", "roff"),
    [(".so /etc/passwd", "\\&.so /etc/passwd"), ("'x", "\\&'x"), ("a\\b", "a\\eb"), ("--x", "\\-\\-x")],
)
def test_text_is_no_request(text: str, roff: str) -> None:
    assert escaped(text) == roff
