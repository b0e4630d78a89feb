"""A folder for the PYTHONPATH of SGLang's processes; see the package above. Nothing of it is imported by r1mega."""
