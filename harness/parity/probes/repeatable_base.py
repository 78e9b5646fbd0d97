"""A base that every machine of a kind makes alike: ``python -m harness.parity.probes.repeatable_base small``.

On a GPU the backward pass of attention adds up in any order, so a base that is trained twice is two bases, and runs on
them cannot be compared. With PyTorch's deterministic algorithms, the same GPU model and the same packages give the same
weights to the bit, and a gate that measures on several machines one after the other goes on where it was. Prints the
base's directory. One that is there already, however it was made, is taken as it is.
"""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Make or find the base named by the only argument."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read at cuBLAS's first call
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)
    # Only matrix products and a softmax are left. The memory-efficient kernels have no deterministic backward pass, and
    # the flash kernels' is not used while PyTorch only warns (ATen, attention_backward.cu).
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    from forge.training import cli

    sys.argv[1:1] = ["base"]
    cli.main()


if __name__ == "__main__":
    main()
