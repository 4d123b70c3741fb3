"""The guest's half: a script for its shell that keeps containers in a folder of the guest and has crun run them.

Each container is a folder with the root as an ext4 (`image`), what was written on top of it (`upper`), and the
documents of vmkit.containers.plan. What is not finished has a name that begins with a dot and ends with the process
that makes it, so that the next call takes away what a lost one left.
"""

from vsh.crun import FUNCTIONS, NO_CRUN

# The status of a failure that the script explains: a line, and maybe a line with what to do.
EXPLAINED = 3
# What `list` prints for a container whose first process runs, and for another.
RUNNING, STOPPED = "running", "stopped"

SCRIPT = (
    r"""
set -u
umask 077
fail() {
    printf '%s\n' "$1" ${2:+"$2"} >&2
    exit EXPLAINED
}
"""
    + FUNCTIONS
    + r"""
# Takes away what calls left whose processes are gone.
sweep() {
    for left in "$store"/.new.* "$store"/.images/.new.*; do
        [ ! -e "$left" ] || [ -d "/proc/${left##*.}" ] || rm -rf "$left"
    done
}

enter() {
    name=$1
    cd "$store/$name" 2> /dev/null && [ -f config.in ] || fail "there is no container '$name'" \
        "vmkit container $CONTAINER_MACHINE list prints those that there are"
    # For the locks: a start excludes all other calls for its container.
    exec 6< config.in
}

mount_root() {
    ! mountpoint -q root || return 0
    # With another kernel these may be built in.
    modprobe -a loop overlay 2> /dev/null
    # A start that was killed may have come so far.
    mountpoint -q lower || trouble=$(mount -t ext4 -o ro,loop,nodev image lower 2>&1) ||
        fail "the guest cannot mount the container's root: $trouble"
    layers=lowerdir=$PWD/lower,upperdir=$PWD/upper,workdir=$PWD/work
    trouble=$(mount -t overlay -o "nodev,$layers" overlay root 2>&1) ||
        fail "the guest cannot mount the container's overlay: $trouble"
}

unmount_root() {
    for place in root lower; do
        ! mountpoint -q "$place" || umount "$place" 2> /dev/null || umount -l "$place"
    done
}

forget_run() {
    [ ! -d "/run/crun/$name" ] || crun delete --force "$name" > /dev/null 2>&1
}

# Waits up to so many tenths of a second for the end of the first process.
await_end() {
    tenths=$1
    while is_running "$name"; do
        [ "$tenths" -gt 0 ] || return 1
        tenths=$((tenths - 1))
        sleep 0.1
    done
}

stop() {
    if is_running "$name"; then
        crun kill "$name" TERM 2> /dev/null
        await_end "$1" || {
            crun kill "$name" KILL 2> /dev/null
            await_end 100 || fail "the container '$name' does not end"
        }
    fi
    forget_run
    unmount_root
}

command -v crun > /dev/null || fail "there is no crun in this guest" "NO_CRUN"
# Guests with systemd have it.
[ -e /sys/fs/cgroup/cgroup.controllers ] || mount -t cgroup2 cgroup2 /sys/fs/cgroup ||
    fail "this guest's kernel has no control groups (cgroup2)"
find_store
mkdir -p "$store/.images"
sweep
verb=$1
shift
case $verb in
look)
    [ ! -e "$store/$1" ] ||
        fail "there is a container '$1' already" "vmkit container $CONTAINER_MACHINE rm $1 removes it"
    uname -m
    ls "$store/.images"
    ;;
create)
    name=$1 key=$2 size=$3
    made=$store/.images/.new.$$
    new=$store/.new.$$
    # A process of the same number may have left some.
    rm -rf "$made" "$new"
    # A root that no container has goes as well.
    trap 'rm -rf "$made" "$new"; find "$store/.images" -name "$key" -links 1 -exec rm -f {} +' EXIT
    trap 'exit 1' HUP INT TERM
    if [ "$size" -gt 0 ]; then
        cat > "$made" 2> /dev/null || {
            free=$(df -Pk "$store" | awk 'NR == 2 { print int($2 / 1024) }')
            fail "the guest has no room for the container's root of $((size >> 20)) MiB: $store is on $free MiB" \
                "start the machine with more memory: vmkit up --memory 2G"
        }
        [ "$(stat -c %s "$made")" -eq "$size" ] || fail "the container's root did not arrive whole"
        # Else a guest on a disk that is killed now could find an empty file under this name, for all its containers.
        sync "$made"
        # Another call may have sent it meanwhile, and containers have that one.
        mv -n "$made" "$store/.images/$key" 2> /dev/null
    fi
    [ -f "$store/.images/$key" ] || fail "the container's root has vanished" "try again"
    {
        # All users enter the topmost folder, as that of the root.
        mkdir "$new" "$new/lower" "$new/upper" "$new/work" "$new/root" && chmod 755 "$new/upper" &&
            ln "$store/.images/$key" "$new/image" &&
            printf '%s\n' "$CONTAINER_CONFIG" > "$new/config.in" &&
            printf '%s\n' "$CONTAINER_PROCESS" > "$new/rest" &&
            printf '%s\n' "$CONTAINER_VARIABLES" > "$new/env" &&
            printf '%s\n' "$CONTAINER_CWD" > "$new/cwd" &&
            printf '%s\n' "$CONTAINER_USER" > "$new/user" &&
            printf '%s\n' "$CONTAINER_ABOUT" > "$new/about"
    } 2> /dev/null || fail "the guest has no room for the container"
    mv -T "$new" "$store/$name" 2> /dev/null || fail "there is a container '$name' already"
    ;;
start)
    enter "$1"
    flock -n 6 && [ -f config.in ] || fail "another call starts, stops or removes the container '$name'" "try again"
    ! is_running "$name" || fail "the container '$name' is running already"
    trap 'forget_run; unmount_root' EXIT
    trap 'exit 1' HUP INT TERM
    forget_run
    mount_root
    read -r user < user
    find_user "$user"
    sed "s/\"USER_MARK\"/{\"uid\":$uid,\"gid\":$gid,\"additionalGids\":[$groups]}/" config.in > config.json
    rm -f out trouble
    if command -v logger > /dev/null; then
        # The container's output is lines of the guest's log, which is bounded.
        mkfifo out
        setsid logger -t "container $name" < out > /dev/null 2>&1 6<&- &
    else
        ln -s /dev/null out
    fi
    crun --log="$PWD/trouble" run --detach --bundle "$PWD" --pid-file "$PWD/pid" "$name" \
        < /dev/null > out 2>&1 6<&- ||
        fail "crun could not start the container '$name': $(tail -n 3 trouble 2> /dev/null)"
    trap - EXIT
    ;;
stop)
    enter "$1"
    flock -s 6
    stop "$(($2 * 10))"
    ;;
remove)
    enter "$1"
    flock -s 6
    if is_running "$name"; then
        [ "$2" ] || fail "the container '$name' is running" "stop it first, or remove it with --force"
    fi
    stop 0
    gone=$store/.new.$$
    mv "$store/$name" "$gone" 2> /dev/null || fail "the guest cannot remove the container '$name'"
    cd /
    rm -rf "$gone"
    # Roots that no container has any more.
    find "$store/.images" -type f ! -name '.*' -links 1 -exec rm -f {} +
    ;;
list)
    for folder in "$store"/[A-Za-z0-9]*; do
        [ -f "$folder/config.in" ] || continue
        state=STOPPED pid=0
        ! is_running "${folder##*/}" || { state=RUNNING && read -r pid < "$folder/pid"; }
        # It may be removed just now.
        read -r about 2> /dev/null < "$folder/about" || continue
        printf '%s\t%s\t%s\t%s\n' "${folder##*/}" "$state" "$pid" "$about"
    done
    ;;
esac
"""
)


def render_script(user_mark: str) -> str:
    """Returns the script's text."""
    words = {
        "EXPLAINED": str(EXPLAINED),
        "NO_CRUN": NO_CRUN,
        "USER_MARK": user_mark,
        "STOPPED": STOPPED,
        "RUNNING": RUNNING,
    }
    text = SCRIPT
    for word, value in words.items():
        text = text.replace(word, value)
    return text
