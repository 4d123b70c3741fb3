"""The verbs ssh and ssh-config: a machine's sshd over vsock."""

import click

from vmkit.cli.values import VSOCK_PORT
from vmkit.errors import MachineError
from vmkit.machine.running import pick_entry
from vmkit.ssh.access import DEFAULT_PORT, become_ssh, prepare_access
from vmkit.ssh.keys import find_folder, remove_keys

user_option = click.option("--user", default="root", show_default=True, metavar="USER", help="User to log in as.")
port_option = click.option(
    "--port", default=DEFAULT_PORT, show_default=True, type=VSOCK_PORT, help="vsock port of sshd."
)


@click.command("ssh", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@user_option
@port_option
@click.option("--forget-keys", is_flag=True, help="Remove the keys of that machine's name, and start no ssh.")
@click.argument("name", required=False)
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
def ssh(*, user: str, port: int, forget_keys: bool, name: str | None, words: tuple[str, ...]) -> None:
    """Log in to a machine with ssh over vsock.

    NAME is a machine's name or CID. With one machine running, you can leave it out.
    vmkit passes WORDS to ssh: a command, for example. The guest needs sshd on vsock, as the image `bench` has.
    The keys belong to the machine's name: the next machine of that name uses them again.
    """
    if forget_keys:
        if words:
            raise click.UsageError("--forget-keys takes a machine's name alone")
        _forget(pick_entry(None).name if name is None else name)
    else:
        become_ssh(prepare_access(pick_entry(name), user=user, port=port), words)


def _forget(name: str) -> None:
    if not remove_keys(find_folder(name)):
        raise MachineError(f"there are no ssh keys of '{name}'")
    print(f"the ssh keys of {name} are removed")


@click.command("ssh-config")
@user_option
@port_option
@click.argument("name", required=False)
def ssh_config(*, user: str, port: int, name: str | None) -> None:
    """Print a machine's block for ~/.ssh/config.

    NAME is a machine's name or CID. With one machine running, you can leave it out.
    With the block, ssh, scp, sftp, rsync and editors reach the machine by its name. The block stays valid for every
    later machine of that name.
    """
    access = prepare_access(pick_entry(name), user=user, port=port)
    print(access.config.read_text(), end="")
