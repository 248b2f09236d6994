"""The loop around an attached device: what is seen becomes an event, the table says what is done (`supervision`).

Three watch: one hears the kernel's word of dead links, one looks at the device (is it still ours, does its link live,
do its requests stand still), one at control (has the volume moved, has it grown). Control may be away at any time: the
link goes on without it, and a link that breaks then is opened again where the volume was last.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final

import structlog

from blockstore.config import AttachSettings
from blockstore.errors import CairnError
from nbd_server.kernel import handover
from nbd_server.kernel.devices import Host, Owner, Traffic
from nbd_server.kernel.link import Link, open_links, probe
from nbd_server.kernel.netlink import KernelNbd
from nbd_server.kernel.supervision import Effect, Event, State, step
from nbd_server.kernel.whereabouts import Place, Taken, Whereabouts, no_port_at
from nbd_server.uri import NbdTarget

_log = structlog.get_logger(__name__)
#: Between two tries to have the volume served; a front-end that starts anew takes about a second.
_PAUSE_S: Final = 0.2
#: Of the handshake. Control has said that the front-end serves the volume, so there is no hurry to give it up.
_LINK_S: Final = 5.0
_LOST: Final = {
    Event.LINK_DEAD: "the front-end has gone: its connection ended",
    Event.PROBE_FAILED: "the front-end hangs or cannot be reached: its connection is cut",
}
#: Between two looks at the device's counters.
_LOOK_S: Final = 0.25


class Supervisor:
    """One device. links: what the kernel has, where this process made it; none for a device that was found attached.

    place: where the link leads to.
    """

    def __init__(
        self,
        nbd: KernelNbd,
        host: Host,
        whereabouts: Whereabouts,
        settings: AttachSettings,
        *,
        index: int,
        owner: Owner,
        read_only: bool,
        place: Place,
        links: Sequence[Link],
        tell: Callable[[State], None],
    ) -> None:
        self.state = State.SERVED if links else State.LOCATING
        self.ended_by: CairnError | None = None
        """Why the volume is not this client's any more; None where the device was disconnected."""
        self._nbd, self._host, self._whereabouts, self._settings = nbd, host, whereabouts, settings
        self.index: Final = index
        self._owner, self._read_only = owner, read_only
        self._place = place
        self._links = tuple(links)
        self._tell = tell
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._lost_at: float | None = None if links else self._now()
        self._avoided_at = 0.0
        self._last_words = ""
        self._tasks: set[asyncio.Task[None]] = set()
        self._probing: asyncio.Task[None] | None = None
        """Called off when the question is over."""

    async def run(self) -> None:
        """Until the device is disconnected or the volume another client's (see `ended_by`), or cancelled.

        The device stays as it is where this is cancelled: another process may go on with it.
        """
        try:
            await self._run()
        except BaseExceptionGroup as group:
            _log.exception("watching failed in a way that nobody foresaw", device=f"nbd{self.index}")
            raise group.exceptions[0] from group

    async def _run(self) -> None:
        watching = (self._watch_links(), self._watch_device(), self._watch_control())
        async with asyncio.TaskGroup() as group:
            self._tasks = {group.create_task(each) for each in watching}
            if self.state is State.LOCATING:
                self._carry_out(group, Effect.LOCATE)
            while self.state is not State.ENDED:
                self._take(group, await self._events.get())
            for task in list(self._tasks):
                task.cancel()

    # ---- the machine

    def _take(self, group: asyncio.TaskGroup, event: Event) -> None:
        before = self.state
        self.state, effects = step(before, event)
        if self.state is not before:
            _log.debug("attached device", device=f"nbd{self.index}", state=self.state.value, because=event.name)
            self._note_times(event)
            if before is State.ASKING and self._probing is not None:
                self._probing.cancel()
            self._tell(self.state)
        for effect in effects:
            self._carry_out(group, effect)

    def _note_times(self, event: Event) -> None:
        if self.state is State.SERVED:
            if self._lost_at is not None and event is Event.OPENED:
                seconds = round(self._now() - self._lost_at, 2)
                _log.info(
                    "served again", device=f"nbd{self.index}", front_end=self._place.front_end, after_seconds=seconds
                )
            self._lost_at, self._last_words = None, ""
        elif self._lost_at is None and self.state is State.LOCATING:
            self._lost_at = self._now()
            lost = _LOST.get(event, "the volume is served elsewhere")
            _log.warning(lost, device=f"nbd{self.index}", front_end=self._place.front_end)

    def _say(self, text: str, error: CairnError) -> None:
        """Why it does not go on, once for all tries that end in the same way."""
        if str(error) != self._last_words:
            self._last_words = str(error)
            _log.info(text, device=f"nbd{self.index}", front_end=self._place.front_end, error=str(error))

    def _carry_out(self, group: asyncio.TaskGroup, effect: Effect) -> None:
        work: Mapping[Effect, Callable[[], Awaitable[Event]]] = {
            Effect.PROBE: self._probe,
            Effect.LOCATE: self._locate,
            Effect.OPEN: self._open,
            Effect.WAIT: self._wait,
        }
        if effect is Effect.CUT:
            _cut(self._links)
            self._links = ()
        elif effect in work:
            task = group.create_task(self._report(work[effect]))
            self._probing = task if effect is Effect.PROBE else self._probing
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _report(self, work: Callable[[], Awaitable[Event]]) -> None:
        self._events.put_nowait(await work())

    # ---- effects

    async def _probe(self) -> Event:
        for target in self._place.targets:
            try:
                await probe(target, self._owner.client, self._settings.probe_s, self._settings.tls_certificates)
                return Event.PROBE_PASSED
            except CairnError as error:
                self._say("the front-end does not answer", error)
        return Event.PROBE_FAILED

    async def _locate(self) -> Event:
        try:
            self._place = await self._whereabouts.attach(
                self._owner.volume, read_only=self._read_only, avoid=self._whom_to_avoid()
            )
        except Taken as error:
            self.ended_by = error
            return Event.TAKEN
        except CairnError as error:
            self._say("nobody serves the volume yet", error)
            return Event.NOT_LOCATED if await self._control_answers() else Event.LOCATED
        return Event.LOCATED

    def _whom_to_avoid(self) -> str:
        """The front-end that could not be reached for long. Seldom: there may be no other one, or it is this host that
        is cut off, and then the volume must not go round.
        """
        if self._lost_at is None or self._now() - max(self._lost_at, self._avoided_at) < self._settings.avoid_s:
            return ""
        self._avoided_at = self._now()
        return self._place.front_end

    async def _control_answers(self) -> bool:
        """Where it does not, the volume may still be where it was last."""
        try:
            await self._whereabouts.volume(self._owner.volume)
        except CairnError:
            return False
        return True

    async def _open(self) -> Event:
        if not self._place.targets:
            self._say("no link yet", no_port_at(self._place, tls=self._settings.tls_certificates is not None))
        for target in self._place.targets:
            try:
                if await self._open_at(target):
                    return Event.OPENED
            except CairnError as error:
                self._say("no link to the front-end yet", error)
        return Event.NOT_OPENED

    async def _open_at(self, target: NbdTarget) -> bool:
        count = self._owner.connections
        links = await open_links(target, self._owner.client, count, _LINK_S, self._settings.tls_certificates)
        taken: tuple[Link, ...] = ()
        try:
            taken = await handover.replace(self._nbd, self._host, links, self._owner, self.index)
        finally:
            _cut(links[len(taken) :])
        if taken and len(taken) < count:
            _log.warning("fewer links than wanted", device=f"nbd{self.index}", links=len(taken), wanted=count)
        self._links = taken
        return bool(taken)

    async def _wait(self) -> Event:
        await asyncio.sleep(_PAUSE_S)
        return Event.WAITED

    # ---- watching

    async def _watch_links(self) -> None:
        async for index in self._nbd.dead_links():
            if index == self.index and self._has_dead_link():
                self._events.put_nowait(Event.LINK_DEAD)

    def _has_dead_link(self) -> bool:
        """The kernel's word may be of an older link, or of a stand-in."""
        return any(each.is_dead() for each in self._links)

    async def _watch_device(self) -> None:
        last, since = Traffic(0, 0), self._now()
        while self._host.owner(self.index) == self._owner:
            if self._has_dead_link():
                self._events.put_nowait(Event.LINK_DEAD)
            now = self._host.traffic(self.index)
            if now.completed != last.completed or not now.in_flight:
                since = self._now()
            elif self._now() - since >= self._settings.stall_s:
                self._events.put_nowait(Event.STALLED)
                since = self._now()
            last = now
            await asyncio.sleep(_LOOK_S)
        self._events.put_nowait(Event.GONE)

    async def _watch_control(self) -> None:
        while True:
            await asyncio.sleep(self._settings.watch_s)
            if self.state is not State.SERVED:
                continue
            try:
                await self._look_at_control()
            except CairnError as error:
                _log.debug("control says nothing", error=str(error))

    async def _look_at_control(self) -> None:
        volume = await self._whereabouts.volume(self._owner.volume)
        if (volume.attachment.front_end, volume.attachment.client) != (self._place.front_end, self._owner.client):
            self._events.put_nowait(Event.MOVED)
        elif (device := self._host.find(self.index)) and volume.size_bytes > device.size_bytes:
            # The front-end may hear of it later than control; what it does not know yet it would refuse.
            agreed = await probe(
                self._place.targets[0], self._owner.client, self._settings.probe_s, self._settings.tls_certificates
            )
            if await handover.resize(self._nbd, self._host, self._owner, self.index, agreed.size_bytes):
                _log.info("the device has grown", device=f"nbd{self.index}", size_bytes=agreed.size_bytes)

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()


def _cut(links: Sequence[Link]) -> None:
    for link in links:
        link.cut()
