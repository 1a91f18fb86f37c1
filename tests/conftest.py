"""Profiles of the search: `ci` (derandomised; taken where CI is set), `quick` (otherwise), `search` (long).

A long search: pytest tests --hypothesis-profile=search
"""
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")                              # tolerances are those of float32

from hypothesis import settings                                            # noqa: E402

settings.register_profile("quick", max_examples=40, deadline=None)
settings.register_profile("ci", max_examples=40, deadline=None, derandomize=True, print_blob=True)
settings.register_profile("search", max_examples=2000, deadline=None, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "quick")
