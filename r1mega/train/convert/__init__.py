"""Checkpoints between Hugging Face's format and Megatron's.

``run`` is the command; ``sources`` reads, ``targets`` plans and writes, a file at a time.
``shards`` and ``native`` are the two formats' files, ``disk`` and ``records`` the bytes below them, ``fp8`` the scales; ``ledger``
balances the books, ``finish`` publishes with ``card`` and lineage, ``verify`` looks again.
"""
