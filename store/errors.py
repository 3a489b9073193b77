"""The exceptions that tensorsleuth raises on purpose.

Every message says what was expected, what was found and what to do; the command line prints it as one
line on stderr and exits with code 2.
"""


class SleuthError(Exception):
    """Base of every error that a user can cause and fix."""


class InputError(SleuthError):
    """An argument, file or model that cannot be used as given."""


class UnsupportedDtypeError(InputError):
    """A tensor whose dtype the shards cannot hold bit for bit."""


class TraceNotFoundError(SleuthError):
    """A path that holds no trace, or a run, tensor or comparison that the trace does not hold."""


class RunExistsError(SleuthError):
    """A run name that is taken, by a finished run or by a live writer."""


class FormatError(SleuthError):
    """A shard, manifest or catalog of a version this package does not read, or not one at all."""


class IntegrityError(SleuthError):
    """Stored bytes that do not match their recorded checksum or length."""


class CatalogLockedError(SleuthError):
    """The catalog is held by another process for writing."""


class StorageError(SleuthError):
    """The operating system refused to store data, for example because the disk is full."""


class CaptureError(SleuthError):
    """A tensor could not be recorded as it was when its hook fired."""
