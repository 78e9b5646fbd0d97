"""Measurements that need torch, each a process of its own: ``python -m forge.training.probes.NAME``.

Each prints one JSON document as its last line of stdout.
"""
