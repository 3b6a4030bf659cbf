"""The contract between client and worker: messages, codecs, limits, errors and preprocessing.

Imports neither ray nor torch, nor the client or the worker.
"""

WIRE_VERSION = 1
"""Raised when a client and a worker of different numbers cannot talk to each other."""
