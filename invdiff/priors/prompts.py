"""Prompts as tensors: the text encoder in a folder of diffusers, read like any checkpoint.

Tokeniser and network are transformers' ``CLIPTokenizer`` and ``CLIPTextModel``; the network is built from its
``config.json`` and filled strictly, and nothing is fetched.

Radford et al., "Learning transferable visual models", ICML 2021, arXiv:2103.00020.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from invdiff.errors import InvdiffError
from invdiff.priors.assemble import fill
from invdiff.priors.source import Source

__all__ = ["clip_embeddings"]

_WEIGHTS = ("model.safetensors", "model.fp16.safetensors", "pytorch_model.bin")


def clip_embeddings(source: Source, texts: Sequence[str]) -> Tensor:
    """Return the last hidden states of the folder's ``text_encoder`` for texts, ``(len(texts), tokens, width)``.

    Raises:
        InvdiffError: If the folder has no such encoder, the library is missing, or the weights do not fit.
    """
    index = source.json("model_index.json") or {}
    named = (index.get("tokenizer"), index.get("text_encoder"))
    config = source.json("text_encoder/config.json")
    if config is None or named != (["transformers", "CLIPTokenizer"], ["transformers", "CLIPTextModel"]):
        raise InvdiffError(
            f"{source.path} has no CLIP text encoder (text_encoder/ and tokenizer/) for prompt=; give embeddings=."
        )
    if not all(isinstance(text, str) for text in texts):
        raise InvdiffError("prompt= and negative_prompt= are texts; embeddings of many come as embeddings=.")
    try:
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    except ImportError:
        raise InvdiffError(
            "prompt= needs the transformers library to embed the text; install it, or give embeddings=."
        ) from None
    place = next((f"text_encoder/{n}" for n in _WEIGHTS if source.file(f"text_encoder/{n}").is_file()), None)
    if place is None:
        raise InvdiffError(f"{source.path} has no weights in text_encoder/; expected {_WEIGHTS[0]}.")
    state = source.weights(place)
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise InvdiffError(f"{source.file(place)} does not hold a flat list of weights; fetch it again.")

    def make() -> nn.Module:
        network = CLIPTextModel(CLIPTextConfig(**config))
        # Until transformers 5 the class held the network as its only part, which the names of weights tell.
        inner: nn.Module = getattr(network, "text_model", network)
        return inner

    # A list of 0, 1, 2, ... was saved with the weights until 2023.
    weights = {
        k.removeprefix("text_model."): v for k, v in state.items() if not k.endswith("embeddings.position_ids")
    }
    encoder: Any = fill(make, weights, str(source.file(place)))
    try:
        words = CLIPTokenizer.from_pretrained(str(source.file("tokenizer")), local_files_only=True)
        length = int(config.get("max_position_embeddings", 77))
        ids = words(
            list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
    except Exception as error:  # whatever the library makes of its files
        raise InvdiffError(
            f"{source.path}/tokenizer cannot be read ({str(error)[:160]}); fetch it again."
        ) from None
    with torch.no_grad():
        embeddings: Tensor = encoder(ids)[0]
    return embeddings
