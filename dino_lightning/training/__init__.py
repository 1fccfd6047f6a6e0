"""The mechanics of a run: what it plans, refuses, saves and goes on with."""
