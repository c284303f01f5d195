"""The errors that a user may see, and the exit code of the daemon that goes with each."""


class FlannelpyError(Exception):
    """An error with one clear line for the user: the value, the rule, the remedy."""

    exit_code = 1


class SettingsError(FlannelpyError):
    """A flag or an environment variable is not usable."""

    exit_code = 2


class UplinkError(FlannelpyError):
    """No usable uplink: the interface that the overlay runs over cannot be chosen."""

    exit_code = 3


class KernelError(FlannelpyError):
    """The kernel refuses what the overlay needs (no privileges, no vxlan, a name that is taken)."""

    exit_code = 4


class ConflictError(FlannelpyError):
    """Another daemon serves this network on this host."""

    exit_code = 5


class StoreError(FlannelpyError):
    """The store cannot do what was asked for; `transient` says whether asking again may help."""

    exit_code = 6

    def __init__(self, message: str, *, transient: bool = False) -> None:
        super().__init__(message)
        self.transient = transient


class ChangedError(FlannelpyError):
    """Somebody else changed what a command was about to change: nothing is done."""

    exit_code = 7
