"""Options and arguments that several commands of `cairn snapshot` share."""

from typing import Annotated

import typer

from blockstore.cli.completion import complete_snapshot

SnapshotArgument = Annotated[
    str, typer.Argument(metavar="SNAPSHOT", help="Its id, snap-…", autocompletion=complete_snapshot)
]
SnapshotArguments = Annotated[
    list[str], typer.Argument(metavar="SNAPSHOT", help="Their ids, snap-…", autocompletion=complete_snapshot)
]
TagOption = Annotated[list[str] | None, typer.Option("--tag", metavar="KEY=VALUE", help="May be given again.")]
DescriptionOption = Annotated[str, typer.Option("--description", "-d", help="What it is for.")]
