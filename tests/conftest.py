"""On a machine without a GPU, Triton kernels run in Triton's interpreter; it must be told before any is defined."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
