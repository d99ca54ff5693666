"""What functions whose gradients are kernels have in common."""

import torch


def refuse_second_gradients(name: str) -> None:
    """To be called in the backward of a `torch.autograd.Function`, which is differentiable once.

    PyTorch has gradients on in a backward only with `create_graph`, which is refused whether or not anything
    is differentiated twice later, and when it traces one to compile it. An operator with a registered
    gradient would say the same, but asks Python at every call.

    Raises:
        RuntimeError: it is to be differentiated.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"{name} can be differentiated once")
