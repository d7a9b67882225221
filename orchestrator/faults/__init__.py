"""Faults as data: what can be broken, and plans that say what is broken when."""
