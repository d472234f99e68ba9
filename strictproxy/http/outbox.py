"""
Writes of one turn of the reactor, sent back to back at its end.

To send to a peer that sleeps costs several times what it costs to send to one
that is awake: under load, most of a small exchange's CPU time. So while many
writes come in one turn, they are kept until that turn is over; the first send
then wakes the peer, and the others find it running. With few writes a turn
there is nothing to gain, and each is sent at once.

Nothing is ever kept beyond the turn it was written in.
"""

from __future__ import annotations

from twisted.internet.tcp import Connection

#: Every so many immediate writes, one turn's worth is counted.
_SAMPLE = 64
#: Keeping pays for itself from about so many writes a turn.
_WORTH = 4
#: Longer ones are sent at once: what counts then is the copying, not the waking.
_SMALL = 8192


class Outbox:
    """
    Decides for each write whether it is sent now or at the end of this turn.

    :param worth: writes in one turn from which on the next turn's are kept.
    """

    __slots__ = ("_count", "_keeping", "_pending", "_scheduled", "_sent", "_worth")

    def __init__(self, worth: int = _WORTH) -> None:
        self._worth = worth
        self._pending: dict[Connection, bytes] = {}
        self._keeping = not worth
        #: the end of this turn is being waited for
        self._scheduled = False
        #: writes in this turn, counted while `_scheduled`
        self._count = 0
        self._sent = 0

    def keep(self, transport: Connection, data: bytes) -> bool:
        """
        Take `data`, whose transport has nothing else to send, for the end of this turn.

        :return: False if it is to be sent now instead.
        """
        if self._scheduled:
            self._count += 1
        else:
            self._sent += 1
            if not self._keeping and self._sent < _SAMPLE:
                return False
            self._sent = 0
            self._count = 1
            self._scheduled = True
            transport.reactor.callLater(0, self._end_of_turn)  # type: ignore[attr-defined]  # set by twisted
        before = self._pending.get(transport)
        if before is not None:
            self._pending[transport] = before + data
            return True
        if not self._keeping or len(data) > _SMALL:
            return False
        self._pending[transport] = data
        return True

    def flush(self, transport: Connection) -> None:
        """Send what is kept for one transport, because something must not overtake it."""
        data = self._pending.pop(transport, None)
        if data is not None:
            send(transport, data)

    def _end_of_turn(self) -> None:
        self._scheduled = False
        self._keeping = self._count >= self._worth
        pending, self._pending = self._pending, {}
        for transport, data in pending.items():
            send(transport, data)


def send(transport: Connection, data: bytes) -> None:
    """
    Send what the kernel takes, and leave the rest to the transport.

    An error is left for the transport to find, so that the connection is lost
    in the usual way.
    """
    if not transport.connected:
        return
    try:
        sent = transport.socket.send(data)
    except OSError:
        sent = 0
    if sent != len(data):
        transport.write(data[sent:] if sent else data)
