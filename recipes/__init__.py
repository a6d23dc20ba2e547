"""Lightning recipes that train with bp_torch on real data: one page of training code, many small YAML files.

They need the extra ``recipes`` (``pip install 'bp-torch[recipes]'``).
"""


class ConfigError(ValueError):
    """What the user wrote cannot be run. The message is one line and names the key to change."""
