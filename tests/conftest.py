"""One hypothesis profile for all tests. The gate needs none: importing it takes longer than a gate takes to start."""

import pytest
from hypothesis import settings

settings.register_profile("forge", deadline=None, print_blob=True)
settings.load_profile("forge")

# Triton decides at its import whether its functions are interpreted, and transformers imports it. The kernels' tests
# need them interpreted; no other test on a CPU calls them. No process that a test starts inherits it.
with pytest.MonkeyPatch.context() as patch:
    patch.setenv("TRITON_INTERPRET", "1")
    import triton.experimental.gluon  # noqa: F401 - brings triton.language; a launch would import it
