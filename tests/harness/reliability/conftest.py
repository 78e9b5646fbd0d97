"""How the gate records a verdict, for tests of its tests."""

from harness.conftest import hold  # noqa: F401 - a fixture, found by its name
