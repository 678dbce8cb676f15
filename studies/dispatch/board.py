"""What a command shows of its runs: which are done, which failed, and how long the rest will take."""

from dataclasses import dataclass

from studies.agenda import Agenda
from studies.dispatch.messages import Begins, Failed, Happened, Left, Message, Over, Prepares, Waits
from studies.terminal.display import Display


@dataclass(frozen=True)
class Failure:
    """A run that ended with an error; the others went on."""

    run: str
    message: str


class Board:
    """What a command knows of its runs: which go on here, and which are over and how. Shows all it hears."""

    def __init__(self, agenda: Agenda, display: Display) -> None:
        self._agenda, self._display = agenda, display
        self._here: set[int] = set()
        self.over: dict[int, str] = {}
        """The message of each run that failed, "" for each that came to its end, by number."""

    def hear(self, message: Message) -> None:
        """Take note of what a worker says. What several workers find over is said once."""
        match message:
            case Prepares(what, done, total):
                self._display.report(what, done, total)
            case Begins(number, notice):
                self._here.add(number)
                self._display.begin(number, notice)
            case Happened(number, event):
                self._display.event(number, event)
                if event.kind == "end":
                    self._end(number, "")
            case Over(number, status) if number not in self.over:
                self._end(number, "")
                self._display.over(number, status)
            case Failed(number, reason) if number not in self.over:
                self._end(number, reason)
                self._display.failed(number, reason)
            case Left(number, reason):
                self._here.discard(number)
                self._display.left(number, reason)
            case Waits(holders):
                for number, holder in holders:
                    if number not in self._here and number not in self.over:
                        self._display.waits(number, holder)

    def _end(self, number: int, failure: str) -> None:
        self._here.discard(number)
        self.over[number] = failure

    @property
    def all_over(self) -> bool:
        return len(self.over) == self._agenda.total

    def failures(self) -> list[Failure]:
        """The runs that failed, in their order."""
        return [Failure(self._name(number), message) for number, message in sorted(self.over.items()) if message]

    def _name(self, number: int) -> str:
        job = self._agenda.job(number)
        return f"{job.config.label}/seed{job.config.seed}" if job else f"run {number}, which was not decided"
