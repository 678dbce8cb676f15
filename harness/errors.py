"""The error types that are meant for the user: both are shown as one line."""

LONGEST = 400
"""Characters of such a line."""


class UserError(ValueError):
    """What the user got wrong, where, and the way out, in one line. The command line prints it and exits with 2."""


class StorageError(OSError):
    """The disk took no more: built from errno, reason and path, shown as one line with the way out.

    No input was wrong, so the run fails (exit status 1); what was whole on the disk before still is.
    """

    def __str__(self) -> str:
        return (
            f"cannot write {self.filename} ({self.strerror}): make room there or make it writable, "
            "and the same command goes on from the last checkpoint"
        )


def one_line(error: BaseException) -> str:
    """An error's text without line breaks and control characters, the middle of a long one left out.

    What the user gave may stand in it, whatever its length; the start says what is wrong, the end what to do.
    """
    text = "".join(c if c.isprintable() else "?" for c in " ".join(str(error).split()))
    return text if len(text) <= LONGEST else f"{text[: LONGEST * 2 // 3]} ... {text[-LONGEST // 3 :]}"
