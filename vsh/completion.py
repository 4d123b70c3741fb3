"""Scripts that let a shell complete vsh's flags and the names of machines and hosts.

They ask vsh itself (--list_hosts), and so offer the machines that run now.
"""

from vsh.flags import KINDS

_BASH = """\
# vsh completion for bash: eval "$(vsh --completion=bash)"
_vsh() {
    local word="${COMP_WORDS[COMP_CWORD]}" previous="${COMP_WORDS[COMP_CWORD-1]}"
    [ "$previous" = "=" ] && previous="${COMP_WORDS[COMP_CWORD-2]}"
    [ "$word" = "=" ] && { previous="${COMP_WORDS[COMP_CWORD-1]}"; word=""; }
    case "$previous" in
        --vm_name|--multi) COMPREPLY=($(compgen -W "$(vsh --list_hosts 2>/dev/null)" -- "$word")) ;;
        --attach|--output|--input|--signal|--wait|--forget)
            COMPREPLY=($(compgen -W "$(_vsh_sessions 2>/dev/null)" -- "$word")) ;;
        --uds|--unix) compopt -o filenames; COMPREPLY=($(compgen -f -- "$word")) ;;
        *) case "$word" in
               -*) COMPREPLY=($(compgen -W "FLAGS" -- "$word")) ;;
               *) compopt -o bashdefault -o default; COMPREPLY=() ;;
           esac ;;
    esac
}
# The ids and names of the sessions that last, in the machine that the line names.
_vsh_sessions() {
    local where=() index flag
    for ((index = 1; index < COMP_CWORD; index++)); do
        flag="${COMP_WORDS[index]}"
        case "$flag" in
            --vm_name|--cid|--uds|--unix|--port|--token_file|--user)
                [ "${COMP_WORDS[index+1]}" = "=" ] && ((index++))
                where+=("$flag" "${COMP_WORDS[index+1]}") ;;
        esac
    done
    vsh "${where[@]}" --connect_timeout=2 --sessions | awk 'NR > 1 { print $1; if ($2 != "-") print $2 }'
}
complete -F _vsh vsh
"""

_ZSH = """\
# vsh completion for zsh: eval "$(vsh --completion=zsh)"
autoload -Uz bashcompinit && bashcompinit
"""

_FISH = """\
# vsh completion for fish: vsh --completion=fish | source
complete -c vsh -l vm_name -x -a "(vsh --list_hosts 2>/dev/null)" -d "machine or host alias"
"""


def render_completion(shell: str) -> str | None:
    """Returns the script for a shell; None for an unknown shell."""
    flags = [f"--{name}" for name in KINDS if name not in ("list_hosts", "vmodule")]
    bash = _BASH.replace("FLAGS", " ".join(flags))
    if shell == "bash":
        return bash
    if shell == "zsh":
        return _ZSH + bash
    if shell == "fish":
        return _FISH + "".join(f"complete -c vsh -l {flag[2:]}\n" for flag in flags if flag != "--vm_name")
    return None
