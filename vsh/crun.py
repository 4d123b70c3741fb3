"""Commands in a container that vmkit made in a guest (docs/explanation/decisions.md 102): the request of a session for
a command there becomes one for `crun exec` in the guest.

crun gives the command the namespaces, the capabilities and the seccomp filter of the container, and a terminal of its
own /dev/pts. A script of the guest's shell looks up the user in the container's files and writes crun's description
of the process, so the guest needs a shell, awk and crun, and its vshd nothing new. Variables and words travel in
variables: in arguments each user of the guest could read them.
"""

import os
import re

from vsh.address import Address
from vsh.client import Client
from vsh.errors import UsageError, VshError
from vshd.wire import messages
from vshd.wire.messages import SetupConnectionRequest

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
# What an argument or a variable of execve(2) can have: MAX_ARG_STRLEN of linux/binfmts.h, with its name and NUL.
FRAGMENT_BYTES_MAX = (128 << 10) - 64
NO_CRUN = "use the image containers, or add crun to the packages of your recipe"

# Shell functions that both scripts have: this one, and that of vmkit.containers.script. Their `fail` differs.
FUNCTIONS = r"""
# The kernel lays no overlay upon another: where /var/lib is on one, containers are in the memory of /run.
find_store() {
    store=/var/lib/vmkit/containers
    place=$store
    while [ ! -d "$place/" ]; do place=${place%/*}; done
    case $(stat -f -c %T "$place/") in overlay*) store=/run/vmkit/containers ;; esac
}

is_running() {
    grep -q 'populated 1' "/sys/fs/cgroup/vmkit/$1/cgroup.events" 2> /dev/null
}

# A file of the container's: it may be anything, and a link of it leads into the guest.
read_table() {
    [ ! -L root/etc ] && [ ! -L "root/etc/$1" ] && [ -f "root/etc/$1" ] && head -c 4194304 "root/etc/$1"
}

# USER[:GROUP], each a name or a number, becomes account, uid, gid, groups, home and shell.
find_user() {
    wanted=${1%%:*}
    group=
    case $1 in *:*) group=${1#*:} ;; esac
    wanted=${wanted:-0}
    entry=$(read_table passwd | VMKIT_WANTED=$wanted awk -F: '
        BEGIN { wanted = ENVIRON["VMKIT_WANTED"] "" }
        $1 == "" || $3 !~ /^[0-9]+$/ || $4 !~ /^[0-9]+$/ { next }
        $1 == wanted { named = named ? named : $0 }
        $3 == wanted { numbered = numbered ? numbered : $0 }
        END { print named ? named : numbered }')
    case $entry in
    ?*)
        IFS=: read -r account _ uid gid _ home shell << END
$entry
END
        ;;
    *)
        case $wanted in
        root) uid=0 ;;
        *[!0-9]*) fail "the container '$name' has no user '$wanted'" ;;
        *) uid=$wanted ;;
        esac
        account=$wanted gid=0 home=/ shell=
        ;;
    esac
    groups=
    case $group in
    '')
        groups=$(read_table group | VMKIT_WANTED=$account awk -F: '
            BEGIN { wanted = ENVIRON["VMKIT_WANTED"] "" }
            $3 ~ /^[0-9]+$/ && index("," $4 ",", "," wanted ",") { printf "%s%s", comma, $3; comma = "," }')
        ;;
    *[!0-9]*)
        gid=$(read_table group | VMKIT_WANTED=$group awk -F: '
            ($1 == ENVIRON["VMKIT_WANTED"] "") && $3 ~ /^[0-9]+$/ { print $3; exit }')
        [ "$gid" ] || fail "the container '$name' has no group '$group'"
        ;;
    *) gid=$group ;;
    esac
    groups=$gid${groups:+,$groups}
    # They become parts of a JSON text.
    case $home in /*) ;; *) home=/ ;; esac
    case $shell in /*) ;; *) shell=/bin/sh ;; esac
    case $account$home$shell in
    *[\"\\]* | *[[:cntrl:]]*) fail "the user '$wanted' of the container '$name' has an unfit entry in /etc/passwd" ;;
    esac
}
"""

PROBE = (
    FUNCTIONS
    + """
find_store
[ -d "$store/$1" ]
"""
)
PROBE_TIMEOUT_S = 10.0

