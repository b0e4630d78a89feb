"""``runtime=ray``: trainer ranks and servers as actors of a Ray cluster. :mod:`driver` begins; Ray is imported when it runs."""
