"""The options of the handshake: what each is answered, and what was agreed on by them. Pure.

One method an option (NBD, "Option types"). An answer is the replies, which are put into the buffer that the handshake
sends, and the step that it takes. Where an export has to be asked for elsewhere, nothing is answered at first: the step
is LOOK_UP_BEGUN, and the same option is answered anew when what it waits for is done.

`Options` is all that a client has negotiated: who starts anew, as after STARTTLS, makes another one.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final, Generic, TypeVar

from nbd_server import metadata, wire
from nbd_server.access import Access, Session
from nbd_server.exported import Catalogue, E, information, transmission_flags
from nbd_server.handshake_states import Step
from nbd_server.links import parse_asked
from nbd_server.terms import Context, Style, Terms
from nbd_server.wire import Malformed, Option, OptionReply, ProtocolError

Found = TypeVar("Found")

_NAMES: Final[Mapping[int, Callable[[bytes], str]]] = {
    Option.EXPORT_NAME: wire.parse_name,
    Option.INFO: lambda data: wire.parse_info_query(data).name,
    Option.GO: lambda data: wire.parse_info_query(data).name,
    Option.LIST_META_CONTEXT: lambda data: wire.parse_context_query(data).name,
    Option.SET_META_CONTEXT: lambda data: wire.parse_context_query(data).name,
}
"""The name of an export in an option's data; raises Malformed."""
_BEFORE_TLS: Final = frozenset({Option.STARTTLS, Option.ABORT})
"""All that a server which requires TLS hears before it (NBD, "FORCEDTLS mode")."""


