"""The verbs `vmkit matrix emit slurm` and `vmkit matrix emit kubernetes`."""

from pathlib import Path

import click

from vmkit.cli.values import COUNT, Number
from vmkit.errors import ConfigError
from vmkit.matrix.emit.batch import DEFAULT_RETRIES, plan_batch
from vmkit.matrix.emit.kubernetes import ClusterChoice, render_kubernetes
from vmkit.matrix.emit.slurm import render_slurm
from vmkit.matrix.plan import Matrix, read_matrix

DEFAULT_PARALLEL = 10
DEFAULT_CLAIM = "vmkit-results"
FILE = click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
SHARDS = click.option("--shards", type=COUNT, help="Make as many tasks, each with several cells [default: one a cell].")
RETRIES = click.option(
    "--retries",
    type=Number("count", 0),
    default=DEFAULT_RETRIES,
    show_default=True,
    help="Run a task again so often if its machine or node failed.",
)


@click.command("slurm")
@FILE
@click.option(
    "--to", type=click.Path(path_type=Path), metavar="DIR", required=True, help="Write all results below here."
)
@SHARDS
@RETRIES
def slurm(*, file: Path, to: Path, shards: int | None, retries: int) -> None:
    """Print a script that runs the cells as a Slurm array.

    FILE is the matrix. All nodes must see FILE and the --to directory. What follows the script's name goes to sbatch.
    """
    planned = read_matrix(file)
    # A task may start in another folder, and FILE's recipes are beside it.
    batch = plan_batch(planned, str(file.absolute()), str(to.absolute()), shards=shards, retries=retries)
    print(render_slurm(batch), end="")


@click.command("kubernetes")
@FILE
@click.option("--container-image", metavar="REF", required=True, help="The container image, which has vmkit in it.")
@click.option("--claim", metavar="NAME", default=DEFAULT_CLAIM, show_default=True, help="The volume claim for results.")
@click.option("--parallel", type=COUNT, default=DEFAULT_PARALLEL, show_default=True, help="Run as many pods at once.")
@click.option("--kvm-resource", metavar="NAME", help="The resource of a device plugin that gives /dev/kvm.")
@click.option("--file-in-image", metavar="MATRIX", help="The matrix is in the container image, and in no ConfigMap.")
@SHARDS
@RETRIES
def kubernetes(
    *,
    file: Path,
    container_image: str,
    claim: str,
    parallel: int,
    kvm_resource: str | None,
    file_in_image: str | None,
    shards: int | None,
    retries: int,
) -> None:
    """Print manifests that run the cells as an Indexed Job.

    FILE is the matrix. The results go to a PersistentVolumeClaim, and a second Job merges them.
    """
    planned = read_matrix(file)
    text = None
    if file_in_image is None:
        _check_alone(planned)
        text = file.read_text("utf-8-sig")
    batch = plan_batch(planned, file_in_image or file.name, "/results", shards=shards, retries=retries)
    print(render_kubernetes(batch, ClusterChoice(container_image, claim, parallel, kvm_resource, text)), end="")


def _check_alone(planned: Matrix) -> None:
    """Raises ConfigError for a matrix that names other files: its ConfigMap would lack them."""
    for cell in planned.cells:
        # A recipe beside the matrix has no slash in its path.
        is_shipped = "/" not in cell.image and not cell.image.endswith(".toml")
        named = cell.kernel or (None if is_shipped else cell.image)
        if named is not None:
            raise ConfigError(
                f"the matrix names {named}, and a ConfigMap has the matrix alone",
                hint="put both into the container image, and name the matrix there with --file-in-image",
            )
