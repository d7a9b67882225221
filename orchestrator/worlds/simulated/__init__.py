"""A cluster that only exists in virtual time, around the very controller that runs real ones."""
