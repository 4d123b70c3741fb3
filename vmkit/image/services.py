"""The services that a recipe can ask for beside vshd: a table.

A row is a folder of ours for the guest's own Python, the Debian packages it needs, and the function that runs it. To
add a service: a room of vmkit's that imports nothing of the rest of vmkit, and a row. Knows no image.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GuestService:
    """One row. folder: of vmkit's. of_host: its parts that are not for guests. packages: of Debian. entry: the module
    whose main() runs it.
    """

    name: str
    folder: str
    of_host: tuple[str, ...]
    packages: tuple[str, ...]
    entry: str

    @property
    def program(self) -> str:
        """Its command in the guest, without the leading slash."""
        return f"usr/sbin/{self.name}"

    def render_program(self, python: str, packages: str) -> str:
        """The text of its command. python: the interpreter's path. packages: where Debian's packages of Python are."""
        return (
            f"#!/{python} -ISB\nimport sys\n"
            # Debian's packages are for a site, which costs more than all that the waiting process needs.
            f'sys.path.append("/{packages}")\n'
            f"from {self.entry} import main\nsys.exit(main())\n"
        )


SERVICES = {
    service.name: service
    for service in (
        GuestService(
            name="maitred",
            folder="maitred",
            of_host=("client.py", "forms.py", "proto/"),
            packages=("python3-grpclib",),
            entry="vmkit.maitred.guest.waiting",
        ),
    )
}
