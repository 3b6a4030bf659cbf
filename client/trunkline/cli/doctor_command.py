"""``trunkline doctor``."""

from __future__ import annotations

from dataclasses import asdict

import typer

from trunkline.cli.output import EXIT_FAILED, Session, command


@command()
def doctor(session: Session) -> None:
    """Find out what is the matter, and what to do. Answers within three seconds."""
    from trunkline.doctor import Check, examine

    checks = examine(session.settings)
    failed = any(one.status == "fail" for one in checks)

    def line(check: Check) -> str:
        text = f"{check.status:<4}  {check.name:<11}  {check.detail}"
        return f"{text}\n{'':<19}do: {check.fix}" if check.fix else text

    data = {"ok": not failed, "checks": [asdict(one) for one in checks]}
    session.emit(data, "\n".join(line(one) for one in checks))
    if failed:
        raise typer.Exit(EXIT_FAILED)
