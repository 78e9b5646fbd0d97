"""The training stacks: each prepares its process and builds its own SFTTrainer from one job.

``prepare()`` runs before anything imports torch or transformers; ``build(job)`` returns the
trainer, ready to train, an instance of :func:`forge.training.backends.trainer.forge_trainer`'s class.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from forge.training.config.plan import Backend


def load_backend(name: Backend) -> ModuleType:
    """The backend's module, imported only now: Unsloth's must be first in its process."""
    return import_module(f"{__name__}.{name}")
