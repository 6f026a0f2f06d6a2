"""The public functions, under the names and signatures of ``torch.nn.functional``."""

from dlkernels.ops.cross_entropy import cross_entropy

__all__ = ["cross_entropy"]
