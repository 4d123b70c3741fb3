"""vshd's command line: the spellings of upstream's (libbrillo) flags, and the options they make.

A flag is `--name=value` or `-name=value`. `-` may stand for `_`. Booleans may also be `--name` and `--noname`. The last
one wins. Knows nothing of what options do.
"""

from vshd.signals import SIGUSR2

UNKNOWN_FLAG_STATUS = 64
ILLEGAL_VALUE_STATUS = 65

PORT_MAX = (1 << 32) - 1
VSHD_PORT = 9001
HOST_CID = 2
# Of --max_processes: the user and the memory decide (vshd.session.limits).
DEFAULT_PROCESSES = -1

# Logging flags that libbrillo programs accept; they change nothing here.
IGNORED = ("v", "vmodule")
# Each takes the place of the server; vshd.services.table has what runs then.
OTHER_MODES = ("forward_to_host_port", "forward_to", "inetd", "activate", "ipv6", "exec_from")
# inetd's own way to write it.
VALUE_MAY_FOLLOW = ("inetd", "activate", "exec-from", "exec_from")
# vsock_guest_exec's way to ask for --persistent.
PERSISTENT = "persistent"


class FlagError(Exception):
    """A word of the command line is wrong. status: the program's exit status."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


class Words:
    """The words behind the flags: the command, for the modes that have one."""

    __slots__ = ("command",)


class Options(Words):
    """The options of one run. Attributes have the flags' names."""

    __slots__ = (
        "activate",
        "allow_cid",
        "allow_legacy_clients",
        "allow_to_switch_user",
        "allow_user",
        "default_user",
        "end_sessions",
        "exec_from",
        "extended",
        "forward_to",
        "forward_to_host_port",
        "freeze_file",
        "handshake_timeout",
        "help",
        "inetd",
        "inherit_env",
        "ipv6",
        "keepalive",
        "lasting_dir",
        "lasting_time",
        "listen",
        "log_kmsg",
        "log_stderr",
        "logs",
        "max_lasting",
        "max_memory",
        "max_processes",
        "max_sessions",
        "persistent",
        "power_off",
        "power_off_signal",
        "ready",
        "root_namespace",
        "spare_time",
        "token_from",
        "version",
    )

    def __init__(self) -> None:
        self.command: list[str] = []
        self.activate = ""
        self.allow_cid: list[str] = []
        self.allow_legacy_clients = False
        self.allow_to_switch_user = True
        self.allow_user: list[str] = []
        self.default_user = "root"
        self.end_sessions = False
        self.exec_from = ""
        self.extended = True
        self.forward_to = ""
        self.forward_to_host_port = 0
        self.freeze_file = ""
        self.handshake_timeout = 30
        self.help = False
        self.inetd = ""
        self.inherit_env = False
        self.ipv6 = ""
        self.keepalive = 120
        self.lasting_dir = ""
        self.lasting_time = 86_400
        self.listen = f"vsock:{VSHD_PORT}"
        self.log_kmsg = True
        self.log_stderr = False
        self.logs = ""
        self.max_lasting = 100
        self.max_memory = 0
        self.max_processes = DEFAULT_PROCESSES
        self.max_sessions = 256
        self.persistent = False
        self.power_off = False
        self.power_off_signal = SIGUSR2
        self.ready = ""
        self.root_namespace = ""
        self.spare_time = 5
        self.token_from = "auto"  # noqa: S105 - where it is, not what
        self.version = False


