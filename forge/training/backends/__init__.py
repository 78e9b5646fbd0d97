"""The training stacks: each prepares its process and builds its own SFTTrainer from one job.

``prepare()`` runs before anything imports torch or transformers; ``build(job)`` returns the
trainer, ready to train, an instance of :func:`forge.training.loop.forge_trainer`'s class.
"""

from __future__ import annotations

from types import ModuleType

from forge.training.plan import Backend


def load_backend(name: Backend) -> ModuleType:
    """The backend's module, imported only now: Unsloth's must be first in its process."""
    if name == "unsloth":
        from forge.training.backends import unsloth as module
    elif name == "trl":
        from forge.training.backends import trl as module
    else:
        from forge.training.backends import legacy as module
    return module
