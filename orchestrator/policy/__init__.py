"""Policies: ordered rules of recovery, first match wins. Each answers with a plan and a reason."""
