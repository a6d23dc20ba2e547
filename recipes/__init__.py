"""Lightning recipes that train with bp_torch on real data: one page of training code, many small YAML files.

They need the extra ``recipes`` (``pip install 'bp-torch[recipes]'``).
"""


class ConfigError(ValueError):
    """What the user wrote cannot be run. The message is one line and names the key to change."""


class Unfinished(RuntimeError):
    """A run that ended before it had anything to test. `status` is the exit status of the command."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status
