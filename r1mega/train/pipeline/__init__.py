"""In which order pipeline ranks work. Registers the package's own schedules; imports no torch."""

from r1mega.train.pipeline import choices  # noqa: F401
