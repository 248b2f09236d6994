"""A restored volume's way to stand by itself, as its front-end drives it: describe, fill, and HYDRATED at the end.

The first thing that a front-end does is to ask a whole replica, as of its epoch's first commit, whether
there is a source at all: one that ended must never be filled from again. Then every block that the source
maps is filled, whether or not the guest has written it meanwhile: a fill lies below. All of it is done
again by the next front-end, since this one keeps nothing.
"""

from typing import TYPE_CHECKING, Any, Final

from blockstore.errors import CairnError
from tests.simulation.network import Call
from tests.simulation.requests import DescribeRequest

if TYPE_CHECKING:
    from tests.simulation.front_end import FrontEnd
    from tests.simulation.world import World

_DEADLINE_S: Final = 0.6


class Hydrator:
    """Of one front-end; begins when that serves, and rests once the faults are over."""

    def __init__(self, front_end: "FrontEnd", world: "World") -> None:
        self._front_end = front_end
        self._world = world
        self._left = sorted(world.source)
        self._began = False

    def begin(self) -> None:
        if self._world.source and not self._began:
            self._began = True
            self._describe()

    def _later(self, action: Any) -> None:
        def act() -> None:
            if self._front_end.over is None and self._world.chaos:
                action()

        self._front_end.after(self._world.random.random() * self._world.plan.fill_pause_s, act)

    def _describe(self) -> None:
        front_end, world = self._front_end, self._world
        node = world.random.choice(world.nodes)
        request = DescribeRequest(front_end.leader.commit)

        def answered(answer: Any) -> None:
            if isinstance(answer, CairnError):
                self._later(self._describe)
                return
            world.checker.described(front_end, answer)
            if answer.meta.source:
                self._next()

        Call(
            world.network, front_end, node, handle=lambda call: node.describe(call, request), answered=answered,
            failed=lambda: self._later(self._describe), deadline_s=_DEADLINE_S,
        )  # fmt: skip

    def _next(self) -> None:
        if self._left:
            block = self._left[0]
            self._later(lambda: self._front_end.guest.fill(block, self._filled))
        else:
            self._later(lambda: self._front_end.guest.end_source(self._ended))

    def _filled(self, done: bool) -> None:
        """One that failed is done again: whether its record commits later is all the same."""
        if done:
            del self._left[0]
        self._next()

    def _ended(self, done: bool) -> None:
        """Nothing more is filled either way: the record may commit yet."""
        self._world.seen["hydrated"] += done
