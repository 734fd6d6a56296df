"""The built-in trainings, by name; no torch here, so that the command line can list them at once.

Each is a file beside this one that follows the contract of a user's recipe and knows nothing of
narrowcast; ``load`` turns either into a ``Recipe``.
"""

from __future__ import annotations

__all__ = ["BUILTIN"]

BUILTIN: dict[str, str] = {
    "fashion": "classify Fashion-MNIST images with an MLP, a small ViT or a small ResNet",
    "austen": "predict the next byte of Jane Austen's novels with a GPT, from tiny to GPT-2 124M",
    "tabular": "predict the price of a diamond from ten columns with an MLP (regression)",
}
