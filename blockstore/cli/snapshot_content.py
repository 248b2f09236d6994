"""`cairn snapshot verify|diff|export|import`: what snapshotd does with the content of snapshots."""

import sys
from collections.abc import Iterator, Sequence
from typing import Annotated

import typer

from blockstore.cli import snapshot_documents, snapshot_tables
from blockstore.cli.client import run_with_control
from blockstore.cli.completion import complete_snapshot
from blockstore.cli.control_address import find_control
from blockstore.cli.image_export import export_image
from blockstore.cli.image_import import send_image
from blockstore.cli.image_input import Format, describe, open_input
from blockstore.cli.image_output import open_output
from blockstore.cli.meters import meters
from blockstore.cli.options import ControlOption, Output, OutputOption, StateOption, a_number, key_values, size_option
from blockstore.cli.screen import say, show
from blockstore.cli.snapshot_options import DescriptionOption, SnapshotArgument, TagOption
from blockstore.cli.store_client import StoreClient, find_store, run_with_store
from blockstore.errors import Conflict, Corrupt, InvalidRequest
from blockstore.rpc import snapshot_pb2 as pb
from blockstore.units import format_size

app = typer.Typer()


@app.command("verify")
def verify(
    snapshots: Annotated[
        list[str] | None,
        typer.Argument(metavar="SNAPSHOT", help="All without one.", autocompletion=complete_snapshot),
    ] = None,
    *,
    state: StateOption,
    sample: Annotated[
        float,
        typer.Option(
            "--sample",
            metavar="SHARE",
            help="Share of the frames to read, such as 0.1.",
            min=0,
            max=1,
            callback=a_number,
        ),
    ] = 0.0,
    control: ControlOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Read snapshots from the root down and check every hash; exit code 9 where something is damaged.

    Without --sample everything is read; with it all manifests, and that share of the content.
    """
    request = pb.VerifyRequest(snapshots=snapshots or [], sample=sample)

    async def work(store: StoreClient) -> list[pb.StoreProblem]:
        with meters() as show_work:
            return [one async for each in store.work(store.stub.Verify, request, show_work) for one in each.problems]

    problems = distinct(run_with_store(find_control(control, state), work))
    what = ", ".join(snapshots or []) or "all completed snapshots"
    document = {
        "ok": not problems,
        "snapshots": snapshots or None,
        "sample": sample or None,
        "problems": [snapshot_documents.problem(each) for each in problems],
    }
    show(output, document, lambda: snapshot_tables.problems(problems) if problems else f"{what}: all is sound")
    refuse_damage(problems)


def distinct(problems: Sequence[pb.StoreProblem]) -> list[pb.StoreProblem]:
    """Each once, as it was told last: a stream may tell what it found so far."""
    return list({(each.object, each.message): each for each in problems}.values())


def refuse_damage(problems: Sequence[pb.StoreProblem]) -> None:
    """Raises Corrupt where there is one."""
    if problems:
        needing = sorted({snapshot for each in problems for snapshot in each.snapshots})
        raise Corrupt(
            f"{len(problems)} object{'s' if len(problems) > 1 else ''} of the store "
            f"{'are' if len(problems) > 1 else 'is'} not as {'they' if len(problems) > 1 else 'it'} should be; "
            f"concerned: {', '.join(needing) or 'no snapshot'}. Put back what is damaged or gone from an older copy, "
            "or delete those snapshots; the others are whole"
        )


@app.command("diff")
def diff(
    snapshot: SnapshotArgument,
    other: Annotated[str, typer.Argument(metavar="OTHER", help="A later one.", autocompletion=complete_snapshot)] = "",
    *,
    state: StateOption,
    control: ControlOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """List the ranges of bytes in which OTHER differs from SNAPSHOT; alone, what SNAPSHOT holds."""
    request = pb.DiffRequest(**({"from": snapshot, "to": other} if other else {"to": snapshot}))

    async def work(store: StoreClient) -> list[pb.ByteRange]:
        stream = store.stream(store.stub.Diff, request)
        return list(joined([one async for each in stream for one in each.ranges]))

    ranges = run_with_store(find_control(control, state), work)
    changed = sum(each.size for each in ranges)
    if output is Output.TABLE:
        _print_ranges(ranges, changed)
        return
    document = {
        "from": snapshot if other else None,
        "to": other or snapshot,
        "changed_bytes": changed,
        "ranges": [snapshot_documents.byte_range(each) for each in ranges],
    }
    show(output, document, lambda: "")


def joined(ranges: Sequence[pb.ByteRange]) -> Iterator[pb.ByteRange]:
    """The ranges, those that touch and are alike as one: a message may end within one."""
    last: pb.ByteRange | None = None
    for each in ranges:
        if last is not None and last.offset + last.size == each.offset and last.zero == each.zero:
            last.size += each.size
            continue
        if last is not None:
            yield last
        last = pb.ByteRange(offset=each.offset, size=each.size, zero=each.zero)
    if last is not None:
        yield last


def _print_ranges(ranges: Sequence[pb.ByteRange], changed: int) -> None:
    """Not a table of rich's: there may be a million of them."""
    print(f"{'OFFSET':>18} {'BYTES':>16}  NOW")
    sys.stdout.writelines(
        f"{each.offset:>18,} {each.size:>16,}  {'zeroes' if each.zero else 'data'}\n" for each in ranges
    )
    print(f"{len(ranges):,} ranges, {format_size(changed)}", flush=True)


@app.command("export")
def export(
    snapshot: SnapshotArgument,
    file: Annotated[str, typer.Argument(metavar="FILE", help="A raw image; - is stdout.")],
    *,
    state: StateOption,
    force: Annotated[bool, typer.Option("--force", help="Replace a file, or write to a device.")] = False,
    control: ControlOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Write a snapshot's content as a raw image; what is zero stays a hole in a file.

    The file is there when it is whole; a failed export leaves nothing behind.
    """
    if file == "-" and output is Output.JSON:
        raise InvalidRequest("--output json and an image on stdout do not go together: export to a file")

    async def work(store: StoreClient) -> tuple[int, int]:
        found = await store.control.snapshot(snapshot)
        if found.state != pb.SNAPSHOT_STATE_COMPLETED:
            word = snapshot_documents.snapshot_state(found)
            raise Conflict(
                f"{snapshot} is {word}, and only a completed one is exported: `cairn snapshot wait {snapshot}`"
            )
        with open_output(file, force=force) as target, meters() as show_work:
            return found.size_bytes, await export_image(store, found, target, show_work)

    size, data = run_with_store(find_control(control, state), work)
    where = "stdout" if file == "-" else file
    text = f"{snapshot} went to {where}: {format_size(size)}, of which {format_size(data)} are data"
    if file == "-":
        say(text)
    else:
        show(output, {"id": snapshot, "file": file, "size_bytes": size, "data_bytes": data}, lambda: text)


@app.command("import")
def import_image(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A raw or qcow2 image; - is a raw one on stdin.")],
    *,
    state: StateOption,
    size: Annotated[
        int | None,
        size_option(
            "Of the snapshot: needed with stdin, which must bring just as much; more than a file has is zeroes.",
            "the image's",
        ),
    ] = None,
    kind: Annotated[
        Format, typer.Option("--format", help="What FILE is.", show_default="told from its first bytes")
    ] = (Format.AUTO),
    description: DescriptionOption = "",
    tag: TagOption = None,
    control: ControlOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Make a snapshot of an image, to create volumes from: `cairn volume create --snapshot`."""  # fmt: skip
    tags = key_values(tag or [], "--tag")
    address = find_control(control, state)
    store = run_with_control(address, find_store)
    with open_input(file, kind, size) as image:
        say(f"{file}: {describe(image)}")
        first = pb.ImportRequest(size_bytes=image.size_bytes, description=description, tags=tags)
        with meters() as show_work:
            found = send_image(store, first, image, lambda amount: show_work.update(file, amount))
    show(output, snapshot_documents.snapshot(found), lambda: snapshot_tables.snapshot(found))
