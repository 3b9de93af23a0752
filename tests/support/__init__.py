"""What tests and benchmarks share: tiny inputs, processes to be watched and killed, servers on loopback."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
