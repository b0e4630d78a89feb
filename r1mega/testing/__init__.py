"""Shipped for tests and for users' own parts: contracts of the choices, ranks on one machine. No run-time room imports it."""
