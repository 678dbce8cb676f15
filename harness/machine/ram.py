"""How much memory there is, on the device and in this process's control group, and whether it suffices."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from harness.errors import UserError


@dataclass(frozen=True, kw_only=True)
class MemoryPart:
    """Something that must lie in memory."""

    name: str
    num_bytes: int
    way_out: str
    """Which setting makes it smaller."""
    on_device: bool = False
    """On the accelerator where there is one, else in RAM."""


def check_images(num_images: int, image_size: int) -> None:
    """Refuse images that do not fit into RAM, as uint8: one channel of each, and the three made of it."""
    images = MemoryPart(name="the images", num_bytes=4 * num_images * image_size**2, way_out="lower data.image_size")
    check([images], torch.device("cpu"))


def check(parts: Sequence[MemoryPart], device: torch.device) -> None:
    """Raise `UserError` when parts that lie in memory together need more than is free."""
    has_own = device.type == "cuda"
    places = {"RAM": ([p for p in parts if not (p.on_device and has_own)], free_ram())}
    if has_own:
        places[str(device)] = ([p for p in parts if p.on_device], free_on_device(device))
    for place, (inside, free) in places.items():
        needed = sum(part.num_bytes for part in inside)
        if needed > free:
            most = max(inside, key=lambda part: part.num_bytes)
            raise UserError(
                f"not enough memory: at least {in_words(needed)} of {place} are needed and {in_words(free)} are free; "
                f"{most.name} take {in_words(most.num_bytes)}: {most.way_out}"
            )


def in_words(num_bytes: int) -> str:
    """Bytes as MB, GB or, where no machine has as much, more than 1000 TB."""
    if num_bytes > 10**15:
        return "more than 1000 TB"
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 10**9 else f"{num_bytes / 1e6:.0f} MB"


def free_on_device(device: torch.device) -> int:
    """Bytes that torch can still have on a CUDA device: free ones, and those it holds without using them."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def free_ram(root: Path = Path("/")) -> int:
    """Bytes of RAM that can be had: the system's, or less where a control group (v1 or v2) allows less."""
    return min([_system_ram(root), *_cgroup_rooms(root)])


def _system_ram(root: Path) -> int:
    """MemAvailable; where there is no /proc, all the RAM there is."""
    numbers = _numbers(root / "proc/meminfo")
    if "MemAvailable:" in numbers:
        return numbers["MemAvailable:"] * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cgroup_rooms(root: Path) -> Iterator[int]:
    """Limit less what is in use, page cache apart, of this process's control group and of all above it."""
    lines = (root / "proc/self/cgroup").read_text().splitlines() if (root / "proc/self/cgroup").is_file() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        home = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        names = ("limit_in_bytes", "usage_in_bytes", "total_cache") if controllers else ("max", "current", "file")
        group = home / path.strip("/")
        # Inside a container the group itself may be what is mounted at `home`.
        for folder in (group, *group.parents):
            if not folder.is_relative_to(home):
                break
            limit, used = (_number(folder / f"memory.{name}") for name in names[:2])
            if limit is not None and used is not None:
                yield limit - used + _numbers(folder / "memory.stat").get(names[2], 0)


def _number(path: Path) -> int | None:
    """The number in a file; None where there is no file, or no limit ("max")."""
    text = path.read_text().strip() if path.is_file() else ""
    return int(text) if text.isdigit() else None


def _numbers(path: Path) -> dict[str, int]:
    """Lines `name number` of a file; empty where there is no file."""
    lines = [line.split() for line in path.read_text().splitlines()] if path.is_file() else []
    return {line[0]: int(line[1]) for line in lines if len(line) > 1 and line[1].isdigit()}
