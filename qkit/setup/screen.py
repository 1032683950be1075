"""Formats the report of `qkit doctor` for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

    from qkit.setup.doctor import Report


def screen(report: Report) -> RenderableType:
    """Lay out the report: machine, packages, checks, and commands that fix problems."""
    from rich.console import Group
    from rich.text import Text

    missing = [package.name for package in report.packages if package.version is None]
    installed = ", ".join(f"{package.name} {package.version}" for package in report.packages if package.version)
    lines = [
        Text(installed or "none"),
        *([Text(f"not installed: {', '.join(missing)}", style="dim")] if missing else []),
    ]
    return Group(_machine_table(report), Text(), *lines, Text(), _checks_table(report), *_remedies(report))


def _machine_table(report: Report) -> Table:
    from rich.table import Table
    from rich.text import Text

    device = report.device
    features = f" ({', '.join(device.features)})" if device.features else ""
    rows = {
        "device": f"{device.kind}: {device.name}, {device.memory_bytes / 2**30:.1f} GiB{features}",
        "memory": f"{report.memory_free_bytes / 2**30:.1f} GiB free, {device.cores} cores",
        "disk": f"{report.disk_free_bytes / 2**30:.1f} GiB free at {report.disk}",
        "python": f"{report.python}, {report.executable}",
        "system": report.platform,
    }
    table = Table.grid(padding=(0, 2, 0, 0))
    for name, value in rows.items():
        table.add_row(name, Text(value))  # Text, since rich would read brackets in a name as markup
    return table


def _checks_table(report: Report) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2, 0, 0))
    colours = {"ok": "green", "missing": "yellow", "broken": "bold red"}
    for check in report.checks:
        table.add_row(check.name, Text(check.status, style=colours[check.status]), Text(check.detail))
    return table


def _remedies(report: Report) -> list[Text]:
    """Return each command once, and never truncated."""
    from rich.text import Text

    commands = dict.fromkeys(check.remedy for check in report.checks if check.remedy)
    lines = [Text(f"  {command}", overflow="fold") for command in commands]
    return [Text(), Text("To fix this:"), *lines] if lines else []
