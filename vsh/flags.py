"""vsh's command line: upstream's flags in upstream's spellings, and ours beside them, parsed once into Options.

A flag is `--name=value`, `--name value` or `-name=value`. `-` may stand for `_`. Booleans may also be `--name` and
`--noname`. The last one wins. Flags end at `--` or at the first word that is no flag, so that a command keeps its own.
Knows nothing of what options do.
"""

import os

from vsh.errors import VshError

UNKNOWN_FLAG_STATUS = 64
# What upstream's flag library exits with; a user's script may look for it.
ILLEGAL_VALUE_STATUS = 65

UINT32_MAX = (1 << 32) - 1
UINT64_MAX = (1 << 64) - 1

SHORT = {"t": "tty", "T": "notty", "q": "quiet", "v": "verbose", "h": "help", "N": "forward_only", "n": "stdin_null"}
# Letters with a value, in the same word or the next.
SHORT_WITH_VALUE = {"L": "local", "R": "remote", "D": "dynamic", "s": "subsystem"}

# Of sessions that outlive vsh; see KINDS.
LASTING_KINDS = {
    "detach": "optional",
    "output_size": "string",
    "output_file": "string",
    "sessions": "flag",
    "json": "flag",
    "attach": "string",
    "steal": "flag",
    "output": "string",
    "follow": "flag",
    "since": "uint64",
    "input": "string",
    "eof": "flag",
    "signal": "string",
    "wait": "string",
    "forget": "string",
}
# name: kind, which is a type of value, "flag", "optional" (a text, only behind `=`), or, for flags that may be
# repeated, "list" (NAME=VALUE) or "texts".
KINDS = {
    "cid": "uint64",
    "vm_name": "string",
    "uds": "string",
    "unix": "string",
    "fd": "uint32",
    "port": "uint32",
    "token_file": "string",
    "owner_id": "string",
    "user": "string",
    "cwd": "string",
    "env": "list",
    "timeout": "double",
    "connect_timeout": "double",
    "keepalive": "double",
    "local": "texts",
    "remote": "texts",
    "dynamic": "texts",
    "forward_only": "flag",
    "proxy": "string",
    "fdpass": "flag",
    "subsystem": "string",
    **LASTING_KINDS,
    "target_container": "string",
    "listen_port": "uint32",
    "container_features": "string",
    "record": "string",
    "record_format": "string",
    "record_input": "flag",
    "multi": "string",
    "stdin_null": "flag",
    "tty": "flag",
    "notty": "flag",
    "quiet": "flag",
    "verbose": "flag",
    "debug": "flag",
    "extended": "flag",
    "completion": "string",
    "list_hosts": "flag",
    "launcher": "flag",
    "help": "flag",
    "version": "flag",
    # Logging flags every libbrillo program accepts.
    "vmodule": "string",
}

