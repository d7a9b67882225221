"""Names and units: what a bare `str`, `int` or `float` means wherever it is passed on."""

from typing import NewType

RunId = NewType("RunId", str)
NodeId = NewType("NodeId", str)
IncidentId = NewType("IncidentId", str)
Serial = NewType("Serial", str)
"""Names a device for longer than a run (protocol.devices)."""
Rank = NewType("Rank", int)
Generation = NewType("Generation", int)
"""One incarnation of the world. Advanced when a restart is *decided*; the fencing token."""
Step = NewType("Step", int)
"""Completed optimizer steps. Step 0 is the initial state, before any update."""
Seconds = NewType("Seconds", float)
"""Seconds on the run's clock when it is a moment, plain seconds when it is a span."""
