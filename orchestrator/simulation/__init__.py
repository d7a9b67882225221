"""Whole runs in virtual time: the real controller, driven through simulated worlds."""
