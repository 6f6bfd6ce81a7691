"""The error that a user can mend: its text names the file or option, what was expected, what came and the remedy."""


class UserError(Exception):
    """Bad input. The command lines print its text alone, without a traceback, and exit with code 2."""


class DataError(UserError):
    """An image, a label or a data set's layout is not what it should be; the text names the file."""


class CheckpointError(UserError):
    """A weights file cannot be read, written or fitted to the model; the text names it."""


class ConfigError(UserError):
    """An option or a configuration file is wrong; the text names it and, for a misspelt name, the nearest one."""
