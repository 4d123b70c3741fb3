"""Completion in bash, whose words end at colons: `tiny:/etc` is three words there. Registers itself with click.

Its script also keeps the machines where files of this host fit as well, and puts no blank behind `tiny:` and `/`.
"""

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from click.shell_completion import BashComplete, add_completion_class, split_arg_string

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

SCRIPT = """\
%(complete_func)s() {
    local IFS=$'\\n' response completion type value
    response=$(env COMP_WORDS="${COMP_WORDS[*]}" COMP_CWORD=$COMP_CWORD %(complete_var)s=bash_complete $1)
    for completion in $response; do
        IFS=',' read -r type value <<< "$completion"
        if [[ $type == 'dir' ]]; then
            COMPREPLY=()
            compopt -o dirnames
        elif [[ $type == 'file' && ${#COMPREPLY[@]} -gt 0 ]]; then
            mapfile -t -O ${#COMPREPLY[@]} COMPREPLY < <(compgen -f -- "${COMP_WORDS[COMP_CWORD]}")
        elif [[ $type == 'file' ]]; then
            compopt -o default
        elif [[ $type == 'plain' ]]; then
            COMPREPLY+=("$value")
            [[ $value == *[:/] ]] && compopt -o nospace
        fi
    done
    return 0
}

%(complete_func)s_setup() {
    complete -o nosort -F %(complete_func)s %(prog_name)s
}

%(complete_func)s_setup;
"""
COLON = ":"


def join_words(words: Sequence[str], current: int, is_machine: Callable[[str], bool]) -> tuple[list[str], str, str]:
    """Returns the words before the current one, the current one, and what bash has of it already.

    words: as bash splits them. A colon belongs to the word before it when that is a machine: bash tells no blanks.
    """
    joined: list[str] = []
    known = ""
    for number, word in enumerate(words[: current + 1]):
        is_current = number == current
        if word == COLON and joined and is_machine(joined[-1]):
            joined[-1] += COLON
        elif joined and joined[-1].endswith(COLON) and words[number - 1] == COLON:
            joined[-1] += word
        else:
            joined.append(word)
            continue
        if is_current:
            known = joined[-1].partition(COLON)[0] + COLON
    if current >= len(words):
        joined.append("")
    return joined[:-1], joined[-1], known


@add_completion_class
class BashWords(BashComplete):
    """Joins the words, and answers with the part that bash completes."""

    source_template: ClassVar[str] = SCRIPT
    _known = ""

    def get_completion_args(self) -> tuple[list[str], str]:
        from vsh.registry import read_machines  # noqa: PLC0415  (only a shell asks)

        machines = {word for machine in read_machines() for word in (machine.name, str(machine.cid))}
        words = split_arg_string(os.environ["COMP_WORDS"])
        args, incomplete, self._known = join_words(words, int(os.environ["COMP_CWORD"]), machines.__contains__)
        return args[1:], incomplete

    def format_completion(self, item: "CompletionItem[Any]") -> str:
        return f"{item.type},{item.value.removeprefix(self._known)}"
