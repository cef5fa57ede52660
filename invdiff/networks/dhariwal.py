"""The ADM U-Net as EDM trains it.

``F(z, t)``: the embedding of time scales and shifts the features inside every residual block, attention has heads
of 64 channels, and resolution changes inside residual blocks.

Dhariwal, Nichol, NeurIPS 2021, arXiv:2105.05233; Karras et al., NeurIPS 2022, arXiv:2206.00364, appendix C.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from invdiff.errors import InvdiffError
from invdiff.networks.edm_blocks import Conv, GroupNorm, Positional, UNet, class_weights, common_layout

__all__ = ["DhariwalUNet"]

EPS = 1e-5


class DhariwalUNet(UNet):
    """``F(z, t)``, ``z`` ``(B, inputs, H, W)``, ``t`` ``(B,)``; returns ``(B, outputs, H, W)``.

    Args:
        inputs, outputs, resolution, inlet, widths, blocks, attention, embedding: See `UNet`.
        noise: Features of time.
        label: Classes; 0 where the network has none.
        augment: Width of the input that describes an augmentation; it is taken as zero.
    """

    attention_in_every_block = True
    head_channels = 64

    def __init__(
        self,
        *,
        inputs: int,
        outputs: int,
        resolution: int,
        inlet: int,
        widths: Sequence[int],
        blocks: int,
        attention: Sequence[int],
        embedding: int,
        noise: int,
        label: int = 0,
        augment: int = 0,
    ) -> None:
        super().__init__(
            inputs=inputs,
            outputs=outputs,
            resolution=resolution,
            inlet=inlet,
            widths=widths,
            blocks=blocks,
            attention=attention,
            embedding=embedding,
            scaled=True,
            project=False,
            skip_scale=1.0,
            eps=EPS,
        )
        self.labels = label
        self.map_noise = Positional(noise, endpoint=False)
        self.map_augment = nn.Linear(augment, noise, bias=False) if augment else None
        self.map_layer0 = nn.Linear(noise, embedding)
        self.map_layer1 = nn.Linear(embedding, embedding)
        self.map_label = nn.Linear(label, embedding, bias=False) if label else None
        self.out_norm = GroupNorm(widths[0], EPS)
        self.out_conv = Conv(widths[0], outputs, 3)

    def forward(self, z: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        """Return ``F(z, time)``; ``label``: classes ``(B,)``, or their weights ``(B, labels)``."""
        e = self.map_noise(time).to(z.dtype)
        e = self.map_layer1(functional.silu(self.map_layer0(e)))
        if self.map_label is not None:
            e = e + self.map_label(class_weights(label, self.labels, e))
        x = self._run(z, functional.silu(e))
        return self.out_conv(functional.silu(self.out_norm(x)))

    @staticmethod
    def layout(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """Return the arguments of the network that has weights of these names and shapes.

        Raises:
            InvdiffError: If no such network has.
        """
        common = common_layout(shapes)
        try:
            embedding, noise = shapes["map_layer0.weight"]
            outputs = shapes["out_conv.weight"][0]
        except (KeyError, ValueError, IndexError) as error:
            raise InvdiffError(
                f"The weights are not those of an ADM of EDM: {error} is missing or has the wrong number of axes."
            ) from None
        return common | {"outputs": outputs, "embedding": embedding, "noise": noise}
