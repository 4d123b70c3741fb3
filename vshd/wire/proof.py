"""The proof of a machine's token (docs/reference/protocol.md 2.9): what each side computes over what both have seen.

Owns the token's text form, the two roles and the arithmetic; the driver brings the token and a nonce that was never
used before. Imported only where there is a token.
"""

# hmac.compare_digest, without hashlib and OpenSSL behind it: those are a third of a short command's start.
from _operator import _compare_digest as compare_digest

from vshd.wire.errors import TokenError

# The interpreter's own SHA-256, by its name since Python 3.12 and before; a Python without either has hashlib.
try:
    from _sha2 import sha256  # type: ignore[import-not-found]  # typeshed lacks it
except ImportError:
    try:
        from _sha256 import sha256  # type: ignore[import-not-found]  # typeshed lacks it
    except ImportError:
        from hashlib import sha256

TOKEN_BYTES = 32
NONCE_BYTES = 32
PROOF_BYTES = 32
# In front of the token's hexadecimal digits, in a file and among the firmware's strings: what it is, and no other's.
TOKEN_PREFIX = b"vmkit.token:"
TOKEN_TEXT_BYTES = len(TOKEN_PREFIX) + 2 * TOKEN_BYTES

# Who proves; without it a proof could be handed back to its maker.
CLIENT, SERVER = b"client", b"server"
_CONTEXT = b"vsh token proof 1\0"

# RFC 2104, with the block size of SHA-256.
_BLOCK_BYTES = 64
_INNER = bytes(byte ^ 0x36 for byte in range(256))
_OUTER = bytes(byte ^ 0x5C for byte in range(256))


class Proof:
    """One side's part in one connection. Invariant: the transcript is what was bound, whole and in order."""

    __slots__ = ("_role", "_token", "_transcript", "nonce")

    def __init__(self, role: bytes, token: bytes, nonce: bytes) -> None:
        """role: ours, CLIENT or SERVER. nonce: NONCE_BYTES of randomness, made for this connection."""
        if len(token) != TOKEN_BYTES or len(nonce) != NONCE_BYTES:
            raise TokenError(f"a token has {TOKEN_BYTES} bytes, and a nonce {NONCE_BYTES}")
        self.nonce = nonce
        self._role = role
        self._token = token
        self._transcript = b""

    def bind(self, payload: bytes) -> None:
        """Adds a payload, exactly as it travelled: neither side can have seen another one."""
        self._transcript += len(payload).to_bytes(4, "little") + payload

    def make(self) -> bytes:
        """What we prove ourselves with."""
        return self._make(self._role)

    def is_peers(self, claim: bytes) -> bool:
        """Whether the peer has proven itself, found in a time that does not tell how much of its claim was right."""
        return compare_digest(self._make(SERVER if self._role == CLIENT else CLIENT), claim)

    def _make(self, role: bytes) -> bytes:
        return hmac_sha256(self._token, _CONTEXT + role + b"\0" + self._transcript)


def is_same(one: bytes, other: bytes) -> bool:
    """Whether two secrets are the same, found in a time that does not tell where they differ."""
    return compare_digest(one, other)


def hmac_sha256(key: bytes, message: bytes) -> bytes:
    """HMAC-SHA256 (RFC 2104) with a key of at most one block."""
    if len(key) > _BLOCK_BYTES:
        raise TokenError("a key of more than one block")
    key = key.ljust(_BLOCK_BYTES, b"\0")
    digest: bytes = sha256(key.translate(_OUTER) + sha256(key.translate(_INNER) + message).digest()).digest()
    return digest


def render_token(token: bytes) -> bytes:
    """The text that parse_token() reads."""
    return TOKEN_PREFIX + token.hex().encode()


def parse_token(text: bytes) -> bytes:
    """The token in a text; a newline may follow it. Raises TokenError."""
    text = text.removesuffix(b"\n")
    digits = text[len(TOKEN_PREFIX) :]
    is_hex = all(byte in b"0123456789abcdef" for byte in digits)
    if not text.startswith(TOKEN_PREFIX) or len(text) != TOKEN_TEXT_BYTES or not is_hex:
        raise TokenError(f"a token is '{TOKEN_PREFIX.decode()}' and {2 * TOKEN_BYTES} hexadecimal digits")
    return bytes.fromhex(digits.decode())