class Options(Generic[E]):
    """What one client and the server have agreed on.

    chosen: the export, once one is. client, link_set: whose link this is, and of which set (nbd_server/links.py), or
    empty. zeroes: whether the reply to EXPORT_NAME is padded. fixed: whether the client speaks fixed newstyle.
    looking_up: what an option waits for. read_only: whether the client may not change what it chose, whatever the
    export allows.
    """

    def __init__(self, exports: Catalogue[E], to_send: bytearray, session: Session) -> None:
        """to_send: where replies are put. session: what is asked of the client, and known of it."""
        self.chosen: E | None = None
        self.client = self.link_set = ""
        self.zeroes = True
        self.fixed = False
        self.read_only = False
        self._session = session
        self.looking_up: Awaitable[None] | None = None
        self._style = Style.SIMPLE
        self._contexts: tuple[Context, ...] = ()
        self._contexts_of = ""
        """The name of the export that these were selected for, as the client said it."""
        self._chosen_name = ""
        self._exports = exports
        self._to_send = to_send
        self._option = 0
        self._answers: Final[Mapping[int, Callable[[bytes], Step]]] = {
            Option.EXPORT_NAME: self._answer_export_name,
            Option.ABORT: self._answer_abort,
            Option.LIST: self._answer_list,
            Option.STARTTLS: self._answer_starttls,
            Option.INFO: self._answer_info,
            Option.GO: self._answer_go,
            Option.STRUCTURED_REPLY: self._answer_structured_reply,
            Option.EXTENDED_HEADERS: self._answer_extended_headers,
            Option.LIST_META_CONTEXT: self._answer_list_meta_context,
            Option.SET_META_CONTEXT: self._answer_set_meta_context,
        }

    @property
    def terms(self) -> Terms:
        """What holds for requests of the export that was named last."""
        contexts = self._contexts if self._chosen_name == self._contexts_of else ()
        return Terms(self._style, contexts)

    def answer(self, option: int, data: bytes, *, looked_up: bool = False) -> Step:
        """Answer an option. Raises ProtocolError where the connection is to be dropped without a word.

        looked_up: what it named has been looked up; it is not waited for again.
        """
        self._option = option
        if self._session.must_start_tls and option not in _BEFORE_TLS:
            return self._demand_tls()
        self.looking_up = None if looked_up else self._look_up(option, data)
        if self.looking_up is not None:
            return Step.LOOK_UP_BEGUN
        return self._answers.get(option, self._answer_unknown)(data)

    def refuse_length(self, option: int, limit_bytes: int) -> Step:
        """Answer an option whose data were longer than that, and were dropped."""
        self._option = option
        if self._session.must_start_tls and option not in _BEFORE_TLS:
            return self._demand_tls()
        if option in self._answers:
            return self._refuse(OptionReply.ERR_TOO_BIG, f"at most {limit_bytes} bytes of data are allowed")
        return self._answer_unknown(b"")

    def _look_up(self, option: int, data: bytes) -> Awaitable[None] | None:
        """What to wait for before the export can be found that an option names, if it names one that may be used."""
        parse_name = _NAMES.get(option)
        if parse_name is None:
            return None
        try:
            name = parse_asked(parse_name(data)).export
            if self._access(self._exports.find(name), name) is Access.NONE:
                return None
            contexts = option in (Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT)
            snapshots = contexts and metadata.wants_snapshots(wire.parse_context_query(data).queries)
            return self._exports.look_up(name, snapshots=snapshots)
        except Malformed:
            return None  # it is answered as such

    def _demand_tls(self) -> Step:
        """NBD, "FORCEDTLS mode". EXPORT_NAME cannot be answered with an error, nor a client that is not "fixed"."""
        if not self.fixed or self._option == Option.EXPORT_NAME:
            raise ProtocolError("TLS is required here, and was not started")
        return self._refuse(OptionReply.ERR_TLS_REQD, "TLS is required here: start it first")

    def is_still_allowed(self) -> bool:
        """Whether the rules allow what was chosen as it was granted."""
        return self._access(self.chosen) >= (Access.READ if self.read_only else Access.WRITE)

    def _reply(self, reply: OptionReply, data: bytes = b"") -> None:
        self._to_send += wire.serialize_option_reply(self._option, reply, data)

    def _refuse(self, reply: OptionReply, message: str) -> Step:
        self._reply(reply, message.encode())
        return Step.OPTION_ANSWERED

    def _answer_unknown(self, _: bytes) -> Step:
        return self._refuse(OptionReply.ERR_UNSUP, f"option {self._option} is not known here")

    def _answer_export_name(self, data: bytes) -> Step:
        """This option has no way to tell an error: the connection is dropped instead.

        Also behind EXTENDED_HEADERS, where the NBD text forbids it.
        """
        if self._style is Style.EXTENDED:
            raise ProtocolError("EXPORT_NAME after EXTENDED_HEADERS")
        try:
            self._chosen_name = wire.parse_name(data)
            asked = parse_asked(self._chosen_name)
        except Malformed as error:
            raise ProtocolError(str(error)) from error
        export = self._exports.find(asked.export)
        access = self._access(export, asked.export)
        if export is None or access is Access.NONE or export.client not in ("", asked.client):
            raise ProtocolError("no such export")
        self.read_only = access is Access.READ
        self._to_send += wire.serialize_export(export.size_bytes, self._flags(export))
        if self.zeroes:
            self._to_send += wire.EXPORT_NAME_PADDING
        self.chosen, self.client, self.link_set = export, asked.client, asked.link_set
        return Step.EXPORT_CHOSEN

    def _answer_abort(self, _: bytes) -> Step:
        self._reply(OptionReply.ACK)
        return Step.ENDED

    def _answer_starttls(self, data: bytes) -> Step:
        if self._session.peer is not None:
            return self._refuse(OptionReply.ERR_INVALID, "TLS has been started already")
        if data:
            return self._refuse(OptionReply.ERR_INVALID, "STARTTLS takes no data")
        if not self._session.may_start_tls or not self.fixed:
            return self._refuse(OptionReply.ERR_POLICY, "this server has no certificate, so there is no TLS")
        self._reply(OptionReply.ACK)
        return Step.TLS_AGREED

    def _answer_list(self, data: bytes) -> Step:
        if data:
            return self._refuse(OptionReply.ERR_INVALID, "LIST takes no data")
        for export in (each for each in self._exports if self._access(each)):
            self._reply(OptionReply.SERVER, wire.serialize_server(export.name, export.description))
        self._reply(OptionReply.ACK)
        return Step.OPTION_ANSWERED

    def _answer_structured_reply(self, data: bytes) -> Step:
        if data:
            return self._refuse(OptionReply.ERR_INVALID, "STRUCTURED_REPLY takes no data")
        if self._style is Style.EXTENDED:
            return self._refuse(OptionReply.ERR_EXT_HEADER_REQD, "extended headers are agreed on, and go beyond this")
        return self._agree(Style.STRUCTURED)

    def _answer_extended_headers(self, data: bytes) -> Step:
        if data:
            return self._refuse(OptionReply.ERR_INVALID, "EXTENDED_HEADERS takes no data")
        return self._agree(Style.EXTENDED)

    def _answer_list_meta_context(self, data: bytes) -> Step:
        found = self._find_contexts(data, metadata.listed)
        for name in found or ():
            self._reply(OptionReply.META_CONTEXT, wire.serialize_meta_context(0, name))
        if found is not None:
            self._reply(OptionReply.ACK)
        return Step.OPTION_ANSWERED

    def _answer_set_meta_context(self, data: bytes) -> Step:
        """Whatever was selected before is not any more, also where this fails."""
        self._contexts = ()
        found = self._find_contexts(data, metadata.selected)
        if found is None:
            return Step.OPTION_ANSWERED
        if len(found) > metadata.MAX_CONTEXTS:
            return self._refuse(OptionReply.ERR_TOO_BIG, f"at most {metadata.MAX_CONTEXTS} contexts may be selected")
        self._contexts = tuple(found)
        self._contexts_of = wire.parse_context_query(data).name
        for context in self._contexts:
            self._reply(OptionReply.META_CONTEXT, wire.serialize_meta_context(context.number, context.name))
        self._reply(OptionReply.ACK)
        return Step.OPTION_ANSWERED

    def _find_contexts(
        self, data: bytes, find: Callable[[Sequence[str], Mapping[str, str]], list[Found]]
    ) -> list[Found] | None:
        """What the queries find; None where an error was the answer."""
        try:
            query = wire.parse_context_query(data)
            if self._style is Style.SIMPLE:
                raise Malformed("metadata contexts need structured replies, or extended headers, first")
            export = self._find(query.name)
            return None if export is None else find(query.queries, export.snapshots)
        except Malformed as error:
            self._refuse(OptionReply.ERR_INVALID, str(error))
            return None

    def _agree(self, style: Style) -> Step:
        self._style = style
        self._reply(OptionReply.ACK)
        return Step.OPTION_ANSWERED

    def _answer_info(self, data: bytes) -> Step:
        self._describe(data)
        return Step.OPTION_ANSWERED

    def _answer_go(self, data: bytes) -> Step:
        self.chosen = self._describe(data)
        return Step.OPTION_ANSWERED if self.chosen is None else Step.EXPORT_CHOSEN

    def _describe(self, data: bytes) -> E | None:
        """Answer INFO or GO; the export, or None where an error was the answer."""
        try:
            query = wire.parse_info_query(data)
        except Malformed as error:
            self._refuse(OptionReply.ERR_INVALID, str(error))
            return None
        export = self._find(query.name)
        if export is None:
            return None
        self._chosen_name = query.name
        self._reply(OptionReply.INFO, wire.serialize_info_export(export.size_bytes, self._flags(export)))
        for item in dict.fromkeys(query.items):
            if (told := information(export, item)) is not None:
                self._reply(OptionReply.INFO, told)
        self._reply(OptionReply.ACK)
        return export

    def _find(self, name: str) -> E | None:
        """The export that an option names; None where an error was the answer."""
        asked = parse_asked(name)
        export = self._exports.find(asked.export)
        access = self._access(export, asked.export)
        if access is Access.NONE:
            self._refuse_access(asked.export)
            return None
        if export is None:
            self._refuse(OptionReply.ERR_UNKNOWN, self._exports.why_not(asked.export))
            return None
        if export.client not in ("", asked.client):
            self._refuse(OptionReply.ERR_POLICY, f"{export.name} is attached for client {export.client}")
            return None
        self.client, self.link_set, self.read_only = asked.client, asked.link_set, access is Access.READ
        return export

    def _access(self, export: E | None, name: str = "") -> Access:
        """What the client may do with an export; where there is none, what it might with one of that name."""
        return self._session.access((name,) if export is None else (export.name, *export.aliases))

    def _refuse_access(self, name: str) -> None:
        """In the same words whether there is such an export or not."""
        if self._session.may_start_tls:
            self._refuse(OptionReply.ERR_TLS_REQD, f"{name[:256]!r} is for clients that start TLS")
        else:
            self._refuse(OptionReply.ERR_POLICY, f"no rule lets you use {name[:256]!r}")

    def _flags(self, export: E) -> int:
        return transmission_flags(export, self.terms, read_only=self.read_only)
