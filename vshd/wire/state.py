"""The states of a connection, as a table.

A client opens, waits for the response and runs. A deferred request (docs/reference/protocol.md 2.3) inserts one more
round: the stub is answered with "go on", the request follows in chunks, and a second response decides.

    client:  OPENING -> AWAITING_RESPONSE -> RUNNING -> OVER
                                \\-> DEFERRED ---^
    server:  AWAITING_SETUP -> PREPARING -> RUNNING -> OVER
                    \\-> DEFERRED --^

With a token (2.9) both sides are AWAITING_PROOF before they are DEFERRED.
A forward (3) ends in RAW instead of RUNNING: from there on the connection's bytes belong to another protocol.
The process that keeps a lasting session (7) begins in PREPARING: another process has taken the request.

OVER is the end both sides agreed on (EXITED, FAILED, a refusal); BROKEN is every other end, and can follow every state
but OVER. A step that is not in the table raises LocalProtocolError and changes nothing: what the *peer* does wrong is
found before a step is taken.
"""

from vshd.wire.errors import LocalProtocolError

# States.
OPENING = "opening"
AWAITING_RESPONSE = "awaiting the response"
AWAITING_SETUP = "awaiting the setup"
AWAITING_PROOF = "awaiting the proof"
DEFERRED = "deferred"
PREPARING = "preparing"
RUNNING = "running"
RAW = "raw"
OVER = "over"
BROKEN = "broken"

# Steps.
SEND_SETUP = "send the setup"
CHALLENGE = "challenge"
GO_ON = "go on with the request"
REQUEST = "take the request"
ACCEPT = "accept"
HAND_OVER = "hand the connection over"
REFUSE = "refuse"
ADOPT = "go on with a request of another process"
END = "end the session"

CLIENT = {
    (OPENING, SEND_SETUP): AWAITING_RESPONSE,
    (AWAITING_RESPONSE, GO_ON): DEFERRED,
    (AWAITING_RESPONSE, CHALLENGE): AWAITING_PROOF,
    (AWAITING_RESPONSE, ACCEPT): RUNNING,
    (AWAITING_RESPONSE, HAND_OVER): RAW,
    (AWAITING_RESPONSE, REFUSE): OVER,
    (AWAITING_PROOF, GO_ON): DEFERRED,
    (AWAITING_PROOF, END): OVER,
    (DEFERRED, ACCEPT): RUNNING,
    (DEFERRED, HAND_OVER): RAW,
    (DEFERRED, REFUSE): OVER,
    (DEFERRED, END): OVER,
    (RUNNING, END): OVER,
}

SERVER = {
    (AWAITING_SETUP, GO_ON): DEFERRED,
    (AWAITING_SETUP, REQUEST): PREPARING,
    (AWAITING_SETUP, ADOPT): PREPARING,
    (AWAITING_SETUP, CHALLENGE): AWAITING_PROOF,
    (AWAITING_SETUP, REFUSE): OVER,
    (AWAITING_PROOF, GO_ON): DEFERRED,
    (AWAITING_PROOF, REFUSE): OVER,
    (DEFERRED, REQUEST): PREPARING,
    (DEFERRED, REFUSE): OVER,
    (DEFERRED, END): OVER,
    (PREPARING, ACCEPT): RUNNING,
    (PREPARING, HAND_OVER): RAW,
    (PREPARING, REFUSE): OVER,
    (RUNNING, END): OVER,
}


def next_state(table: dict[tuple[str, str], str], state: str, step: str) -> str:
    """The state that `step` leads to. Raises LocalProtocolError when the table has none."""
    following = table.get((state, step))
    if following is None:
        raise LocalProtocolError(f"cannot {step} while the connection is {state}")
    return following
