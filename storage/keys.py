"""Says what the keys of a store of checkpoints look like; whatever looks otherwise is not ours."""

import re

# Numbers of at most 16 digits: whoever can write to the store can also make up keys.
COMMIT = re.compile(r"commits/(\d{16})-(\d{1,16})\.json")
GENERATION = re.compile(r"gen/[0-9a-f]{2}/(\d{1,16})-(\d{1,16})/(?:s\d+\.(?:st|idx)|digests)")
VERDICT = re.compile(r"verdicts/(\d{1,16})-(\d{1,16})/(\d{6})-([a-z]+(?:-[a-z]+)*)\.json")
LEASE = re.compile(r"leases/(\d{1,16})-(\d{1,16})/(\d{12})-[A-Za-z0-9._-]+")


def is_ours(key: str) -> bool:
    """Return whether a key is of a shape that only checkpoints have."""
    return any(shape.fullmatch(key) for shape in (COMMIT, GENERATION, VERDICT, LEASE))
