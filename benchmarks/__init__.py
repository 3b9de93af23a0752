"""Evidence for the project's claims: each check measures one, holds it against its bar, and leaves a record.

    python -m benchmarks --list
    python -m benchmarks demo-gain spectra-model

A check is one function in a module of `benchmarks/checks/`; nothing else has to know of it.
"""
