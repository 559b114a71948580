"""Peak memory of a process, as Linux counts it."""

__all__ = ["peak_resident_gib"]

from pathlib import Path


def peak_resident_gib(pid: int | str = "self") -> float:
    """Largest resident memory of a process so far, GiB; 0 once it has ended.

    ``ru_maxrss`` would not do: it is that of the parent, if that was larger.
    """
    try:
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return int(lines["VmHWM"].split()[0]) / 2**20 if "VmHWM" in lines else 0.0
