"""Bends of third-party packages, one file each: symptom, versions, when to remove it."""