# Its words: the container, the user or nothing, `true` with a terminal, and what the machine is called in hints.
# VSH_ARGS, VSH_ENV and VSH_CWD are parts of a JSON text.
SCRIPT = (
    r"""
name=$1 user=$2 terminal=$3 machine=$4
fail() {
    printf '%s\n' "vsh: $1" ${2:+"hint: $2"} >&2
    exit 1
}
"""
    + FUNCTIONS
    + r"""
command -v crun > /dev/null || fail "$machine has no crun" "NO_CRUN"
find_store
cd "$store/$name" 2> /dev/null ||
    fail "$machine has no container '$name'" "vmkit container $machine list prints those that it has"
is_running "$name" || fail "the container '$name' is not running" "vmkit container $machine start $name"
[ "$user" ] || read -r user < user
find_user "$user"
args=$VSH_ARGS
[ "$args" ] || args="\"$shell\",\"-l\""
cwd=$VSH_CWD
[ "$cwd" ] || read -r cwd < cwd
[ "$cwd" ] || { [ -d "root$home" ] && cwd="\"$home\""; } || cwd='"/"'
read -r env < env
read -r rest < rest
umask 077
file=$(mktemp /run/vmkit-process.XXXXXXXX) || fail "the guest has no room for a file in /run"
printf '{"terminal":%s,"user":{"uid":%s,"gid":%s,"additionalGids":[%s]},"args":[%s],"env":[%s%s%s],"cwd":%s,%s}\n' \
    "$terminal" "$uid" "$gid" "$groups" "$args" \
    "\"HOME=$home\",\"USER=$account\",\"LOGNAME=$account\",\"SHELL=$shell\"" \
    "${env:+,$env}" "${VSH_ENV:+,$VSH_ENV}" "$cwd" "$rest" 2> /dev/null > "$file" || {
    rm "$file"
    fail "the guest has no room for a file in /run"
}
exec 9< "$file"
rm "$file"
unset VSH_ARGS VSH_ENV VSH_CWD
# SIGKILL for crun leaves its process. One of a session of its own sees crun's end, and then ends that process.
mkfifo "$file.end"
exec 8<> "$file.end" 7< "$file.end"
rm "$file.end"
# crun waits for all its children, and so this one must be no child of this process.
(setsid sh -c '
    read -r _ <&7
    # The file has no newline, at which read is not content.
    read -r pid < "$1.pid"
    [ "$pid" ] && grep -q "/vmkit/$2" "/proc/$pid/cgroup" && kill -KILL "-$pid" "$pid"
    rm -f "$1.pid" "$1.log"
' sh "$file" "$name" < /dev/null > /dev/null 2>&1 8>&- 9<&- &)
exec 7<&-
# crun hands a signal on to its process. This shell gets it as well, and must outlive crun. Not trapped are SIGKILL (9)
# and those from SIGCHLD (17) to SIGURG (23), which stop a process, let it go on, or do nothing.
number=1
while [ "$number" -lt 65 ]; do
    case $number in 9 | 1[7-9] | 2[0-3]) ;; *) trap : "$number" ;; esac
    number=$((number + 1))
done
crun --log="$file.log" exec --pid-file "$file.pid" --process /proc/self/fd/9 "$name"
status=$?
# crun has one status for all that it cannot do. Its log has the reason, and is empty where the status is the program's.
read -r trouble 2> /dev/null < "$file.log"
rm -f "$file.log"
case $trouble in
executable*"not found"* | exec*"No such file"*) status=127 ;;
"open executable"* | "the path "* | exec*) status=126 ;;
esac
# crun prints it to the terminal that it has made for the command, and reads nothing more from that one.
[ "$terminal" = false ] || [ -z "$trouble" ] || printf '%s\n' "$trouble" >&2
exit "$status"
""".replace("NO_CRUN", f"{NO_CRUN}; for another way set launch, see CONTAINERS in vsh(1)")
)


def check_name(name: str) -> str:
    """Returns the name of a container. Raises UsageError."""
    if not NAME.fullmatch(name):
        raise UsageError(
            f"'{name}' is no name for a container",
            hint="it has letters, digits, '_', '.' and '-', begins with a letter or digit, and has at most 63 of them",
        )
    return name


def has_container(where: Address, name: str) -> bool:
    """Whether the guest has a container of this name that vmkit made. A guest that does not answer has none."""
    if not NAME.fullmatch(name):
        return False
    try:
        done = Client(where).run(["/bin/sh", "-c", PROBE, "vsh", name], user="root", timeout=PROBE_TIMEOUT_S)
    except VshError:
        return False
    return done.exit == 0


def enter_container(request: SetupConnectionRequest, container: str, machine: str) -> None:
    """Makes a request for a command in a guest one for the same command in a container of it. Raises UsageError.

    machine: the guest's name, for hints; empty where it has none.
    """
    name = check_name(container)
    if request.cwd_pid:
        raise UsageError("the directory of a process is the guest's, and not the container's", hint="give a path")
    fragments = {
        b"VSH_ARGS": _render_list(request.argv, "the command"),
        b"VSH_ENV": _render_list([key + b"=" + value for key, value in request.env.items()], "the environment"),
        b"VSH_CWD": _render_list([request.cwd] if request.cwd else [], "the directory"),
    }
    terminal = b"false" if request.nopty else b"true"
    words = [os.fsencode(name), request.user, terminal, os.fsencode(machine or "MACHINE")]
    request.argv = [b"/bin/sh", b"-c", SCRIPT.encode(), b"vsh", *words]
    request.env = fragments
    request.target = messages.VM_SHELL
    request.user = b"root"
    request.cwd = b"/"


def _render_list(words: list[bytes], what: str) -> bytes:
    """Returns the words as the inside of a JSON list. Raises UsageError for what a JSON text cannot hold."""
    import json  # noqa: PLC0415 - few sessions are in containers

    if any(b"\0" in word for word in words):
        raise UsageError(f"{what} holds a NUL byte")
    try:
        text = ",".join(json.dumps(word.decode()) for word in words).encode()
    except UnicodeDecodeError as error:
        raise UsageError(f"crun takes UTF-8 alone, and {what} is not: {error.object!r}") from error
    if len(text) > FRAGMENT_BYTES_MAX:
        raise UsageError(
            f"{what} takes {len(text)} bytes, and {FRAGMENT_BYTES_MAX} is the limit in a container",
            hint="send long arguments through stdin, or a file",
        )
    return text