HELP = """\
usage: vsh [flags] [--] [NAME=VALUE ...] [command [argument ...]]

Runs a command, or a login shell, in a virtual machine, over vsock. Values in parentheses are defaults.

where (without any of these: the only running machine):
  --vm_name=NAME        the machine of this name
  --cid=N               the machine of this CID, or any VM with a vshd; 3 to 4294967294
  --uds=PATH            a VM whose vsock is a UNIX socket that takes CONNECT PORT as the first line
  --unix=PATH           a vshd that listens on a UNIX socket
  --fd=N                a connection that is already open, as descriptor N
  --token_file=FILE     a file with the machine's secret token; vsh finds the token of vmkit's machines by itself
  --port=N              the port of vshd (9001)

what:
  --user=NAME[:GROUP]   run as this user, by name or number (vshd's default user)
  --cwd=DIR             start in this directory; a number N: in the directory of process N of the guest
  --env=NAME=VALUE      set a variable; may be repeated
  -t, --tty             run with a terminal (if stdin and stdout are terminals)
  -T, --notty           run without a terminal: separate outputs, unchanged bytes
  -n, --stdin_null      give the command an empty stdin, and read nothing from vsh's own
  --multi=NAME,NAME...  run the command in several machines at once: names or CIDs of running machines

sessions that last (SESSIONS THAT LAST in vsh(1); ID is the id or the name of such a session):
  --detach[=NAME]       start the command as such a session, print its id, and do not wait; -t gives it a terminal
  --output_size=SIZE    with --detach: keep so much of its output, such as 4M (at most 16M, or 1/32 of the memory)
  --output_file=PATH    with --detach: keep the output in this new file of the guest (its last 256M)
  --sessions            list the sessions; with --json for programs
  --attach=ID           connect to the session: its output, and stdin
  --output=ID [--follow]
                        print the kept output; --follow: and what comes, until the session ends
  --since=OFFSET        with --output and --attach: begin at this byte of the output
  --input=ID            give stdin to the session
  --steal, --eof        with --attach and --input: take the place of the client that writes;
                        at the end of stdin, close the stdin of the session, too
  --signal=ID SIGNAL    send a signal, such as TERM or 9, to the processes of the session
  --wait=ID             wait until the session ends, with its exit status
  --forget=ID           forget an ended session, its status and its output

files (SUBSYSTEMS in vsh(1) has examples):
  -s, --subsystem=NAME  connect stdin and stdout to a subsystem of vshd: sftp, for programs that speak SFTP

forwarding (FORWARDING in vsh(1) has all forms):
  -L [ADDR:]PORT:PORT   connect a TCP port of this host to a vsock port of the guest
  -L [ADDR:]PORT:HOST:PORT
                        connect a TCP port of this host to a TCP port that the guest can reach
  -L [ADDR:]PORT:/PATH  connect a TCP port of this host to a UNIX socket of the guest
  -R [ADDR:]PORT:[HOST:]PORT
                        connect a TCP port of the guest to a TCP port that this host can reach
  -D [ADDR:]PORT        serve SOCKS 5 at a TCP port of this host: each client names a host and port of the guest
  --local, --remote, --dynamic
                        the long names of -L, -R and -D
  -N, --forward_only    run no command, only forward
  --proxy=PLACE         connect stdin and stdout to a place of the guest: PORT (vsock), HOST:PORT or /PATH
  --fdpass              with --proxy: pass the connection itself over stdout, for ssh's ProxyUseFdpass

how:
  --timeout=SECONDS     end the command after this time, with status 124 (0: no limit)
  --connect_timeout=SECONDS
                        give up if connecting and starting take longer (30); 0: no limit
  --keepalive=SECONDS   give up a guest that sends nothing for this time (120); 0: never
  --record=FILE         record the session into this new file: an asciicast for a terminal, else a log of the streams
  --record_format=NAME  asciicast-v3, asciicast-v2 or log (asciicast-v3 for a terminal, else log)
  --record_input        record stdin, too, with what is typed unseen, such as passwords
  --noextended          use only ChromeOS's protocol
  -q, --quiet           print nothing about a lost connection
  -v, --verbose         print the connection and its mode
  --debug               print every frame, too

containers of the guest (CONTAINERS in vsh(1)):
  --target_container=NAME
                        run in this container: one of `vmkit container`, or of the launcher in your configuration
  --listen_port=PORT    the port where the launcher's vshd connects to vsh (any free port)
  --owner_id=ID, --container_features=LIST, --vmodule=LIST
                        accepted and ignored, for scripts written for ChromeOS

instead of a command:
  --completion=SHELL    print a completion script for bash, zsh or fish
  --list_hosts          print the names of the running machines and the host aliases, for completion scripts
  --launcher            print a launcher script that starts faster than pip's
  --version             print the version
  -h, --help            print this help

In a terminal, at the beginning of a line: ~. disconnects, ~^Z suspends, ~? lists all escapes.
Exit status: the command's own; 128+N: signal N killed it; 126: it cannot be executed; 127: there is no such command;
123: the connection was lost; 124: the time limit was over; 64, 65: a wrong flag, a wrong value; 1: any other error.
"""


class LastingOptions:
    """The options of LASTING_KINDS."""

    def __init__(self) -> None:
        self.detach = ""
        self.output_size = ""
        self.output_file = ""
        self.sessions = False
        self.json = False
        self.attach = ""
        self.steal = False
        self.output = ""
        self.follow = False
        self.since: int | None = None
        self.input = ""
        self.eof = False
        self.signal = ""
        self.wait = ""
        self.forget = ""


