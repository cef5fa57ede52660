"""DDPM++ and NCSN++ as EDM trains them: a U-Net with residual blocks weighted by ``sqrt(1/2)``.

``F(z, t)`` with an embedding of the time ``t`` by sines and cosines. DDPM++ takes fixed frequencies and plain
means of 2 x 2 pixels; NCSN++ takes random frequencies, the filter (1, 3, 3, 1), and adds the shrunken image to
every level of the encoder.

Song et al., ICLR 2021, arXiv:2011.13456; Karras et al., NeurIPS 2022, arXiv:2206.00364, appendix C.2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from invdiff.errors import InvdiffError
from invdiff.networks.edm_blocks import Conv, Fourier, GroupNorm, Positional, UNet, class_weights, common_layout

__all__ = ["SongUNet"]

EPS = 1e-6
FILTERS = {2: (1, 1), 4: (1, 3, 3, 1)}


class SongUNet(UNet):
    """``F(z, t)``, ``z`` ``(B, inputs, H, W)``, ``t`` ``(B,)``; returns ``(B, outputs, H, W)``.

    Args:
        inputs, outputs, resolution, inlet, widths, blocks, attention, embedding: See `UNet`.
        noise: Features of time.
        fourier: Random frequencies (NCSN++) instead of fixed ones.
        residual: Add the shrunken image to the levels of the encoder.
        taps: Filter of the changes of resolution.
        label: Classes; 0 where the network has none.
        augment: Width of the input that describes an augmentation; it is taken as zero.
    """

    attention_in_every_block = False
    head_channels = None

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
        fourier: bool,
        residual: bool,
        taps: Sequence[float],
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
            residual=residual,
            taps=taps,
            scaled=False,
            project=True,
            skip_scale=math.sqrt(0.5),
            eps=EPS,
        )
        self.labels = label
        self.map_noise = Fourier(noise) if fourier else Positional(noise, endpoint=True)
        self.map_label = nn.Linear(label, noise) if label else None
        self.map_augment = nn.Linear(augment, noise, bias=False) if augment else None
        self.map_layer0 = nn.Linear(noise, embedding)
        self.map_layer1 = nn.Linear(embedding, embedding)
        self.dec[f"{resolution}x{resolution}_aux_norm"] = GroupNorm(widths[0], EPS)
        self.dec[f"{resolution}x{resolution}_aux_conv"] = Conv(widths[0], outputs, 3)

    def forward(self, z: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        """Return ``F(z, time)``; ``label``: classes ``(B,)``, or their weights ``(B, labels)``."""
        e = self.map_noise(time)
        # The published weights expect the sines first.
        e = e.roll(e.shape[1] // 2, dims=1).to(z.dtype)
        if self.map_label is not None:
            e = e + self.map_label(class_weights(label, self.labels, e) * math.sqrt(self.labels))
        e = functional.silu(self.map_layer1(functional.silu(self.map_layer0(e))))
        x = self._run(z, e)
        n = self.resolution
        return self.dec[f"{n}x{n}_aux_conv"](functional.silu(self.dec[f"{n}x{n}_aux_norm"](x)))

    @staticmethod
    def layout(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """Return the arguments of the network that has weights of these names and shapes.

        Raises:
            InvdiffError: If no such network has.
        """
        common = common_layout(shapes)
        n = common["resolution"]
        filters = {s[-1] for name, s in shapes.items() if name.endswith(".resample_filter") and s}
        try:
            embedding, noise = shapes["map_layer0.weight"]
            outputs = shapes[f"dec.{n}x{n}_aux_conv.weight"][0]
            taps = FILTERS[filters.pop()] if filters else FILTERS[2]
        except (KeyError, ValueError, IndexError) as error:
            raise InvdiffError(
                f"The weights are not those of a DDPM++ or NCSN++ of EDM: {error} is missing or has the wrong "
                "number of axes."
            ) from None
        return common | {
            "outputs": outputs,
            "embedding": embedding,
            "noise": noise,
            "fourier": "map_noise.freqs" in shapes,
            "residual": any(name.endswith("_aux_residual.weight") for name in shapes),
            "taps": list(taps),
        }
