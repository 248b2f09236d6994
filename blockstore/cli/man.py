"""`cairn man`: manual pages, made of what `--help` is made of.

One page for `cairn`, and one for each of its commands, with all verbs of a noun on that. Text comes from the commands'
own help, options from their records (typer), exit codes from the table of errors: nothing is written twice, so nothing
can be missing, or old. Source of the format: man(7).
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from typer.main import get_command

from blockstore.cli.ending import EXIT_INTERRUPTED
from blockstore.cli.options import Output, OutputOption
from blockstore.cli.screen import show
from blockstore.errors import BY_GRPC

_SECTION: Final = 1
_PLACE: Final = Path("/usr/local/share/man/man1")


def man(
    directory: Annotated[Path, typer.Option("--directory", help="Where to write them.", file_okay=False)] = _PLACE,
    output: OutputOption = Output.TABLE,
) -> None:
    """Write manual pages for `cairn` and each of its commands.

    They say what --help says; write them anew after an update. Files in /usr/local are root's to write.
    """
    from blockstore.cli.commands import app  # noqa: PLC0415 - a command that imports all the others

    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for name, text in pages(get_command(app)):
        path = directory / f"{name}.{_SECTION}"
        path.write_text(text)
        written.append(str(path))
    show(output, {"files": written}, lambda: "\n".join(written))


def pages(cairn: Any) -> Iterator[tuple[str, str]]:
    """The name of each page, and its text. cairn: the command itself, as typer makes it."""
    context = typer.Context(cairn, info_name="cairn")
    commands = {name: cairn.get_command(context, name) for name in cairn.list_commands(context)}
    yield "cairn", _overview(context, commands)
    for name, command in commands.items():
        if not command.hidden:
            yield f"cairn-{name}", _page(typer.Context(command, info_name=name, parent=context))


def escaped(text: str) -> str:
    """Text as roff shows it: what would be a request or an escape is none, and a hyphen can be copied."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("…", "...")
    return re.sub(r"^([.'])", r"\\&\1", text, flags=re.MULTILINE)


# ---- pages


def _overview(context: Any, commands: dict[str, Any]) -> str:
    shown = {name: command for name, command in commands.items() if not command.hidden}
    lines = [*_head("cairn", context.command.help)]
    lines += [".SH SYNOPSIS", ".B cairn", r".RI [ OPTIONS ]\ \fICOMMAND\fR\ ..."]
    lines += [".SH DESCRIPTION", *_paragraphs(context.command.help), *_options(context, ".SH OPTIONS")]
    lines.append(".SH COMMANDS")
    for name, command in shown.items():
        lines += [".TP", rf".BR cairn\-{escaped(name)} ({_SECTION})", escaped(command.get_short_help_str(200))]
    lines += [*_exit_codes(), *_see_also(f"cairn-{name}" for name in shown)]
    return "\n".join(lines) + "\n"


def _page(context: Any) -> str:
    command, name = context.command, context.command_path.replace(" ", "-")
    verbs = list(_verbs(context))
    lines = [*_head(name, command.help), ".SH SYNOPSIS"]
    for verb in verbs or [context]:
        lines += [".nf", rf"\fB{escaped(verb.command_path)}\fR {_arguments(verb)}", ".fi"]
    lines += [".SH DESCRIPTION", *_paragraphs(command.help)]
    if verbs:
        lines.append(".SH COMMANDS")
    else:
        lines += _options(context, ".SH OPTIONS")
    for verb in verbs:
        lines += [rf'.SS "{escaped(verb.command_path)} {_arguments(verb)}"', *_paragraphs(verb.command.help)]
        lines += _options(verb, "")
    lines += _see_also(["cairn"])
    return "\n".join(lines) + "\n"


def _verbs(context: Any) -> Iterator[Any]:
    """The commands below a noun, and below its nouns."""
    if not hasattr(context.command, "list_commands"):
        return
    for name in context.command.list_commands(context):
        verb = typer.Context(context.command.get_command(context, name), info_name=name, parent=context)
        if verb.command.hidden:
            continue
        further = list(_verbs(verb))
        yield from further or [verb]


# ---- parts of a page


def _head(name: str, text: str | None) -> list[str]:
    summary = " ".join((text or name).strip().split("\n\n")[0].split()).rstrip(".")
    from importlib.metadata import version  # noqa: PLC0415 - slow, and needed here alone

    title = f'.TH "{escaped(name.upper())}" {_SECTION} "" "cairn {version("cairn")}" "Cairn"'
    return [r".\" Made by `cairn man`.", title, ".SH NAME", rf"{escaped(name)} \- {escaped(summary)}"]


def _arguments(context: Any) -> str:
    return escaped(" ".join(context.command.collect_usage_pieces(context)))


def _paragraphs(text: str | None) -> list[str]:
    """Each in its own lines, the first one behind its heading; what is indented stays as it is."""
    lines: list[str] = []
    for paragraph in re.split(r"\n\s*\n", (text or "").replace("\b", "").strip("\n")):
        lines += [".PP"] if lines else []
        if paragraph.startswith((" ", "\t")):
            lines += [".nf", escaped(paragraph), ".fi"]
        else:
            lines.append(escaped(" ".join(paragraph.split())))
    return lines


def _options(context: Any, heading: str) -> list[str]:
    """What a command takes, as --help lists it: names on one side, what they do on the other."""
    records = [parameter.get_help_record(context) for parameter in context.command.get_params(context)]
    lines = [heading] if heading else []
    for left, right in filter(None, records):
        lines += [".TP", rf"\fB{escaped(left)}\fR", escaped(" ".join(right.split()))]
    return lines


def _exit_codes() -> list[str]:
    """Those of the table of errors, each with what it is told for."""
    meanings: dict[int, list[str]] = {0: ["All went well."], EXIT_INTERRUPTED: ["Interrupted."]}
    for error in BY_GRPC.values():
        meanings.setdefault(error.codes.exit_code, []).append((error.__doc__ or "").strip().split("\n")[0])
    lines = [".SH EXIT STATUS"]
    for code, texts in sorted(meanings.items()):
        lines += [".TP", rf"\fB{code}\fR", escaped(" ".join(texts))]
    return lines


def _see_also(names: "Iterator[str] | list[str]") -> list[str]:
    shown = ", ".join(rf"\fB{escaped(name)}\fR({_SECTION})" for name in names)
    return [".SH SEE ALSO", shown]
