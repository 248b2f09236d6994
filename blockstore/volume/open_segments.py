"""All segments of one volume that is attached here, at one epoch.

One attachment seals every segment, and is served once each of them is: a volume is never served in part. It is over
when it is over in one of them; the others end with it, because whoever took that one away takes all. Segments that the
volume gets while it is attached are opened at the same epoch, and belong to it once they are served.
"""

import asyncio
from collections.abc import Sequence

from blockstore.errors import CairnError
from blockstore.units import BLOCK_SIZE
from blockstore.volume.open_volume import OpenVolume


class OpenSegments:
    """`segments` are in the order of the volume's blocks; there is always one. `over` as in OpenVolume."""

    def __init__(self, segments: Sequence[OpenVolume]) -> None:
        self.volume = segments[0].volume
        self.epoch = segments[0].epoch
        self.over: asyncio.Future[CairnError] = asyncio.get_running_loop().create_future()
        self.segments: list[OpenVolume] = []
        self._joining: list[OpenVolume] = []
        self._take(segments)

    @property
    def first(self) -> OpenVolume:
        """The segment that begins with the volume's first block."""
        return self.segments[0]

    @property
    def size_bytes(self) -> int:
        return sum(segment.size_bytes for segment in self.segments)

    @property
    def starts(self) -> list[int]:
        """The first block of each segment in the volume."""
        starts = [0]
        for segment in self.segments[:-1]:
            starts.append(starts[-1] + segment.size_bytes // BLOCK_SIZE)
        return starts

    @property
    def why(self) -> str:
        """What it waits for; empty while every segment serves with every member."""
        if len(self.segments) == 1:
            return self.first.why
        return "; ".join(f"segment {number}: {each.why}" for number, each in enumerate(self.segments) if each.why)

    @property
    def lacks_room(self) -> str:
        """Who is full and who is away, where writes wait or are refused for that; else empty."""
        lacking = {each.segment: each.status().lacks_room for each in self.segments}
        if len(self.segments) == 1:
            return lacking[self.first.segment]
        return "; ".join(f"segment {number}: {who}" for number, who in lacking.items() if who)

    async def wait_until_served(self) -> None:
        """Raises what ended this attachment."""
        await asyncio.gather(*(segment.wait_until_served() for segment in self.segments))

    async def extend(self, last_size_bytes: int, further: Sequence[OpenVolume]) -> None:
        """The last segment has this size now, and these follow it; all at once, when they are served.

        Raises what ended one of them; then they are closed, and the volume is as before.
        """
        self._joining = list(further)
        try:
            await asyncio.gather(*(segment.wait_until_served() for segment in further))
        except BaseException:
            await asyncio.gather(*(segment.close() for segment in further))
            raise
        finally:
            self._joining = []
        self.segments[-1].grow(last_size_bytes)
        self._take(further)

    async def close(self) -> None:
        """Let go, as OpenVolume does."""
        await asyncio.gather(*(segment.close() for segment in (*self.segments, *self._joining)))

    def _take(self, segments: Sequence[OpenVolume]) -> None:
        self.segments += segments
        for segment in segments:
            segment.over.add_done_callback(self._end)

    def _end(self, ended: "asyncio.Future[CairnError]") -> None:
        if not self.over.done():
            self.over.set_result(ended.result())