HELP = """\
usage: vshd [flags]
       vshd --inetd PORT [flags] -- command [argument ...]
       vshd --exec-from CID:PORT [persistent] [flags]

Serves shells and commands to vsh, over vsock. Values in parentheses are defaults.

  --listen=vsock:PORT|unix:PATH   where to listen (vsock:9001); a socket from systemd takes its place
  --ready=CID:PORT                once vshd listens, connect there from a port below 1024 and send READY=1
  --default_user=NAME             the user for clients that name none (root)
  --allow_to_switch_user          clients may name another user (true)
  --allow_user=NAME               serve only this user; may be repeated
  --allow_cid=N|any               serve this CID beside 2, the host; may be repeated
  --token_from=auto|smbios|none|stdin|file:PATH
                                  the place of the secret token, which each client must prove (auto)
                                  smbios: in the firmware's OEM strings, or vshd does not start; none: no token
                                  stdin: one line of standard input; file: a file of mode 0600
                                  auto: as smbios, if the firmware has one and vshd listens on vsock; else no token
  --allow_legacy_clients          serve clients of ChromeOS's protocol without the token (false)
  --inherit_env                   commands get vshd's own environment variables, too (false)
  --forward_to_host_port=PORT     do not listen: serve one session on a connection to the host's PORT
  --forward_to=vsock:CID:PORT|unix:PATH
                                  the same, but connect to this place
  --inetd=PORT|unix:PATH          no shells: run one command for each connection, with it as stdin and stdout
  --activate=PORT|unix:PATH       no shells: run one command, with the listening socket in LISTEN_FDS, as systemd does
  --ipv6=PREFIX                   no shells: carry TCP connections to [PREFIX::2]:PORT to the host's vsock port
  --exec_from=[CID]:[PORT]        no shells: connect to the host, run one command that it sends, exit with its status
                                  (CID 2, port 1024; a part that is no number is the default)
  --persistent                    with --exec_from: run commands until the host leaves (false)
  --power_off                     the host may end this guest: pid 1 takes USR2 for it, as busybox's and vshd's own do
                                  (false; set by vshd's own init)
  --power_off_signal=NUMBER       what --power_off sends instead of USR2 (12); systemd's is 38, SIGRTMIN+4
  --root_namespace=PATH           sessions and commands run in the mount namespace that PATH stands for, with its users
                                  and files: /proc/PID/ns/mnt, or a file that unshare --mount=PATH made
  --freeze_file=PATH              the host may freeze this machine for a snapshot, and thaw it; PATH keeps the state
  --handshake_timeout=SECONDS     how long a client may take to send its request (30)
  --keepalive=SECONDS             give up a client that sends nothing for this time (120); 0: never
  --max_sessions=N                at most this many sessions at once (256)
  --max_processes=N               at most this many processes for each user (RLIMIT_NPROC); 0: no limit
                                  (root: no limit; other users: one process for each MiB of memory, but at least 128)
  --max_memory=MIB                limit the address space of each process (RLIMIT_AS); 0: no limit (0)
  --lasting_dir=DIR               where vshd finds the sessions that last (/run/vshd-sessions)
  --max_lasting=N                 keep at most this many sessions of each user (100)
  --lasting_time=SECONDS          forget a session that lasts so long after its command has ended (86400)
  --spare_time=SECONDS            after a connection, keep a process ready for the next one (5)
  --end_sessions                  end all sessions, too, on TERM or INT; without it they go on (false)
  --extended                      use the extended protocol with clients that offer it (true)
  --log_kmsg                      log to /dev/kmsg, else to syslog (true)
  --log_stderr                    log to stderr only (false)
  --logs=PATH                     the host may read this guest's log: PATH is the socket of the process that collects it
                                  (set by vshd's own init)
  --version, --help               print the version; print this help
"""


def parse_flags(words: list[str]) -> Options:
    """Parses `words` (without the program's name). Raises FlagError."""
    options = Options()
    index = 0
    while index < len(words):
        word = words[index]
        index += 1
        if word == "--" and (options.inetd or options.activate):
            options.command = words[index:]
            break
        if word == "--":
            _reject_positional(words[index:])
            break
        if word == PERSISTENT and options.exec_from:
            options.persistent = True
            continue
        if not word.startswith("-") or word == "-":
            _reject_positional([word])
        if word.lstrip("-") in VALUE_MAY_FOLLOW and index < len(words):
            word = f"{word}={words[index]}"
            index += 1
        _set_flag(options, word.lstrip("-"))
    if (options.inetd or options.activate) and not options.command:
        raise FlagError("vshd: ERROR: --inetd and --activate need a command: -- command ...", ILLEGAL_VALUE_STATUS)
    if options.persistent and not options.exec_from:
        raise FlagError("vshd: ERROR: --persistent needs --exec_from", ILLEGAL_VALUE_STATUS)
    return options


def _reject_positional(words: list[str]) -> None:
    if words:
        raise FlagError("Unknown extra command line arguments; exiting", 1)


def _set_flag(options: Options, text: str) -> None:
    name, equals, value = text.partition("=")
    name = name.replace("-", "_")
    if name in IGNORED:
        return
    if name not in Options.__slots__ and name.startswith("no") and name[2:] in Options.__slots__:
        current = getattr(options, name[2:])
        if isinstance(current, bool) and not equals:
            setattr(options, name[2:], False)
            return
    if name not in Options.__slots__:
        raise FlagError(f"vshd: ERROR: unknown command line flag '{name}'", UNKNOWN_FLAG_STATUS)
    if name == "exec_from" and equals and not value:
        # Both parts are the defaults.
        value = ":"
    current = getattr(options, name)
    if isinstance(current, list):
        current.append(value)
    else:
        setattr(options, name, _parse_value(name, value, current, bool(equals)))


def _parse_value(name: str, value: str, current: "bool | int | str", has_value: bool) -> "bool | int | str":
    if isinstance(current, bool):
        if not has_value or value in ("true", "1", "t", "yes", "y"):
            return True
        if value in ("false", "0", "f", "no", "n"):
            return False
        raise FlagError(f"vshd: ERROR: illegal value '{value}' specified for bool flag '{name}'", ILLEGAL_VALUE_STATUS)
    if isinstance(current, int):
        if value.isascii() and value.isdigit() and int(value) <= PORT_MAX:
            return int(value)
        raise FlagError(
            f"vshd: ERROR: illegal value '{value}' specified for uint32 flag '{name}'", ILLEGAL_VALUE_STATUS
        )
    if not has_value:
        raise FlagError(f"vshd: ERROR: flag '{name}' needs a value: --{name}=...", ILLEGAL_VALUE_STATUS)
    return value
