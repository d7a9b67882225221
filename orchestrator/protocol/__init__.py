"""The vocabulary that everyone shares: ids, units, the run file, and every message on a wire."""
