"""The subjects by name."""

from __future__ import annotations

from .parity import ParitySubject
from .subject import Subject
from .text import TextSubject

SUBJECTS = {"parity": ParitySubject, "text": TextSubject}


def make_subject(name: str, *, tiny: bool = False) -> Subject:
    """A subject of SUBJECTS.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in SUBJECTS:
        raise ValueError(f"there is no subject {name!r}; name one of {', '.join(SUBJECTS)}")
    return SUBJECTS[name](tiny=tiny)
