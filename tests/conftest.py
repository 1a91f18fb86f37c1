import os

os.environ.setdefault("NPROC", "8")            # XLA's CPU threads, read once: a pool of two was seen to deadlock
