"""Faults on purpose: damaged files, bad flags, kills, full disks, two starts. ``python -m tests.faults`` runs all."""
