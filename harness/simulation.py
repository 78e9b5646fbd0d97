"""How the suites' simulations print what they count: shares in percent, tables as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def percent(*shares: float) -> str:
    """``"97.5 / 2.5"`` for 0.975 and 0.025."""
    return " / ".join(f"{100 * share:.1f}" for share in shares)


def table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table under its title."""
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    return "\n".join([f"**{title}**", "", lines[0], "|---" * len(head) + "|", *lines[1:], ""])
