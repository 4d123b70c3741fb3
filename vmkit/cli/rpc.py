"""The verb `rpc`."""

import json

import click

from vmkit.cli.show import print_json
from vmkit.cli.values import SECONDS, complete_machines
from vmkit.errors import ConfigError
from vmkit.machine.running import pick_entry
from vsh.address import address_of

SERVICES = ("maitred",)
# As ChromeOS has it.
TIMEOUT_S = 20.0


@click.command("rpc")
@click.argument("name", shell_complete=complete_machines)
@click.argument("service", type=click.Choice(SERVICES), metavar="maitred")
@click.argument("method")
@click.argument("request", default="{}", metavar="[JSON]")
@click.option(
    "--timeout", type=SECONDS, default=TIMEOUT_S, show_default=True, help="Seconds that the guest may take to answer."
)
def rpc(*, name: str, service: str, method: str, request: str, timeout: float) -> None:
    """Call a method of ChromeOS's agent in a guest, by gRPC.

    NAME is a machine's name or CID. The machine's image must have the service: `services = ["maitred"]`
    in its recipe. JSON is the request, an object; without one it is empty. vmkit prints the answer as JSON.

    The methods are GetAvailableSpace, GetKernelVersion, LaunchProcess, Mount, Mount9P, PrepareToSuspend,
    SetTime, SetTimezone, SetUpUser and Shutdown.
    """
    # Their modules are loaded for this verb alone.
    from vmkit.maitred.client import Maitred  # noqa: PLC0415
    from vmkit.maitred.forms import parse_form, render_form  # noqa: PLC0415
    from vmkit.maitred.messages import METHODS  # noqa: PLC0415

    if method not in METHODS:
        raise ConfigError(f"{service} has no method '{method}'", hint=f"the methods are: {', '.join(sorted(METHODS))}")
    try:
        value = json.loads(request)
    except ValueError as error:
        raise ConfigError(f"the request is not JSON: {error}", hint='such as \'{"argv": ["ls", "-l"]}\'') from error
    message = parse_form(METHODS[method].request, value)
    with Maitred(address_of(pick_entry(name)), timeout_s=timeout) as client:
        print_json(render_form(client.call(method, message)))
