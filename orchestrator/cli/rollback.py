"""Says what to resume from if everything since some step may be corrupt."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from orchestrator.cli import units
from orchestrator.cli.blocks import facts, section
from orchestrator.cli.choices import Form
from orchestrator.cli.errors import CliError, Exit
from orchestrator.cli.stored import Store, required
from orchestrator.cli.tables import in_json
from storage.catalog import Rejection
from storage.manifest import Manifest
from storage.verdicts import Trust, Where


@dataclass(frozen=True, slots=True)
class Plan:
    """A way back behind a corruption.

    Attributes:
        onset: the first step that may be corrupt.
        trust: what was asked for.
        resume: the checkpoint to resume from; None if there is none.
        passed_over: newer ones from before the onset, and why they are not it.
        bar: checkpoints from the onset on that nothing bars yet.
        newest: the newest step of all.
    """

    onset: int
    trust: Trust
    resume: Manifest | None
    passed_over: tuple[Rejection, ...]
    bar: tuple[Where, ...]
    newest: int

    @property
    def lost_steps(self) -> int | None:
        """Steps to be computed again to be where the newest checkpoint is."""
        return None if self.resume is None else self.newest - self.resume.step


def plan(store: Store, onset: int, trust: str) -> Plan:
    """Look for the newest checkpoint from before the onset that has enough trust.

    Raises:
        CliError: if there is no such level of trust, or no checkpoint at all.
    """
    levels = {level.kind: level for level in Trust}
    if trust not in levels:
        raise CliError(
            f"trust is {trust!r}, expected one of {', '.join(levels)}",
            "levels are explained in storage/FORMAT.md",
            Exit.USAGE,
        )
    catalog = store.catalog
    records, barred = required(store), catalog.barred()
    found, rejections = catalog.newest_trusted(before_step=onset, at_least=levels[trust])
    late = [(record.step, record.epoch) for record in records if record.step >= onset]
    bar = tuple(where for where in late if where not in barred)
    return Plan(onset, levels[trust], found, tuple(rejections), bar, records[0].step)


def told(planned: Plan, uri: str, output: Form) -> str:
    """Return a plan in the asked form."""
    resume = planned.resume
    bar = [f"{step}@{epoch}" for step, epoch in planned.bar]
    # An address with options has characters that a shell takes for its own.
    quoted = shlex.quote(uri)
    commands = [
        f"holdfast checkpoint quarantine {quoted} {name} "
        f"--reason 'corrupt from step {planned.onset}'"
        for name in bar
    ]
    if output is Form.JSON:
        return in_json(
            {
                "onset": planned.onset,
                "trust": planned.trust.kind,
                "resume": f"{resume.step}@{resume.epoch}" if resume else None,
                "lost_steps": planned.lost_steps,
                "quarantine": bar,
                "passed_over": planned.passed_over,
                "commands": commands,
            }
        )
    lines = facts(
        [
            ("Onset", f"step {planned.onset}"),
            ("Resume from", f"{resume.step}@{resume.epoch}" if resume else "nothing"),
            ("Trust asked for", planned.trust.words),
            ("Lost work", units.count(planned.lost_steps or 0, "step") if resume else ""),
        ]
    )
    over = [f"{one.step}@{one.epoch}: {one.reason}" for one in planned.passed_over]
    lines += section("Passed over", over)
    lines += section("Then", commands)
    if resume is None and planned.passed_over:
        lines += section(
            "Instead",
            [
                f"holdfast checkpoint scrub {quoted}",
                "or ask for less with --trust written",
            ],
        )
    return units.printable("\n".join(lines))
