"""Whom a session runs as: upstream's rules (docs/reference/protocol.md 1.4), and the switch to that user.

The choice is made as root, from the request alone; after switch_to() nothing of the session runs as root.
"""

import os
import pwd

from vshd.flags import Options
from vshd.session.refusal import RefusalError
from vshd.wire import messages
from vshd.wire.messages import SetupConnectionRequest

FALLBACK_SHELL = "/bin/sh"
# (uid_t)-1 means no user to setresuid(2).
ID_MAX = (1 << 32) - 2


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


def warm_up() -> None:
    """Lets the C library load and parse what look-ups need, once for all sessions that are forked from here."""
    try:
        account = _find_own(os.geteuid())
        os.getgrouplist(account.name, account.gid)
    except (RefusalError, OSError):
        pass


def is_own(account: Account) -> bool:
    """Whether switch_to() leaves this process the user that it is, with that user's own groups."""
    return (account.uid, account.gid) == (os.geteuid(), os.getegid()) and account.has_own_groups


def switch_to(account: Account) -> None:
    """Becomes `account` for good. Raises RefusalError."""
    if os.geteuid() != 0:
        return
    is_other = account.uid != 0
    try:
        if account.has_own_groups:
            os.initgroups(account.name, account.gid)
        else:
            os.setgroups([account.gid])
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
    try:
        return _from_entry(pwd.getpwuid(uid))
    except KeyError as error:
        raise _bad_user(f"could not find uid: {uid}", str(uid)) from error


def _find_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _find_named(user: str) -> Account:
    """NAME or UID, with :GROUP or :GID behind it, as docker has them; digits are a name first."""
    name, colon, group = user.partition(":")
    try:
        account = _find_user(name)
        if colon:
            account.gid = _find_group(group)
            account.has_own_groups = False
        return account
    except (KeyError, ValueError, UnicodeError) as error:
        hint = "if attempting to connect to a containerless guest please use `vsh termina penguin`."
        raise _bad_user(f"could not find user: {user}, {hint}", user) from error


def _find_user(name: str) -> Account:
    try:
        return _from_entry(pwd.getpwnam(name))
    except KeyError:
        uid = _parse_id(name)
    try:
        return _from_entry(pwd.getpwuid(uid))
    except KeyError:
        return Account(str(uid), uid, 0, "/", FALLBACK_SHELL)


def _find_group(name: str) -> int:
    import grp  # noqa: PLC0415 - few ask for a group

    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        return _parse_id(name)


def _parse_id(text: str) -> int:
    """Raises KeyError for what is no number, or too large a one."""
    if not (text.isascii() and text.isdigit() and int(text) <= ID_MAX):
        raise KeyError(text)
    return int(text)


def _from_entry(entry: pwd.struct_passwd) -> Account:
    return Account(entry.pw_name, entry.pw_uid, entry.pw_gid, entry.pw_dir, entry.pw_shell)


def _bad_user(description: str, user: str) -> RefusalError:
    return RefusalError(description, messages.BAD_USER, subject=os.fsencode(user))
