"""The command as it stands on record: without passwords."""

import re
import sys

PASSWORDS = (
    # scheme://user:password@host, where the password may hold anything but a blank.
    (re.compile(r"(://[^:/@\s]*):\S*@"), r"\1:***@"),
    (re.compile(r"([?&](?:password|sslpassword)=)[^&\s]*", re.IGNORECASE), r"\1***"),
)


def without_passwords(text: str) -> str:
    """A text with the passwords of its URLs as `***`."""
    for pattern, shown in PASSWORDS:
        text = pattern.sub(shown, text)
    return text


def recorded_command() -> list[str]:
    """The words of this process's command."""
    return ["ditbench", *map(without_passwords, sys.argv[1:])]
