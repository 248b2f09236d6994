"""The catalog's records as the messages of control.proto.

One direction only: requests are checked where they arrive.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Final
from urllib.parse import quote, urlsplit

from blockstore.control.floors import Floors
from blockstore.control.hydration import HydrationView
from blockstore.control.placement import warning
from blockstore.control.presence import Presence
from blockstore.control.records import AttachmentState, FrontEnd, MaintenanceState, Node, Volume
from blockstore.control.transitions import place_epoch
from blockstore.domain import FrontEndId, Member, NodeId, Position, Replacement, VolumeId, VolumeState
from blockstore.rpc import control_pb2, replica_pb2
from blockstore.units import Epoch, Sequence

VOLUME_STATES: Final[Mapping[VolumeState, "control_pb2.VolumeState.ValueType"]] = {
    VolumeState.CREATING: control_pb2.VOLUME_STATE_CREATING,
    VolumeState.AVAILABLE: control_pb2.VOLUME_STATE_AVAILABLE,
    VolumeState.IN_USE: control_pb2.VOLUME_STATE_IN_USE,
    VolumeState.DELETING: control_pb2.VOLUME_STATE_DELETING,
    VolumeState.ERROR: control_pb2.VOLUME_STATE_ERROR,
}
ATTACHMENT_STATES: Final[Mapping[AttachmentState, "control_pb2.AttachmentState.ValueType"]] = {
    AttachmentState.ATTACHING: control_pb2.ATTACHMENT_STATE_ATTACHING,
    AttachmentState.ATTACHED: control_pb2.ATTACHMENT_STATE_ATTACHED,
    AttachmentState.DETACHING: control_pb2.ATTACHMENT_STATE_DETACHING,
}


class Messages:
    """Makes messages of records, with what is known of nodes and front-ends now."""

    def __init__(
        self,
        nodes: Mapping[NodeId, Node],
        front_ends: Mapping[FrontEndId, FrontEnd],
        presence: Presence,
        floors: Floors,
        hydrations: HydrationView,
    ) -> None:
        self._nodes = nodes
        self._front_ends = front_ends
        self._presence = presence
        self._floors = floors
        self._hydrations = hydrations

    def volume(self, volume: Volume) -> control_pb2.Volume:
        """All that is known of it, its members' places included."""
        return control_pb2.Volume(
            id=volume.id,
            name=volume.name,
            size_bytes=volume.size_bytes,
            state=VOLUME_STATES[volume.state],
            reason=volume.reason,
            tags=dict(volume.tags),
            created_at_ms=volume.created_at_ms,
            epoch=volume.epoch,
            segments=self.segments(volume),
            attachment=self._attachment(volume),
            warnings=self._warnings(volume),
            source=self._hydrations.source(volume),
            hydration=self._hydrations.hydration(volume),
            segment_size_bytes=volume.segment_size_bytes,
            growing_to_bytes=volume.growing.size_bytes if volume.growing else 0,
        )

    def _warnings(self, volume: Volume) -> list[str]:
        """What is not as it should be about where its replicas are now."""
        found = []
        for segment in volume.segments:
            nodes = [self._nodes.get(member.node) for member in segment.configuration.members]
            found.append(warning([node.zone for node in nodes if node]))
        return [text for text in dict.fromkeys(found) if text]

    def ticket(self, volume: Volume) -> control_pb2.OpenTicket:
        """What it takes to open a volume in the epoch of its attachment, or else of its maintenance."""
        attachment = volume.attachment
        epoch = place_epoch(volume)
        assert epoch is not None
        return control_pb2.OpenTicket(
            volume=volume.id,
            name=volume.name,
            size_bytes=volume.size_bytes,
            epoch=epoch,
            read_only=attachment.read_only if attachment else False,
            segments=self.segments(volume),
            tags=dict(volume.tags),
            accept_loss=attachment.accept_loss if attachment else False,
            loss_epochs=volume.loss_epochs,
            source=self._hydrations.source(volume),
            hydration=self._hydrations.hydration(volume),
            maintenance=attachment is None,
            client=attachment.client if attachment else "",
        )

    def current(self, volume: Volume, report: control_pb2.VolumeReport | None = None) -> control_pb2.CurrentAttachment:
        """How a front-end that has the volume is to go on with it; report: what it just said of it."""
        epoch = place_epoch(volume)
        assert epoch is not None
        opening = volume.maintenance and volume.maintenance.state is MaintenanceState.OPENING
        state = AttachmentState.ATTACHING if opening else AttachmentState.ATTACHED
        return control_pb2.CurrentAttachment(
            volume=volume.id,
            epoch=epoch,
            size_bytes=volume.size_bytes,
            state=ATTACHMENT_STATES[volume.attachment.state if volume.attachment else state],
            source=self._hydrations.source(volume),
            hydration=self._hydrations.hydration(volume),
            maintenance=volume.attachment is None,
            segments=self.segments(volume) if report and _has_other_members(volume, report) else (),
        )

    def hydration_trouble(self, volume: Volume) -> str:
        """Why its copying out of the object store stands still; empty where it goes on, or is paused."""
        return self._hydrations.trouble(volume)

    def node(self, node: Node, replicas: Mapping[NodeId, int], draining: Collection[NodeId] = ()) -> control_pb2.Node:
        """A node, and how many replicas the catalog has placed there. draining: which nodes are drained."""
        word = self._presence.node(node.id)
        return control_pb2.Node(
            id=node.id,
            address=node.address,
            zone=node.zone,
            capacity_bytes=word.capacity_bytes if word else node.capacity_bytes,
            used_bytes=word.used_bytes if word else 0,
            full=word.full if word else False,
            up=self._presence.is_up(node.id),
            last_heartbeat_ms=word.at_ms if word else 0,
            replicas=replicas.get(node.id, 0),
            draining=node.id in draining,
        )

    def front_end(self, front_end: FrontEnd, volumes: Mapping[FrontEndId, int]) -> control_pb2.FrontEndInfo:
        """A front-end, and how many volumes belong to it."""
        word = self._presence.front_end(front_end.id)
        return control_pb2.FrontEndInfo(
            id=front_end.id,
            address=front_end.address,
            uris=front_end.uris,
            up=self._presence.is_up(front_end.id),
            last_heartbeat_ms=word.at_ms if word else 0,
            volumes=volumes.get(front_end.id, 0),
        )

    def segments(self, volume: Volume) -> list[control_pb2.Segment]:
        """Who holds it, and where they may be reached now."""
        return [
            control_pb2.Segment(
                number=segment.number,
                size_bytes=segment.size_bytes,
                configuration=control_pb2.Configuration(
                    number=segment.configuration.number,
                    members=self._members(volume.id, segment.configuration.members),
                    old_members=self._members(volume.id, segment.configuration.old_members),
                    replacement=self._replacement(volume.id, segment.configuration.replacement),
                ),
            )
            for segment in volume.segments
        ]

    def _replacement(self, volume: VolumeId, change: Replacement | None) -> control_pb2.Replacement | None:
        if change is None:
            return None
        [newcomer] = self._members(volume, [change.newcomer])
        return control_pb2.Replacement(newcomer=newcomer, replaces=change.replaces, reason=change.reason)

    def _attachment(self, volume: Volume) -> control_pb2.Attachment | None:
        attachment = volume.attachment
        if attachment is None:
            return None
        front_end = self._front_ends.get(attachment.front_end)
        export = volume.name or volume.id
        return control_pb2.Attachment(
            front_end=attachment.front_end,
            epoch=attachment.epoch,
            state=ATTACHMENT_STATES[attachment.state],
            read_only=attachment.read_only,
            since_ms=attachment.since_ms,
            client=attachment.client,
            uris=[export_uri(uri, export) for uri in front_end.uris] if front_end else [],
        )

    def _members(self, volume: VolumeId, members: Iterable[Member]) -> list[control_pb2.Member]:
        found = []
        for member in members:
            node = self._nodes.get(member.node)
            found.append(
                control_pb2.Member(
                    replica=member.replica,
                    node=member.node,
                    address=node.address if node else "",
                    zone=node.zone if node else "",
                    known=position_message(self._floors.of(volume, member.replica)),
                )
            )
        return found


def _has_other_members(volume: Volume, report: control_pb2.VolumeReport) -> bool:
    """Whether the front-end goes by other members, or another configuration, than the record has."""
    everyone = {member.replica for segment in volume.segments for member in segment.configuration.everyone}
    numbers = {int(segment.number): segment.configuration.number for segment in volume.segments}
    return everyone != {member.replica for member in report.members} or numbers != dict(report.settled)


def position_message(position: Position) -> replica_pb2.Position:
    """A position as it crosses the network."""
    return replica_pb2.Position(epoch=position.epoch, sequence=position.sequence)


def to_position(message: replica_pb2.Position) -> Position:
    """The reverse of position_message."""
    return Position(Epoch(message.epoch), Sequence(message.sequence))


def export_uri(uri: str, export: str) -> str:
    """The NBD URI of one export of the server at `uri`: nbd://HOST:PORT/EXPORT, nbd+unix:///EXPORT?socket=PATH."""
    parts = urlsplit(uri)
    query = f"?{parts.query}" if parts.query else ""
    return f"{parts.scheme}://{parts.netloc}/{quote(export)}{query}"
