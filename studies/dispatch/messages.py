"""What a process that trains cells says to the command that shows them. Runs are numbered from 1, in their order."""

from collections.abc import Callable
from dataclasses import dataclass

from harness.errors import StorageError, UserError
from harness.training.trainer import Event


@dataclass(frozen=True)
class Prepares:
    """`done` of `total` rows of `what` are made."""

    what: str
    done: int
    total: int


@dataclass(frozen=True)
class Ready:
    """Data, autoencoder and evaluator are there, and every cell that was to be checked fits."""


@dataclass(frozen=True)
class Begins:
    """This process has the lease on a run and starts or continues it."""

    number: int
    notice: str = ""
    """What people should know of that."""


@dataclass(frozen=True)
class Happened:
    """A step, a record or the end of the run that this process is at."""

    number: int
    event: Event


@dataclass(frozen=True)
class Over:
    """A run was found over: an earlier command, or another process, brought it to its end."""

    number: int
    status: str


@dataclass(frozen=True)
class Failed:
    """A run ended with an error."""

    number: int
    message: str


@dataclass(frozen=True)
class Left:
    """A run's process died, and the run is to be taken up again."""

    number: int
    message: str


@dataclass(frozen=True)
class Waits:
    """All that is left is held by others: run number and who holds it."""

    holders: tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class Refused:
    """What the user got wrong or the disk refuses, in one line; no cell of this process can run."""

    error: UserError | StorageError


@dataclass(frozen=True)
class Broke:
    """An error outside of any cell, with its trace."""

    trace: str


Message = Prepares | Ready | Begins | Happened | Over | Failed | Left | Waits | Refused | Broke
Tell = Callable[[Message], None]
