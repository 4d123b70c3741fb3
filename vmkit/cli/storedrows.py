"""How stored machines are printed, for `vmkit list --all` and `vmkit create`."""

from vmkit.stored.store import Stored

MIB, GIB = 1 << 20, 1 << 30
SCHEMA = 1


def render_stored(stored: Stored) -> dict[str, object]:
    """Returns a stored machine for JSON."""
    record = stored.record
    return {
        "schema": SCHEMA,
        "name": stored.name,
        "state": find_state(stored),
        "source": None if record is None else record.source,
        "created": None if record is None else record.made,
        "options": {} if record is None else dict(record.options),
        "disk_bytes": None if record is None else record.disk_bytes,
        "used_bytes": stored.measure(),
        "error": stored.trouble or None,
        "directory": str(stored.folder),
    }


def find_state(stored: Stored) -> str:
    """Returns a stored machine's state. One that runs is in the list of the running machines, as a rule."""
    return "damaged" if stored.record is None else "running" if stored.is_held else "stopped"


def render_size(size_bytes: int) -> str:
    """Returns a size for a person."""
    return f"{size_bytes // GIB} GiB" if size_bytes and size_bytes % GIB == 0 else f"{size_bytes // MIB} MiB"