class Options(LastingOptions):
    """The options of one run. Attributes have the flags' names; `command` holds the words behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.cid: int | None = None
        self.vm_name = ""
        self.uds = ""
        self.unix = ""
        self.fd: int | None = None
        self.port = 9001
        self.token_file = ""
        self.owner_id = ""
        self.user = ""
        self.cwd = ""
        self.env: list[str] = []
        self.timeout = 0.0
        self.connect_timeout = 30.0
        self.keepalive = 120.0
        self.local: list[str] = []
        self.remote: list[str] = []
        self.dynamic: list[str] = []
        self.forward_only = False
        self.proxy = ""
        self.fdpass = False
        self.subsystem = ""
        self.target_container = ""
        self.listen_port: int | None = None
        self.container_features = ""
        self.record = ""
        self.record_format = ""
        self.record_input = False
        self.multi = ""
        self.stdin_null = False
        self.tty = False
        self.notty = False
        self.quiet = False
        self.verbose = False
        self.debug = False
        self.extended = True
        self.completion = ""
        self.list_hosts = False
        self.launcher = False
        self.help = False
        self.version = False
        self.vmodule = ""
        self.command: list[str] = []
        # The configuration's name for the address, if it was taken from there.
        self.alias = ""
        # The configuration's command that starts a vshd in a container.
        self.launch: list[str] = []
        # That vshd is ChromeOS's, which cannot prove who it is.
        self.is_legacy_container = False
        # The container is one that vmkit made in the guest: vsh.crun.
        self.is_crun = False
        # Which flags were given, for code that adds defaults.
        self.given: set[str] = set()


def parse_flags(words: list[str]) -> Options:
    """Parses `words` (without the program's name). Raises VshError with upstream's texts and statuses."""
    options = Options()
    index = 0
    while index < len(words):
        word = words[index]
        index += 1
        if word == "--":
            break
        if not word.startswith("-") or word == "-":
            index -= 1
            break
        if len(word) > 2 and word[1] != "-" and set(word[1:]) <= set(SHORT):
            for letter in word[1:]:
                set_flag(options, SHORT[letter], None)
            continue
        name, value = _split_flag(word)
        if value is None and KINDS.get(name, "flag") not in ("flag", "optional") and index < len(words):
            value = words[index]
            index += 1
        set_flag(options, name, value)
    options.command = words[index:]
    return options


def _split_flag(word: str) -> tuple[str, str | None]:
    name, equals, value = word.lstrip("-").partition("=")
    name = name.replace("-", "_")
    if word[1] in SHORT_WITH_VALUE and name not in KINDS:
        return SHORT_WITH_VALUE[word[1]], word[2:].removeprefix("=") or None
    if len(name) == 1:
        name = SHORT.get(name, name)
    return name, value if equals else None


def set_flag(options: Options, name: str, value: str | None) -> None:
    """Sets one flag from its text; None: a flag without a value. Raises VshError."""
    kind = KINDS.get(name)
    if kind is None and name.startswith("no") and KINDS.get(name[2:]) == "flag" and value is None:
        setattr(options, name[2:], False)
        options.given.add(name[2:])
        return
    if kind is None:
        raise VshError(
            f"ERROR: unknown command line flag '{name}'",
            hint="see vsh --help; put -- before a command that has flags of its own",
            status=UNKNOWN_FLAG_STATUS,
        )
    options.given.add(name)
    if kind == "texts":
        if not value:
            raise _illegal(value or "", "string", name)
        getattr(options, name).append(value)
        return
    if kind == "list":
        if value is None or value.find("=") < 1:
            raise _illegal(value or "", kind, name)
        getattr(options, name).append(value)
        return
    setattr(options, name, _parse_value(name, kind, value))


def _parse_value(name: str, kind: str, value: str | None) -> "str | int | float | bool":
    if kind == "flag":
        if value is None or value in ("true", "1", "t", "yes", "y"):
            return True
        if value in ("false", "0", "f", "no", "n"):
            return False
        # --v=N is a level elsewhere; here any number above 0 prints more.
        if name == "verbose" and value.isdigit():
            return True
        raise _illegal(value, "bool", name)
    if kind == "optional":
        return value or ""
    if value is None:
        raise _illegal("", kind, name)
    if kind == "string":
        return value
    if kind == "double":
        return _parse_seconds(name, value)
    limit = UINT64_MAX if kind == "uint64" else UINT32_MAX
    if value.isascii() and value.isdigit() and int(value) <= limit:
        return int(value)
    raise _illegal(value, kind, name)


def _parse_seconds(name: str, value: str) -> float:
    try:
        seconds = float(value)
    except ValueError as error:
        raise _illegal(value, "double", name) from error
    # NaN compares false with everything.
    if not 0 <= seconds < 1e9:
        raise _illegal(value, "double", name)
    return seconds


def _illegal(value: str, kind: str, name: str) -> VshError:
    return VshError(f"ERROR: illegal value '{value}' specified for {kind} flag '{name}'", status=ILLEGAL_VALUE_STATUS)


def find_config_path() -> str:
    """Returns the path of the file with the defaults for flags (vsh.config), even when it does not exist."""
    chosen = os.environ.get("VSH_CONFIG")
    if chosen:
        return chosen
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return os.path.join(base, "vsh", "config.toml")


def split_command(words: list[str]) -> tuple[dict[bytes, bytes], list[bytes]]:
    """Splits words into leading NAME=VALUE variables and the command, both as the bytes that were typed.

    As in env(1), a word is an assignment when its first `=` has a name before it. The value may be empty, or hold
    more `=`.
    """
    environment: dict[bytes, bytes] = {}
    for index, word in enumerate(words):
        name, equals, value = word.partition("=")
        if not name or not equals:
            return environment, [os.fsencode(rest) for rest in words[index:]]
        environment[os.fsencode(name)] = os.fsencode(value)
    return environment, []
