"""Says what can go wrong in storage, split by what the caller can do about it.

`retryable` is for programs: the same call may succeed later, with nothing changed. `hint` is for
people: the next thing to try, kept apart from the message so that a log line stays one line.
"""


class StorageError(Exception):
    """Base of all storage errors; never raised itself."""

    retryable: bool = False
    hint: str = ""


class BlobNotFoundError(StorageError):
    """Nothing is stored under this key."""

    hint = "The checkpoint may have been collected; choose another one from the catalog."


class BlobExistsError(StorageError):
    """Something else is stored under this key already, and blobs are never overwritten."""

    hint = "Two writers share one generation; see that each restart advances the generation."


class StorageFullError(StorageError):
    """The store has no room for this blob; what was written of it is gone again."""

    retryable = True
    hint = "Free space or lower the number of checkpoints kept; training goes on meanwhile."


class StorageUnavailableError(StorageError):
    """The store did not answer, or gave up half-way; nothing is known about the blob's content."""

    retryable = True
    hint = "Look at the mount or the network of this node; the call is repeated by itself."


class StorageRefusedError(StorageError):
    """The store answered and will go on refusing: permissions, read-only mount, no hard links."""

    hint = (
        "Check that the process may write there: permissions, credentials in its environment, that "
        "the bucket exists, or that the file system has hard links."
    )


class ClockSkewError(StorageRefusedError):
    """The service refuses to believe requests of this machine, whose clock is not its own."""

    hint = (
        "Set this machine's clock, as NTP does (`timedatectl`): requests are signed with the time, "
        "and may be 15 min off at most. What was refused is then accepted."
    )


class WrongKeyError(StorageRefusedError):
    """A blob was encrypted with another key than the one given, or its header is damaged."""

    hint = "Compare the key in the environment with the one that the run was started with."


class BlobCorruptError(StorageError):
    """A blob is not what was put, and what reads it can tell: its encryption does not open."""

    hint = "Resume from an older checkpoint: `holdfast get checkpoints`."


class BlobTooLargeError(StorageError):
    """What should be a small file is larger than any such file can be, and was not read."""

    hint = "Look at who can write to the store: no program of Holdfast makes such a file."


class ShardCorruptError(StorageError):
    """The bytes read are not the bytes that were staged."""

    hint = "Resume from an older checkpoint: `holdfast get checkpoints`."


class ManifestCorruptError(StorageError):
    """A commit record does not decode, or does not match its own checksum."""

    hint = "Resume from an older checkpoint: `holdfast get checkpoints`."


class StaleEpochError(StorageError):
    """The commit comes too late: a newer epoch, or a later step of this epoch, was committed."""

    hint = "A writer of an earlier incarnation is still alive; stop it, its work is not needed."


class ForeignCheckpointError(StorageError):
    """The checkpoint is of another run or another model."""

    hint = (
        "Compare the store's address in the run file with the run that wrote it, as `holdfast "
        "checkpoint ls` tells; each run needs a store of its own."
    )


def is_of_content(error: StorageError) -> bool:
    """Return whether an error tells of a blob, and not of the store or of who asks it.

    Who may not read must not make a sound checkpoint a bad one. Another key than that of the
    records is damage: they were read with ours.
    """
    refused = isinstance(error, StorageRefusedError) and not isinstance(error, WrongKeyError)
    return not (error.retryable or refused)


class UnsupportedVersionError(StorageError):
    """The file was written in a format version that this program does not know."""

    hint = "Read it with the version of Holdfast that wrote it, or a newer one."


class UnstorableError(StorageError):
    """The state has something in it that no file of ours can hold: there is no pickle in them."""

    hint = (
        "Keep it as a tensor, or as numbers, text and bytes in lists, tuples and dictionaries; or "
        "leave it out of what is saved."
    )


class ForbiddenPickleError(StorageError):
    """A pickle asks for something that is not needed to say what a checkpoint holds."""

    hint = "Do not load this file with anything else either, unless you know who made it and why."


class ForeignFormatError(StorageError):
    """A folder that is to be imported is not of the format that it should be, or is not whole."""

    hint = "See that the copy is complete; load it once with the program that wrote it."


class UnsupportedUriError(StorageError):
    """No store can be opened for this address."""

    hint = "Use a folder, as /path or file:///path, or a bucket, as s3://bucket/prefix."
