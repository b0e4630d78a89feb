"""Where inputs lie and results go, other than in a plain local file: URLs, a hub, compressed files, files of records.

Below every room but config. A command runs on a :class:`View` of its config, in which all paths are local; a loop tells
:func:`published` of each finished checkpoint. Formats are :mod:`r1mega.files.records`'. Imports neither torch nor fsspec nor
huggingface_hub before it meets a name that needs them.
"""

from __future__ import annotations

from r1mega.files.remote import quoted
from r1mega.files.view import View, published

__all__ = ["View", "published", "quoted"]
