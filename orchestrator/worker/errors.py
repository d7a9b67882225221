"""How a generation, or a rank, can end other than well; and with what exit code."""

EXIT_MISCONFIGURED = 78
"""EX_CONFIG of sysexits.h: the job as written can not run."""
EXIT_ORPHANED = 75
"""EX_TEMPFAIL: the agent is gone, and a rank that nobody watches must not run on."""
EXIT_STUCK = 76
"""EX_PROTOCOL: told to leave its generation, the main thread did not come back in time."""


class Aborted(Exception):  # noqa: N818 - not an error: an order to leave this generation
    """This rank was told to leave the generation that it is in."""


class PeerLostError(Exception):
    """A collective failed because a peer went away; raise it instead of the backend's own error."""


class MisconfiguredError(Exception):
    """The job as written can not run: bad data, sizes that do not fit. Restarting can not help.

    Attributes:
        hint: what the person who wrote the job can do.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class UnrestorableError(Exception):
    """The state that this rank is to go on from can not be read, or is not what was saved.

    That is a fault of the store, not of the program that reads it: the run is brought back, and
    looks for the newest state that is good.

    Attributes:
        hint: what the person who looks after the store can do.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class SaveStuckError(Exception):
    """A thread of this process writes to a slot and does not get on: nobody may be given that slot.

    The process has to end; another one takes its seat.
    """

    hint = "Look at the memory and the devices of this node; its log has what the thread was at."


class NotSupervisedError(Exception):
    """The process was not started by an agent."""

    hint = "Start it through a run file: `holdfast run RUN.yaml`."
