"""One hypothesis profile for all tests. The gate needs none: importing it takes longer than a gate takes to start."""

from hypothesis import settings

settings.register_profile("forge", deadline=None, print_blob=True)
settings.load_profile("forge")
