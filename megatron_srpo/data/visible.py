"""Text from outside, such as model output and names of files, made safe to print."""

import re

_FORMAT = "\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff"
_HIDDEN = re.compile(f"[\x00-\x08\x0b-\x1f\x7f-\x9f{_FORMAT}]")
_LOGIN = re.compile(r"(\w:/{1,2})\S*@")  # also with a slash in the password, and in a Path: http:/user@host


def visible(text: str) -> str:
    """Replace control and direction characters, which a terminal would interpret, by their code points."""
    return _HIDDEN.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", text)


def without_logins(text: str) -> str:
    """Replace user and password in the URLs of a message, which may end up in logs and reports of bugs."""
    return _LOGIN.sub(r"\1…@", text)
