"""An entrypoint whose library is not installed, as torch is not on the base install."""

MISSING = "torch"

raise ModuleNotFoundError(f"No module named '{MISSING}'", name=MISSING)
