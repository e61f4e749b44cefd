"""Numbers with their nouns, for messages: one user, and several users."""

from __future__ import annotations


def counted(number: int, one: str, many: str = "") -> str:
    """A number with its noun: ``1 user``, ``5,224 users``. ``many`` is what follows other numbers than 1 where that is
    not ``one`` with an s, as in ``counted(n, "user is", "users are")``."""
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"
