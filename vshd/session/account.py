"""Whom a session runs as: upstream's rules (docs/reference/protocol.md 1.4), and the switch to that user.

The choice is made as root, from the request alone; after switch_to() nothing of the session runs as root.
"""

import os

from vshd.flags import Options
from vshd.session import users
from vshd.session.refusal import RefusalError
from vshd.wire import messages
from vshd.wire.messages import SetupConnectionRequest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    Key = TypeVar("Key")
    Found = TypeVar("Found")

FALLBACK_SHELL = "/bin/sh"
# Its number is the kernel's, not a file's.
ROOT = "root"


class Account:
    """One user, as the session needs it. has_own_groups: those of the group database, too; `gid` alone otherwise."""

    __slots__ = ("gid", "has_own_groups", "home", "name", "shell", "uid")

    def __init__(self, name: str, uid: int, gid: int, home: str, shell: str) -> None:
        self.name = name
        self.uid = uid
        self.gid = gid
        self.home = home or "/"
        self.shell = shell or FALLBACK_SHELL
        self.has_own_groups = True


def choose_account(request: SetupConnectionRequest, options: Options) -> Account:
    """The account of a request. Raises RefusalError with upstream's words."""
    user = os.fsdecode(request.user)
    uid = os.geteuid()
    if request.target == messages.VM_SHELL:
        user = user or options.default_user
        if user != options.default_user and not options.allow_to_switch_user:
            raise _bad_user(f"only {options.default_user} is allowed login on the VM shell", user)
    if options.allow_to_switch_user:
        account = _find_own(uid) if not user else _find_named(user)
    else:
        # Whatever name the client gave, this is who runs.
        account = Account(_find_name(uid), uid, os.getegid(), "/", FALLBACK_SHELL)
    if options.allow_user and account.name not in options.allow_user:
        raise _bad_user(f"user {account.name} is not allowed to log in", account.name)
    if uid not in (0, account.uid):
        raise _bad_user(f"cannot change to user: {user}", user)
    return account


def is_own(account: Account) -> bool:
    """Whether switch_to() leaves this process the user that it is, with that user's own groups."""
    return (account.uid, account.gid) == (os.geteuid(), os.getegid()) and account.has_own_groups


def switch_to(account: Account) -> None:
    """Becomes `account` for good. Raises RefusalError."""
    if os.geteuid() != 0:
        return
    is_other = account.uid != 0
    try:
        os.setgroups(_list_groups(account))
    except OSError as error:
        # Where a container denies it, root may stay as it is.
        if is_other:
            raise _bad_user("could not set supplementary groups", account.name) from error
        return
    try:
        os.setresgid(account.gid, account.gid, account.gid)
    except OSError as error:
        raise _bad_user(f"could not set gid to {account.gid}", account.name) from error
    try:
        os.setresuid(account.uid, account.uid, account.uid)
    except OSError as error:
        raise _bad_user(f"could not set uid to {account.uid}", account.name) from error


def _find_own(uid: int) -> Account:
    found = _ask(users.find_uid, uid)
    if found is not None:
        return _from_entry(found)
    if uid == 0:
        return _make_root()
    raise _bad_user(f"could not find uid: {uid}", str(uid))


def _find_name(uid: int) -> str:
    found = _ask(users.find_uid, uid)
    return str(uid) if found is None else os.fsdecode(found.name)


def _find_named(user: str) -> Account:
    """NAME or UID, with :GROUP or :GID behind it, as docker has them; digits are a name first."""
    name, colon, group = user.partition(":")
    account = _find_user(name)
    gid = _find_group(group) if colon else 0
    if account is None or gid is None:
        hint = "if attempting to connect to a containerless guest please use `vsh termina penguin`."
        raise _bad_user(f"could not find user: {user}, {hint}", user)
    if colon:
        account.gid = gid
        account.has_own_groups = False
    return account


def _find_user(name: str) -> Account | None:
    found = _ask(users.find_user, os.fsencode(name))
    if found is not None:
        return _from_entry(found)
    if name == ROOT:
        return _make_root()
    uid = users.parse_id(os.fsencode(name))
    if uid is None:
        return None
    found = _ask(users.find_uid, uid)
    return Account(str(uid), uid, 0, "/", FALLBACK_SHELL) if found is None else _from_entry(found)


def _find_group(name: str) -> int | None:
    found = _ask(users.find_group, os.fsencode(name))
    return users.parse_id(os.fsencode(name)) if found is None else found.gid


def _list_groups(account: Account) -> list[int]:
    """Raises OSError."""
    if not account.has_own_groups:
        return [account.gid]
    return users.list_groups(os.fsencode(account.name), account.gid)


def _ask(find: "Callable[[Key], Found | None]", key: "Key") -> "Found | None":
    """What a look-up finds. Raises RefusalError where the file cannot be read."""
    try:
        return find(key)
    except OSError as error:
        reason = f"could not read the users: {error.filename or 'file'}: {error.strerror}"
        raise RefusalError(reason, messages.BAD_USER, error=error.errno or 0) from error


def _make_root() -> Account:
    """Root of a system without a file of users, or whose file has no root."""
    return Account(ROOT, 0, 0, "/", FALLBACK_SHELL)


def _from_entry(entry: users.UserEntry) -> Account:
    return Account(os.fsdecode(entry.name), entry.uid, entry.gid, os.fsdecode(entry.home), os.fsdecode(entry.shell))


def _bad_user(description: str, user: str) -> RefusalError:
    return RefusalError(description, messages.BAD_USER, subject=os.fsencode(user))
