"""Detectors: pure functions of what is known, each turning it into findings with evidence."""
